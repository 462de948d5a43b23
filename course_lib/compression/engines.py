r"""Real int8: networks handed to engines whose kernels multiply integers, and what that saves in bytes and time.

======================  =====================================================  =====================================
name                    what it does or gives                                  source
======================  =====================================================  =====================================
``export_onnx``         a network as a file that other engines read            the ONNX specification
``quantise_onnx``       int8 weights and activations, ranges from batches      Jacob et al. 2017, arXiv:1712.05877
``dynamic_onnx``        int8 weights; ranges of activations found in each run  Krishnamoorthi 2018, arXiv:1806.08342
``session``, ``run``    the file in ONNX Runtime, and its answer
``products_saturate``   whether this processor clips 8-bit products            Intel's manual, VPMADDUBSW
``float_weights``       the weights in such a file, by name
``int8_weights``        the same of a quantised one: integers and scales
``torch_static``        what ``quantise_onnx`` does, in torch's own kernels    Jacob et al. 2017
``torch_dynamic``       what ``dynamic_onnx`` does, in torch's own kernels     Krishnamoorthi 2018
``PackedLinear``        4-bit weights in memory, reals again at each use       Frantar et al. 2022, arXiv:2210.17323
``compare_engines``     bytes on disk, time in turns, how far answers differ
``peak_bytes``          memory at the peak, in a process of its own
======================  =====================================================  =====================================

To fake-quantise is to ask what int8 costs in accuracy; it saves nothing. Bytes and time are saved by an engine that
stores bytes and multiplies them. ONNX Runtime is the one for servers and desktops; both its tools and its kernels want
float32 networks to start from, so a float64 one is rounded on export. ``onnx``, ``onnxscript`` and ``onnxruntime`` are
imported when they are needed. Engines run on the CPU here.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.compression.quantisation import Grid, Quantised
from course_lib.lab.arguments import at_least, require
from course_lib.lab.timing import compare_speed

# ONNX Runtime reports its use to its makers unless told not to, and leaves a file of it among the temporary ones.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# --- A network as a file ----------------------------------------------------------------------------------------------


def export_onnx(model: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Write the network, in evaluation mode and float32, as an ONNX file that takes batches of any size.

    Its input is called ``x`` and its output ``y``. Batch norms behind convolutions are folded into them on the way.

    Parameters
    ----------
    example : an input that the network takes, ``[N, ...]``; its numbers do not matter.

    Returns
    -------
    The path.

    Raises
    ------
    ValueError : the example has no examples.
    """
    require("example", tuple(example.shape), lambda shape: len(shape) > 0 and shape[0] > 0, "a batch [N, ...], N > 0")
    plain = copy.deepcopy(model).float().cpu().eval()
    x = example[:1].detach().float().cpu()
    sizes = ({0: torch.export.Dim("batch")},)
    with _without_warnings(FutureWarning, r".*LeafSpec"), torch.no_grad():
        program = torch.onnx.export(
            plain, (x,), dynamo=True, dynamic_shapes=sizes, input_names=["x"], output_names=["y"], verbose=False
        )
    assert program is not None
    program.save(str(path))
    return Path(path)


def quantise_onnx(
    path: str | Path,
    out: str | Path,
    batches: Iterable[Tensor],
    *,
    per_channel: bool = True,
    reduce_range: bool | None = None,
    operators: Sequence[str] | None = None,
) -> Path:
    """Write a file with int8 weights and 8-bit activations, whose ranges are those seen on ``batches``.

    Static quantisation in the form that ONNX Runtime's CPU kernels were made for: weights on a symmetric signed grid,
    activations on an affine unsigned one, as pairs of QuantizeLinear and DequantizeLinear that the engine fuses into
    integer operators when it loads the file.

    Parameters
    ----------
    batches : inputs ``[N, ...]`` for calibration; of as many examples each as memory allows.
    per_channel : a scale for each output of a layer in place of one for all.
    reduce_range : weights of 7 bits, for processors that clip the products of 8 (``products_saturate``). None: where
        this one does. Decide by the processor that is to run the file.
    operators : the ONNX names of those to quantise (``["Conv", "MatMul", "Gemm"]``); all that can be by default.

    Returns
    -------
    The path ``out``.

    Raises
    ------
    ValueError : there is no batch.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    given = [x.detach().float().cpu().numpy() for x in batches]
    require("batches", given, bool, "at least one batch of inputs")
    with tempfile.TemporaryDirectory() as folder, _without_logging():
        prepared = Path(folder, "prepared.onnx")  # shapes inferred, constants folded
        quant_pre_process(str(path), str(prepared))
        quantize_static(
            prepared,
            out,
            _Reader(given),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            reduce_range=products_saturate() if reduce_range is None else reduce_range,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=None if operators is None else [*operators],
        )
    return Path(out)


def dynamic_onnx(
    path: str | Path,
    out: str | Path,
    *,
    per_channel: bool = True,
    reduce_range: bool | None = None,
    operators: Sequence[str] = ("MatMul", "Gemm"),
) -> Path:
    """Write a file with int8 weights; the range of each activation is found anew in each run, so no batch is needed.

    Linear layers alone by default: ONNX Runtime's convolution for this case (ConvInteger) is several times slower than
    that of float32. ``reduce_range`` is as for ``quantise_onnx``. Returns the path ``out``.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_logging():
        quantize_dynamic(
            Path(path),
            Path(out),
            per_channel=per_channel,
            reduce_range=products_saturate() if reduce_range is None else reduce_range,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[*operators],
        )
    return Path(out)


@functools.cache
def products_saturate() -> bool:
    """Whether ONNX Runtime's int8 products can come out wrong on this processor: asked of the engine, with two.

    255 x 127 twice makes 64,770. x86 processors before VNNI multiply unsigned by signed bytes with an instruction
    (VPMADDUBSW) that adds pairs of products in 16 signed bits and clips them at 32,767.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    ends = [
        helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 2]),
        helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1]),
    ]
    weight = numpy_helper.from_array(np.full((2, 1), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "two products", ends[:1], ends[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    loaded = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = loaded.run(None, {"x": np.full((1, 2), 255, np.uint8)})
    return int(y.item()) != 2 * 255 * 127


def session(path: str | Path, threads: int = 1) -> Any:
    """Return ``onnxruntime.InferenceSession``: the file loaded, optimised for this processor, on so many threads.

    Its threads sleep between runs: spinning, their default, would slow down whatever is measured next.
    """
    at_least(1, threads=threads)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, x: Tensor) -> Tensor:
    """Return the answer to a batch, in its type and on its device; the engine computes in float32 on the CPU."""
    (name,) = [given.name for given in session.get_inputs()]
    (y,) = session.run(None, {name: x.detach().float().cpu().numpy()})
    return torch.from_numpy(y).to(x)


class _Reader:
    """Batches in the form in which ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Sequence[np.ndarray]) -> None:
        self.left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by the input's name, None at the end."""
        x = next(self.left, None)
        return None if x is None else {"x": x}


# --- What stands in the file ------------------------------------------------------------------------------------------


def float_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers in an ONNX file, ``[outputs, ...]``, by their names in it.

    Batch norms are folded into them. The name is the layer's (``"stem.0.weight"``) where export has kept it: a weight
    that it has transposed is called something like ``"val_23"``.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    stored = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {name: value for name, value in stored.items() if value.dtype == torch.float32 and value.dim() > 1}
    readers = {name: _readers(graph, name) & _WEIGHTED for name in found}
    return {name: value.mT if readers[name] & _COLUMNS else value for name, value in found.items() if readers[name]}


def int8_weights(path: str | Path) -> dict[str, Quantised]:
    """Return the int8 weights in a file of ``quantise_onnx`` or ``dynamic_onnx``, by the names of ``float_weights``.

    Per channel, or for the whole tensor where the file has one scale. Zero points are 0.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    stored = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {}
    for name, value in stored.items():
        if value.dtype == torch.int8 and value.dim() > 1:
            base = name.removesuffix("_quantized")
            turned = value.mT if _readers(graph, name) & _COLUMNS else value
            scales = stored[f"{base}_scale"].reshape(-1, 1)
            group = turned.numel() if len(scales) == 1 else turned[0].numel()
            zeros = torch.zeros_like(scales, dtype=torch.int32)
            integers = turned.to(torch.int32)
            found[base.removesuffix("_Transposed")] = Quantised(integers, scales, zeros, group, Grid(8))
    return found


_COLUMNS = {"MatMul", "MatMulInteger", "Gemm"}
"""Operators whose weight has its outputs in the last dimension."""
_WEIGHTED = _COLUMNS | {"Conv", "ConvInteger", "Gemm of rows"}


def _readers(graph: Any, name: str) -> set[str]:
    """The operators that take this tensor as their second input, also by way of a DequantizeLinear."""
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == name:
            found |= _readers(graph, node.output[0])
        elif len(node.input) > 1 and node.input[1] == name:
            rows = node.op_type == "Gemm" and any(each.name == "transB" and each.i for each in node.attribute)
            found.add("Gemm of rows" if rows else node.op_type)
    return found


# --- torch's own int8 -------------------------------------------------------------------------------------------------


def torch_static(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Return an int8 network in torch's own kernels, with ranges from ``batches``, float32 on the CPU.

    ``torch.ao.quantization`` by way of ``torch.fx``: deprecated since torchao has its own, yet torchao's int8 is fast
    only through ``torch.compile``, which needs a C++ compiler on the learner's machine; this one needs none.

    Raises
    ------
    ValueError : there is no batch.
    """
    given = [x.detach().float().cpu() for x in batches]
    require("batches", given, bool, "at least one batch of inputs")
    plain = copy.deepcopy(model).float().cpu().eval()
    with _without_quantisation_warnings(), torch.no_grad():
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        observed = prepare_fx(plain, get_default_qconfig_mapping(torch.backends.quantized.engine), (given[0],))
        for x in given:
            observed(x)
        return convert_fx(observed)


def torch_dynamic(model: nn.Module) -> nn.Module:
    """Return a network whose linear layers have int8 weights in torch's own kernels, float32 around them, on the CPU.

    Each layer finds the range of its input anew in every run (``torch.ao.quantization.quantize_dynamic``).
    """
    plain = copy.deepcopy(model).float().cpu().eval()
    with _without_quantisation_warnings():
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)


# --- 4 bits in memory -------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in memory two integers a byte, and becomes reals again at each use.

    What language models do whose weights would not fit otherwise. Memory is saved; time is lost where, as here, the
    reals are written out before they are multiplied, and won where reading the weights is what takes the time.

    Parameters
    ----------
    weight : of at most 4 bits, ``[outputs, inputs]``.
    bias : ``[outputs]`` or None.

    Raises
    ------
    ValueError : the weight has more bits, or is no matrix.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, weight: Quantised, bias: Tensor | None = None) -> None:
        super().__init__()
        require("weight", weight.grid, lambda grid: grid.bits <= 4, "on a grid of at most 4 bits")
        require("weight", tuple(weight.integers.shape), lambda shape: len(shape) == 2, "a matrix [outputs, inputs]")
        self.grid, self.dtype = weight.grid, weight.dtype
        self.out_features, self.in_features = weight.integers.shape
        self.group = min(weight.group, self.in_features)
        codes = (weight.integers - weight.grid.low).to(torch.uint8)
        whole = F.pad(codes, (0, -self.in_features % self.group)).flatten()  # whole groups
        first, second = F.pad(whole, (0, len(whole) % 2)).view(-1, 2).unbind(1)
        self.register_buffer("packed", first | second << 4)
        self.register_buffer("scales", weight.scales[..., None])  # [outputs, groups, 1]
        self.register_buffer("zeros", (weight.zeros[..., None] - weight.grid.low).to(torch.int8))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The reals ``[outputs, inputs]`` that the integers stand for, made anew at each look."""
        groups = -(-self.in_features // self.group)
        codes = torch.stack((self.packed & 15, self.packed >> 4), 1).flatten()
        codes = codes[: self.out_features * groups * self.group]
        codes = codes.view(self.out_features, groups, self.group)
        reals = (codes - self.zeros) * self.scales.to(torch.promote_types(self.scales.dtype, self.dtype))
        return reals.flatten(1)[:, : self.in_features].to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.in_features}, {self.out_features}, bits={self.grid.bits}, group={self.group}"


def pack_linears(model: nn.Module, weights: Mapping[str, Quantised]) -> nn.Module:
    """Return a copy of the network with a ``PackedLinear`` in place of each linear layer named in ``weights``.

    Raises
    ------
    ValueError : a name is not that of a linear layer, or a weight does not fit it.
    """
    made = copy.deepcopy(model)
    parts = dict(made.named_modules())
    for name, weight in weights.items():
        layer = parts.get(name)
        shape = tuple(weight.integers.shape)
        if not isinstance(layer, nn.Linear) or layer.weight.shape != shape:
            raise ValueError(f"weights[{name!r}] has the shape {shape}: must be that of a linear layer of the network")
        owner, _, attribute = name.rpartition(".")
        setattr(parts[owner], attribute, PackedLinear(weight, layer.bias))
    return made


# --- What it saves ----------------------------------------------------------------------------------------------------


def file_size(path: str | Path) -> int:
    """Bytes of a file."""
    return Path(path).stat().st_size


def saved_size(model: nn.Module) -> int:
    """Bytes of the file that ``torch.save(model.state_dict())`` writes."""
    with io.BytesIO() as file, _without_quantisation_warnings():
        torch.save(model.state_dict(), file)
        return file.tell()


@dataclass(frozen=True)
class Engine:
    """A way to run a network: its answer to a batch, and the bytes that it takes on disk."""

    answer: Callable[[Tensor], Tensor]
    bytes: int


def onnx_engine(path: str | Path, threads: int = 1) -> Engine:
    """An ONNX file in ONNX Runtime."""
    loaded = session(path, threads)
    return Engine(lambda x: run(loaded, x), file_size(path))


def torch_engine(model: nn.Module) -> Engine:
    """A network in torch, in evaluation mode without gradients, on its device or as many threads as torch is set to."""
    plain = copy.deepcopy(model).eval()
    where = next((value.device for value in plain.state_dict().values()), torch.device("cpu"))

    def answer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return plain(x.to(where)).to(x.device)

    return Engine(answer, saved_size(plain))


def compare_engines(engines: Mapping[str, Engine], x: Tensor, *, rounds: int = 15) -> pd.DataFrame:
    """Compare engines with the first of them on one batch: bytes, time in turns, how far the answers are apart.

    Returns
    -------
    A row for each engine, by name: ``bytes`` on disk; how many times ``smaller`` than the first; ``milliseconds``, the
    median; how many times as fast as the first (``faster``, median of the rounds' own ratios, and its quartiles ``low``
    and ``high``); the largest ``difference`` of an output, as a part of the first's largest; and the share of examples
    with the ``same`` largest output.

    Raises
    ------
    ValueError : there is no engine, or ``rounds`` is below 1.
    """
    require("engines", dict(engines), bool, "at least one engine by name")
    at_least(1, rounds=rounds)
    base = next(iter(engines.values()))
    wanted = base.answer(x)
    rows = {}
    for name, engine in engines.items():
        y = engine.answer(x)
        speed = compare_speed(lambda: base.answer(x), lambda e=engine: e.answer(x), rounds=rounds, device=x.device)  # type: ignore[misc]
        rows[name] = {
            "bytes": engine.bytes,
            "smaller": base.bytes / engine.bytes,
            "milliseconds": 1e3 * speed.b.median,
            "faster": speed.ratio,
            "low": speed.low,
            "high": speed.high,
            "difference": float((y - wanted).abs().max() / wanted.abs().max()),
            "same": float((y.argmax(-1) == wanted.argmax(-1)).double().mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def peak_bytes(path: str | Path, shape: Sequence[int], *, threads: int = 1) -> int:
    """Return the memory that loading an ONNX file and running one batch takes at the peak, in a process of its own.

    Bytes of physical memory above what the process held when ONNX Runtime was imported and the batch made. It takes the
    file, the weights as the engine has packed them, and the activations.

    Parameters
    ----------
    shape : of the batch, ``[N, ...]``.

    Raises
    ------
    ValueError : ``threads`` or a number in ``shape`` is below 1.
    OSError : the system has no ``/proc/self/status`` (only Linux has).
    """
    at_least(1, threads=threads)
    require("shape", tuple(shape), lambda sizes: sizes and min(sizes) >= 1, "numbers of at least 1, [N, ...]")
    if not Path("/proc/self/status").is_file():
        raise OSError("peak_bytes reads /proc/self/status, which only Linux has")
    command = [sys.executable, "-c", _CHILD, str(path), str(threads), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that runs {path} failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


# VmHWM is this program's own high-water mark; getrusage would count that of the process which started it
_CHILD = """
import sys
import numpy, onnxruntime

def kilobytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

path, threads, *shape = sys.argv[1:]
x = numpy.random.default_rng(0).standard_normal([int(size) for size in shape], dtype=numpy.float32)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = int(threads), 1, 3
before = kilobytes("VmRSS:")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: x})
print(1024 * max(kilobytes("VmHWM:") - before, 0))
"""


# --- Warnings ---------------------------------------------------------------------------------------------------------


@contextmanager
def _without_warnings(category: type[Warning], message: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield


@contextmanager
def _without_quantisation_warnings() -> Iterator[None]:
    """Without what torch says of its own int8: that torchao is its future, and how its observers will change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*torch.ao.quantization is deprecated", DeprecationWarning)
        for message in (".*quant_min and quant_max", ".*quantized tensor creation functions", ".*TypedStorage"):
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


@contextmanager
def _without_logging() -> Iterator[None]:
    """Without what ONNX Runtime's tools write to the root logger, such as that a norm's weight has no channels."""
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(was)
