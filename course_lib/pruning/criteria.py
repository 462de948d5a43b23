"""Criteria: how much a weight matters. Each is ``(model, data) -> scores``; the weights with the lowest scores go.

====================  =============================================  ================================================
name                  score of a weight w with the gradient g        source
====================  =============================================  ================================================
``magnitude``         ``|w|``                                        Han et al. 2015, arXiv:1506.02626
``random_scores``     a random number: what the others must beat     Blalock et al. 2020, arXiv:2003.03033
``snip``              ``|g w|``, g of all data together              Lee et al. 2018, arXiv:1810.02340
``taylor``            ``(g w)^2``, g of a batch, mean over batches   Molchanov et al. 2019, arXiv:1906.10771
``movement``          ``-g w``, summed over steps of training        Sanh et al. 2020, arXiv:2005.07683
``obd``               ``h w^2 / 2``, h the second derivative         LeCun, Denker & Solla, NIPS 1989
``obs``               ``w^2 / (2 [H^-1]_qq)``, H of the layer        Hassibi & Stork, NIPS 1992
``wanda``             ``|w| ||x||``, x the input it multiplies       Sun et al. 2023, arXiv:2306.11695
====================  =============================================  ================================================

``obs_prune`` also corrects the weights that stay, one layer's matrix at a time (Frantar & Alistarh 2022,
arXiv:2208.11580); ``obs_prune_model`` does so for a whole network.

``data`` is a ``Split``, one batch ``(x, y)``, or several batches in a list. The model is never changed: criteria that
need gradients or activations work on a copy, in the mode (train or eval) that the model is in. A weight that is
pruned already counts as a weight of zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.data import Split, batches
from course_lib.lab.training import Objective, cross_entropy
from course_lib.pruning.masks import (
    Masks,
    apply_masks,
    get_masks,
    make_permanent,
    masked_parts,
    prunable_layers,
    weight_of,
)
from course_lib.pruning.patterns import Scores, checked_sparsity

Batch = tuple[Tensor, Tensor]
Data = Split | Batch | Sequence[Batch]
Criterion = Callable[[nn.Module, Any], Scores]
"""``(model, data) -> scores``; give other settings with ``functools.partial``."""

Layers = Iterable[str] | None

# --- The weights alone ------------------------------------------------------------------------------------------------


def magnitude(model: nn.Module, data: Data | None = None, *, layers: Layers = None) -> Scores:
    """Score each weight by its size, :math:`|w|`. ``data`` is not looked at."""
    return {name: weight_of(layer).detach().abs() for name, layer in prunable_layers(model, layers).items()}


def random_scores(
    model: nn.Module, data: Data | None = None, *, generator: torch.Generator, layers: Layers = None
) -> Scores:
    """Score each weight by chance, from -1 to 0. ``data`` is not looked at."""

    def draw(weight: Tensor) -> Tensor:
        drawn = torch.rand(weight.shape, generator=generator, dtype=weight.dtype, device=generator.device)
        # negative, so that the largest draws go, as in torch.nn.utils.prune.random_unstructured
        return -drawn.to(weight.device)

    return {name: draw(weight_of(layer)) for name, layer in prunable_layers(model, layers).items()}


# --- First order: the gradient ----------------------------------------------------------------------------------------


def snip(model: nn.Module, data: Data, *, objective: Objective = cross_entropy, layers: Layers = None) -> Scores:
    r"""Score by connection sensitivity, :math:`|g\,w|`, with the gradient g of the mean loss over all of ``data``.

    It is the gradient with respect to a gate that multiplies the weight: what closing the gate a little would change.
    Meant for a network that is not trained yet. The paper divides by the sum of all, which changes no order.
    """
    plain = _copy(model)
    weights = _weights(plain, layers)
    examples = _examples(plain, data, batch_size=256)
    count = sum(len(y) for _, y in examples)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, y in examples:
        for name, g in _gradients(objective(plain, x, y), weights).items():
            sums[name] += g * (len(y) / count)
    return {name: (g * weights[name].detach()).abs() for name, g in sums.items()}


def taylor(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 64,
    objective: Objective = cross_entropy,
    layers: Layers = None,
) -> Scores:
    r"""Score by the squared change of the loss to first order, :math:`(g\,w)^2`, averaged over batches.

    Setting w to zero changes a batch's loss by about :math:`-g\,w`. In a trained network the changes cancel between
    batches (the mean gradient is near zero), their squares do not. The score of a filter is the sum over its weights
    (``patterns.total``).
    """
    plain = _copy(model)
    weights = _weights(plain, layers)
    examples = _examples(plain, data, batch_size)
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, y in examples:
        for name, g in _gradients(objective(plain, x, y), weights).items():
            scores[name] += (g * weights[name].detach()).square() / len(examples)
    return scores


def movement(
    model: nn.Module,
    data: Data,
    *,
    lr: float = 0.01,
    epochs: int = 1,
    batch_size: int = 64,
    objective: Objective = cross_entropy,
    layers: Layers = None,
) -> Scores:
    r"""Score by the way a weight takes in a short training: :math:`S = -\sum_t g_t\,w_t`, high if it leaves zero.

    A copy of the model is trained by plain SGD for ``epochs`` passes in the order of ``data``. The paper's scores grow
    while the pruned network itself is trained; ``schedules.gradual`` with this criterion comes near to that.
    """
    if not lr > 0 or epochs < 1:
        raise ValueError(f"lr={lr}, epochs={epochs}: lr must be positive and epochs at least 1")
    plain = _copy(model)
    weights = _weights(plain, layers)
    optimizer = torch.optim.SGD(plain.parameters(), lr=lr)
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, y in _examples(plain, data, batch_size) * epochs:
        optimizer.zero_grad()
        objective(plain, x, y).backward()
        for name, w in weights.items():
            if w.grad is not None:
                scores[name] -= w.grad * w.detach()
        optimizer.step()
    return scores


# --- Second order: the curvature --------------------------------------------------------------------------------------


def obd(model: nn.Module, data: Data, *, batch_size: int = 32, layers: Layers = None) -> Scores:
    r"""Score by optimal brain damage, :math:`\tfrac12 h\,w^2`: the loss gained without w, at a minimum of the loss.

    The loss is the mean cross-entropy, and h the diagonal of its Gauss-Newton matrix. For a network of ReLUs (or of
    anything else that is piecewise linear) that *is* the second derivative with respect to w; for others it leaves out
    the curvature of the network itself, as the paper does too. It costs a backward pass an example and class.
    The model is taken in evaluation mode.
    """
    curvatures = gauss_newton_diagonal(model, data, batch_size=batch_size, layers=layers)
    found = prunable_layers(model, layers)
    return {name: 0.5 * h * weight_of(found[name]).detach().square() for name, h in curvatures.items()}


def gauss_newton_diagonal(model: nn.Module, data: Data, *, batch_size: int = 32, layers: Layers = None) -> Scores:
    r"""Return the diagonal of the Gauss-Newton matrix :math:`J^\top (\mathrm{diag}(p) - p p^\top) J` of each layer.

    J is the derivative of an example's logits, p its probabilities; the matrix is averaged over the examples. In the
    middle stands the second derivative of the cross-entropy, which no label enters. It is the square of
    :math:`R = \mathrm{diag}(\sqrt p) - p \sqrt p^\top`, so the diagonal is the sum of the squares of :math:`R^\top J`.
    """
    plain = _copy(model).eval()
    weights = {name: weight.detach() for name, weight in _weights(plain, layers).items()}
    rest = {name: value.detach() for name, value in [*plain.named_parameters(), *plain.named_buffers()]}

    def rooted_logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        state = rest | {f"{name}.weight" if name else "weight": weight for name, weight in weights.items()}
        logits = torch.func.functional_call(plain, state, (x[None],))[0]  # [K]
        root = logits.detach().softmax(0).sqrt()
        return root * (logits - (root.square() * logits).sum())  # R^T z

    per_example = torch.func.vmap(torch.func.jacrev(rooted_logits), in_dims=(None, 0))
    examples = _examples(plain, data, batch_size)
    count = sum(len(y) for _, y in examples)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, _ in examples:
        for name, jacobian in per_example(weights, x).items():  # [B, K, *weight.shape]
            sums[name] += jacobian.square().sum((0, 1)) / count
    return sums


def obs(model: nn.Module, data: Data, *, damping: float = 0.01, layers: Layers = None) -> Scores:
    r"""Score by optimal brain surgeon, layer by layer: the squared error of the layer's outputs that w's loss costs.

    .. math:: \frac{w_q^2}{2\,[H^{-1}]_{qq}}, \qquad H = X^\top X

    with the layer's inputs in the rows of X, if the other weights of the same output are corrected at once (which
    ``obs_prune`` does). Compare it within a layer: the scores of different layers count errors of different things.
    """
    inverses = {name: _inverse(gram, damping) for name, gram in _input_grams(model, data, layers).items()}
    found = prunable_layers(model, layers)

    def score(weight: Tensor, inverse: Tensor) -> Tensor:  # inverse: [G, I, I]
        rows = weight.flatten(1).unflatten(0, (len(inverse), -1))  # [G, outputs / G, I]
        return (rows.square() / (2 * inverse.diagonal(dim1=1, dim2=2)[:, None])).view(weight.shape)

    return {name: score(weight_of(found[name]).detach(), inverse) for name, inverse in inverses.items()}


def obs_prune(weight: Tensor, inputs: Tensor, sparsity: float, *, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    r"""Prune each row of a matrix one weight at a time, and correct the rest of the row after each.

    .. math::
        q = \arg\min_q \frac{w_q^2}{[H^{-1}]_{qq}}, \qquad
        w \leftarrow w - \frac{w_q}{[H^{-1}]_{qq}} H^{-1}_{:,q}, \qquad
        H^{-1} \leftarrow H^{-1} - \frac{H^{-1}_{:,q} H^{-1}_{q,:}}{[H^{-1}]_{qq}}

    What stays is then the least-squares fit to the old outputs that the weights left can reach.

    Parameters
    ----------
    weight : ``[outputs, inputs]``.
    inputs : what the layer saw, ``[examples, inputs]``.
    sparsity : ``round(sparsity * inputs)`` weights of each row go.
    damping : this part of the mean of H's diagonal is added to all of it, so that it can be inverted.

    Returns
    -------
    The new weight, with zeros, and the mask (bool), both in the shape of ``weight``.
    """
    if weight.ndim != 2 or inputs.ndim != 2 or weight.shape[1] != inputs.shape[1]:
        raise ValueError(
            f"inputs has the shape {tuple(inputs.shape)} beside a weight of {tuple(weight.shape)}: must be "
            "[examples, inputs] beside [outputs, inputs]"
        )
    return _obs_rows(weight, _inverse((inputs.mT @ inputs)[None], damping)[0], sparsity)


@torch.no_grad()
def _obs_rows(weight: Tensor, inverse: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """See ``obs_prune``; all rows at once, each with an inverse Hessian ``[inputs, inputs]`` of its own."""
    w, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    inverses = inverse.expand(len(w), -1, -1).clone()  # [outputs, inputs, inputs]
    rows = torch.arange(len(w), device=w.device)
    for _ in range(round(checked_sparsity(sparsity) * w.shape[1])):
        diagonal = inverses.diagonal(dim1=1, dim2=2)
        q = (w.square() / diagonal).masked_fill(~mask, torch.inf).argmin(1)
        column, pivot = inverses[rows, :, q], diagonal[rows, q][:, None].clone()  # [outputs, inputs], [outputs, 1]
        w -= w[rows, q][:, None] / pivot * column
        inverses -= column[:, :, None] * (column / pivot)[:, None, :]
        mask[rows, q] = False
        w[~mask] = 0  # exactly: rounding would leave traces
    return w, mask


def obs_prune_model(
    model: nn.Module, data: Data, *, sparsity: float, damping: float = 0.01, layers: Layers = None
) -> Masks:
    """Prune all layers in place by ``obs_prune``, each by the inputs that it had before. Returns the masks.

    A layer of ``I`` inputs and ``O`` outputs takes memory for ``O I^2`` numbers: meant for small layers.
    """
    checked_sparsity(sparsity)
    grams = _input_grams(model, data, layers)
    found = prunable_layers(model, layers)
    weights, masks = {}, {}
    for name, gram in grams.items():
        weight = weight_of(found[name]).detach()
        groups = weight.flatten(1).chunk(len(gram))
        parts = [_obs_rows(w, h, sparsity) for w, h in zip(groups, _inverse(gram, damping), strict=True)]
        weights[name] = torch.cat([w for w, _ in parts]).view(weight.shape)
        masks[name] = torch.cat([mask for _, mask in parts]).view(weight.shape)
    apply_masks(model, masks)
    with torch.no_grad():
        for name, weight in weights.items():
            masked_parts(found[name])[0].copy_(weight)
    return get_masks(model)


# --- Activations ------------------------------------------------------------------------------------------------------


def wanda(model: nn.Module, data: Data, *, layers: Layers = None) -> Scores:
    r"""Score by what the weight adds to its output at most, :math:`|w|\,\|x\|_2`, with the norm over all examples.

    The paper compares within each output (``patterns.per_row``). In a convolution each place of the kernel counts as
    an input of its own, and each position of the image as an example. The model is taken in evaluation mode.
    """
    squares = _input_statistics(model, data, layers, lambda x: x.square().sum(1))
    found = prunable_layers(model, layers)

    def score(weight: Tensor, square: Tensor) -> Tensor:  # square: [G, I]
        rows = weight.abs().flatten(1).unflatten(0, (len(square), -1))  # [G, outputs / G, I]
        return (rows * square.sqrt()[:, None]).view(weight.shape)

    return {name: score(weight_of(found[name]).detach(), square) for name, square in squares.items()}


# --- Inside: what layers see ------------------------------------------------------------------------------------------


def _input_grams(model: nn.Module, data: Data, layers: Layers) -> Mapping[str, Tensor]:
    """Return ``X^T X`` of each layer's inputs, ``[G, I, I]`` for its G groups."""
    return _input_statistics(model, data, layers, lambda x: x.mT @ x)


@torch.no_grad()
def _input_statistics(
    model: nn.Module, data: Data, layers: Layers, statistic: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sum a statistic of each layer's inputs ``[G, examples, I]`` over all batches, in evaluation mode."""
    plain = _copy(model).eval()
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found = statistic(_input_rows(layer, arguments[0]))
            sums[name] = sums[name] + found if name in sums else found

        return hook

    wanted = prunable_layers(plain, layers)
    for name, layer in wanted.items():
        layer.register_forward_pre_hook(watch(name))
    for x, _ in _examples(plain, data, batch_size=256):
        plain(x)
    unseen = [name for name in wanted if name not in sums]
    if unseen:
        raise ValueError(f"layers: {unseen[0]!r} is never called in the forward pass: must be left out")
    return {name: sums[name] for name in wanted}


def _input_rows(layer: Any, x: Tensor) -> Tensor:
    """Return all the vectors that a layer multiplies with its weight matrix: ``[G, examples, I]`` for its G groups."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    # The padding in the form that F.pad takes, which stands for every padding and padding mode of a convolution.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):  # an image of height one
        x, kernel, stride, dilation = x.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(x, kernel, stride=stride, dilation=dilation)  # [N, channels * places, positions]
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """Return the inverse of each ``[I, I]``, after adding to its diagonal."""
    if not damping >= 0:
        raise ValueError(f"damping={damping!r}: must be at least 0")
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    # an input that was always zero is harmless with any positive number there
    mean = torch.where(mean > 0, mean, 1)
    added = damping * mean[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + added)
    if bool(failed.any()):
        raise ValueError(f"damping={damping!r} leaves the inputs' Hessian singular: must be larger")
    return torch.cholesky_inverse(factor)


# --- Inside: copies, batches, gradients -------------------------------------------------------------------------------


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy without masks, whose pruned weights are ordinary zeros with a gradient."""
    plain = make_permanent(copy.deepcopy(model))
    for layer in prunable_layers(plain).values():
        weight_of(layer).requires_grad_(True)
    return plain


def _weights(model: nn.Module, layers: Layers) -> dict[str, Tensor]:
    return {name: weight_of(layer) for name, layer in prunable_layers(model, layers).items()}


def _gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, gradients, strict=True))


def _examples(model: nn.Module, data: Any, batch_size: int) -> list[Batch]:
    """Return the data in batches, on the device and in the type of the model's weights."""
    at_least(1, batch_size=batch_size)
    if data is None or (not isinstance(data, Split) and len(data) == 0):
        raise ValueError(f"data={data!r}: this criterion looks at examples; give a Split or a batch (x, y)")
    like = next(model.parameters())

    def ready() -> Iterator[Batch]:
        if isinstance(data, Split):
            yield from batches(data.to(like.device), batch_size, dtype=like.dtype)
        elif isinstance(data[0], Tensor):
            x, y = data
            yield from zip(x.split(batch_size), y.split(batch_size), strict=True)
        else:
            yield from data

    return [(x.to(like if x.is_floating_point() else like.device), y.to(like.device)) for x, y in ready()]
