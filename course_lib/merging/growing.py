r"""From a small network to a large one that begins where the small one ended.

=========================  ==============================================  ============================================
name                       what it does                                    source
=========================  ==============================================  ============================================
``wider``                  units more than once, what reads them divided   Chen, Goodfellow & Shlens 2015
                                                                           (Net2WiderNet), arXiv:1511.05641
``deeper``                 a layer more that passes on what it sees        Chen, Goodfellow & Shlens 2015
                                                                           (Net2DeeperNet)
``expand``                 a transformer of a multiple of the width        Chen et al. 2021 (bert2BERT),
                                                                           arXiv:2110.07143: FPI
``stack``                  trained layers twice in a row: another          Gong et al. 2019 (StackBERT), ICML, PMLR 97
                           function, but a good start
=========================  ==============================================  ============================================

The first three keep the function. Units that were copied have equal gradients as long as they are equal: ``wider`` has
``noise`` against that, and what is copied along with dropout is told apart by it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from course_lib.lab.arguments import at_least, require
from course_lib.lab.models import Attention, BasicBlock, ViT
from course_lib.lab.tracing import CONVOLUTIONS, TRANSPOSED, ChannelGroup, Inputs, Member
from course_lib.merging.alignment import example_of, permutation_groups
from course_lib.merging.sizes import answers, check_answers, put, recount
from course_lib.merging.states import check_not_negative, in_evaluation, parameters_of, state_of

# --- Wider ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def wider(
    model: nn.Module,
    group: str,
    width: int,
    *,
    generator: torch.Generator,
    noise: float = 0.0,
    example_input: Inputs | None = None,
) -> nn.Module:
    r"""Return the network with ``width`` units in a group: the old ones, and copies of some, drawn at random.

    With g(j) the old unit that unit j is, layers that make units have the rows :math:`U_j=W_{g(j)}`, and layers that
    read them the columns :math:`V_j=W_{g(j)}/|\{k:g(k)=g(j)\}|`. Norms are copied, statistics and all, so the function
    stays in training and in evaluation. ``group`` is a name of ``permutation_groups``; all layers of a residual stream
    are one. ``noise`` times the standard deviation of each weight tensor is then added to the rows of the copies.

    Raises
    ------
    ValueError : there is no such group, its units have several channels each (heads of attention), it has ``width``
        units already or more, or ``noise`` is negative.
    CannotShrink : the network cannot be followed, or computes something else when it is wider.
    """
    check_not_negative(noise=noise)
    example = example_of(model, example_input)
    groups = {found.name: found for found in permutation_groups(model, example)}
    require("group", group, lambda name: name in groups, f"one of {', '.join(groups)}")
    found = groups[group]
    if any(member.makes and member.indices.shape[1] != 1 for member in found.members):
        raise ValueError(f"group={group!r}: must be one whose units are one channel each")
    at_least(found.units + 1, width=width)
    added = torch.randint(found.units, (width - found.units,), generator=generator)
    counts = 1 + torch.bincount(added, minlength=found.units)
    wanted, made = answers(model, example), copy.deepcopy(model)
    names = parameters_of(made) | dict(made.named_buffers())
    for member in found.members:
        put(made, member.name, _copied(names[member.name], member, added, counts, _reads(made, member)))
        names = parameters_of(made) | dict(made.named_buffers())
    recount(made)
    check_answers(wanted, made, example, f"group={group!r}, width={width}")
    if noise:
        _add_noise(made, found, noise, generator)
    return made


def _reads(model: nn.Module, member: Member) -> bool:
    """Whether a member is the columns of a layer, which are summed over the units."""
    layer = model.get_submodule(member.layer)
    dense = isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
    return dense and member.parameter == "weight" and not member.makes


def _copied(value: Tensor, member: Member, added: Tensor, counts: Tensor, divide: bool) -> Tensor:
    """A member's tensor with the added units behind the old ones; divided by the counts where they are summed."""
    if divide:
        by = torch.ones(value.shape[member.dim], dtype=value.dtype)
        by[member.indices.flatten()] = counts.repeat_interleave(member.indices.shape[1]).to(value.dtype)
        value = value / by.to(value.device).view([-1 if d == member.dim else 1 for d in range(value.dim())])
    more = value.index_select(member.dim, member.indices[added].flatten().to(value.device))
    return torch.cat([value, more], member.dim)


def _add_noise(model: nn.Module, group: ChannelGroup, noise: float, generator: torch.Generator) -> None:
    weights = parameters_of(model)
    for member in group.members:
        if member.makes:
            rows = weights[member.name].narrow(
                member.dim, group.units, weights[member.name].shape[member.dim] - group.units
            )
            drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
            rows.add_(noise * weights[member.name].std() * drawn)


# --- Deeper -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def deeper(
    model: nn.Module, after: str, *, batch: Tensor | None = None, example_input: Inputs | None = None
) -> nn.Module:
    """Return the network with one more layer and ReLU behind the ReLU of that name: at first they change nothing.

    Behind features ``[N, C]`` (or tokens) it is a linear layer with the identity matrix, behind ``[N, C, H, W]`` a 3×3
    convolution with a 1 in the middle; ReLU lets through what a ReLU gave. With a ``batch`` of inputs the layer has
    batch norm, whose scale and shift undo what it does to this batch: the function then stays in evaluation, and in
    training on this batch; on others but nearly. The part of that name becomes an ``nn.Sequential``.

    Raises
    ------
    ValueError : there is no such part, it is neither an ``nn.ReLU`` nor a ``BasicBlock``, it is called more or less
        often than once a pass, or there is a ``batch`` and it gives tokens.
    """
    made = copy.deepcopy(model)
    parts = {name: part for name, part in made.named_modules() if isinstance(part, nn.ReLU | BasicBlock)}
    require("after", after, lambda name: name in parts, f"the name of a ReLU or a BasicBlock: {', '.join(parts)}")
    # a layer that is put in anew has the mode of the network and the type of what it sees
    seen = _outputs_of(made, after, example_of(made, example_input), training=False)
    if batch is not None and seen.dim() not in (2, 4):
        raise ValueError(
            f"batch: must be None behind {after!r}, which gives {list(seen.shape)}: no batch norm of tokens"
        )
    image, channels = seen.dim() == 4, seen.shape[1] if seen.dim() == 4 else seen.shape[-1]
    settings: dict[str, Any] = {"bias": batch is None, "device": seen.device, "dtype": seen.dtype}
    if image:
        layer: nn.Module = skip_init(nn.Conv2d, channels, channels, 3, padding=1, **settings)
        nn.init.dirac_(layer.weight)  # type: ignore[arg-type]
    else:
        layer = skip_init(nn.Linear, channels, channels, **settings)
        nn.init.eye_(layer.weight)  # type: ignore[arg-type]
    if batch is None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        inserted = [layer, nn.ReLU()]
    else:
        norm = _undone_norm(_outputs_of(made, after, batch.to(seen.device), training=True), image)
        inserted = [layer, norm, nn.ReLU()]
    made.set_submodule(after, nn.Sequential(parts[after], *inserted).train(parts[after].training))
    return made


def _outputs_of(model: nn.Module, name: str, inputs: Inputs, *, training: bool) -> Tensor:
    """What the part of that name gives, in a copy: statistics stay as they are."""
    work, found = copy.deepcopy(model), []
    work.get_submodule(name).register_forward_hook(lambda _part, _inputs, output: found.append(output))
    with in_evaluation(work):
        work.train(training)
        work(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    require("after", name, lambda _: len(found) == 1, f"a part that is called once a pass, not {len(found)} times")
    return found[0]


def _undone_norm(x: Tensor, image: bool) -> nn.Module:
    norm = (nn.BatchNorm2d if image else nn.BatchNorm1d)(x.shape[1], device=x.device, dtype=x.dtype)
    dims = (0, 2, 3) if image else (0,)
    mean, variance = x.mean(dims), x.var(dims, unbiased=False)
    norm.weight.copy_((variance + norm.eps).sqrt())
    for tensor, value in ((norm.bias, mean), (norm.running_mean, mean), (norm.running_var, variance)):
        assert tensor is not None
        tensor.copy_(value)
    return norm


# --- A transformer of a multiple of the width -------------------------------------------------------------------------


@torch.no_grad()
def expand(model: ViT, factor: int) -> ViT:
    """Return the transformer with ``factor`` times the width, heads and hidden units: each of them so many times.

    Rows are repeated, columns repeated and divided (function-preserving initialisation). Every number of the tokens is
    there equally often: that keeps the mean and variance that layer norm divides by, as no other multiple would.

    Raises
    ------
    ValueError : the network is no ``vit`` of the laboratory, or ``factor`` is below 2.
    """
    require("model", type(model).__name__, lambda _: isinstance(model, ViT), "a vit of the laboratory")
    at_least(2, factor=factor)
    made = copy.deepcopy(model)
    for name, value in state_of(model).items():
        put(made, name, _expanded(name, value, factor))
    for part in made.modules():
        if isinstance(part, Attention):
            part.heads *= factor  # as many numbers a head as before, so the scale of the scores stays
    recount(made)
    return made


def _expanded(name: str, value: Tensor, factor: int) -> Tensor:
    if name == "position":  # [tokens, width]: numbers of the tokens themselves
        return value.repeat(1, factor)
    if ".qkv." in name:  # rows: queries, keys, values, each sorted by head
        apart = value.unflatten(0, (3, -1))
        columns = [factor] if value.dim() == 2 else []
        return apart.repeat(1, factor, *columns).flatten(0, 1) / (factor if columns else 1)
    if name.startswith("head."):
        return value.repeat(1, factor) / factor if value.dim() == 2 else value
    if value.dim() == 2:
        return value.repeat(factor, factor) / factor
    return value.repeat(factor, *[1] * (value.dim() - 1))  # biases, norms, and the filters that see patches


# --- Twice the layers -------------------------------------------------------------------------------------------------


def stack(model: nn.Module, name: str, first: int = 0, *, example_input: Inputs | None = None) -> nn.Module:
    """Return the network in which the parts of an ``nn.Sequential`` from ``first`` on follow a second time, as copies.

    ``stack(model, "blocks")`` doubles a transformer; ``stack(model, "hidden", 2)`` an MLP behind its first layer, whose
    input has another size. It is another function: trained layers are a better start than random ones.

    Raises
    ------
    ValueError : there is no such ``nn.Sequential``, it has nothing from ``first`` on, or the parts cannot follow
        themselves.
    """
    made = copy.deepcopy(model)
    parts = {key: part for key, part in made.named_modules() if isinstance(part, nn.Sequential) and key}
    require("name", name, lambda key: key in parts, f"the name of an nn.Sequential: {', '.join(parts)}")
    at_least(0, first=first)
    repeated = [copy.deepcopy(part) for part in list(parts[name])[first:]]
    require("first", first, lambda _: bool(repeated), f"less than {len(parts[name])}, the parts of {name!r}")
    parts[name].extend(repeated)
    try:
        answers(made, example_of(model, example_input))
    except RuntimeError as error:
        raise ValueError(f"name={name!r}, first={first}: these parts cannot follow themselves: {error}") from error
    return made
