"""Operators of torch by what they do to memory and arithmetic: products, element-wise, copies; and a colour for each.

Which kind an operator is of decides what helps: products want better kernels or fewer bits, element-wise operators want
to be fused, copies want to be avoided, overhead wants larger batches, compiled or captured steps.
"""

import re

from course_lib.lab.plotting import PALETTE

OVERHEAD = "overhead"

KINDS: dict[str, str] = {
    "matrix products": r"b?mm|addb?mm|baddbmm|(add)?mv|dot|matmul|linear|einsum|(int|scaled)_mm|.*attention",
    "convolutions": r".*conv(olution|\d|_).*",
    "normalisation": r".*(batch|layer|group|instance|rms)_?norm",
    "copies and layout": r"empty|copy|to|clone|contiguous|(unsafe_)?view|reshape|t|transpose|permute|as_strided|expand"
    r"|repeat|(un)?flatten|cat|stack|select|slice|narrow|split|chunk|unbind|(un)?squeeze|detach|resize|resolve|fill"
    r"|zeros?|ones|full|index|gather|scatter|embedding|pad|constant_pad|unfold|set|alias|lift|item|local_scalar",
    "reductions": r".*pool|sum|mean|a?max|a?min|arg(max|min)|prod|any|all|(log_)?softmax|nll_loss|cross_entropy"
    r"|(linalg_vector_)?norm|var|std|cumsum|topk|sort|mse_loss|binary_cross_entropy",
    "element-wise": r"r?sub|add(cmul|cdiv)?|mul|div|neg|abs|sign|relu|clamp(_min|_max)?|threshold|(leaky_|h)?relu|gelu"
    r"|silu|sigmoid|tanh|softplus|elu|hard.*|expm?1?|log(1p|2|10)?|r?sqrt|reciprocal|pow|square|sin|cos|erf|where"
    r"|masked.*|lerp|dropout|bernoulli|normal|uniform|random|maximum|minimum|[lg][te]|eq|ne|logical.*|bitwise.*|round"
    r"|floor|sgd|adamw?|adagrad",
}
"""Kind of operator -> what its name begins with; the first that fits."""

_OTHER, _COMPILED = "other operators", "compiled kernels"
_BEGINNINGS = {kind: re.compile(rf"({pattern})(?![a-z])") for kind, pattern in KINDS.items()}
_KERNEL = re.compile(r"CompiledFxGraph|cpp_fused|triton_|Inductor")
_AROUND = re.compile(r"^_*((foreach|fused|native|mkldnn|cudnn|miopen|cuda|thnn)_)*_*")


def kind_of(name: str) -> str:
    """Return the kind of what an event is named after: a key of ``KINDS``, "compiled
    kernels", "other operators", or "overhead" for what is no operator.

    Operators have a namespace, as in ``aten::mm``; the autograd engine's bookkeeping
    (``autograd::engine::…``, ``MmBackward0``) and named parts are no operators.
    """
    if _KERNEL.search(name):
        return _COMPILED
    if "::" not in name or name.startswith(("autograd::", "torch::autograd::")):
        return OVERHEAD
    plain = _AROUND.sub("", name.rpartition("::")[2])
    fitting = (kind for kind, begins in _BEGINNINGS.items() if begins.match(plain))
    return next(fitting, _OTHER)


COLOURS = dict(zip([*KINDS, _OTHER, _COMPILED, OVERHEAD], [*PALETTE, "#F0E442", "#d9d9d9"], strict=True))
"""Kind -> the colour of its bars."""
