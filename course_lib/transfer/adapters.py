r"""A few new numbers beside a network that stays as it is: adapters, low-rank updates, prompts.

=============================  ==================================================  ===================================
name                           what trains                                         source
=============================  ==================================================  ===================================
``with_adapters``              a narrow detour behind each branch of a             Houlsby et al. 2019,
                               transformer's blocks                                arXiv:1902.00751
``with_residual_adapters``     a 1x1 convolution behind each larger one            Rebuffi, Bilen & Vedaldi 2017,
                                                                                   arXiv:1705.08045
``lora``                       a product of two thin matrices beside a weight      Hu et al. 2021, arXiv:2106.09685
``rank_stabilised``            its scale, for large ranks                          Kalajdzievski 2023,
                                                                                   arXiv:2312.03732
``merged``                     nothing: low-rank updates and residual adapters
                               become part of the weights
``without_adapters``           nothing: the network as it was
``with_prompts``,              tokens that are put before an image's               Jia et al. 2022,
``with_deep_prompts``                                                              arXiv:2203.12119
=============================  ==================================================  ===================================

All return a copy that is frozen but for the new part and the head, and that at first (prompts aside) computes exactly
what the network computes. The network's own weights keep their names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from course_lib.lab.arguments import at_least
from course_lib.lab.models import EncoderBlock, ViT, freeze, thaw
from course_lib.merging.states import check_positive, home
from course_lib.transfer.parts import drawn_from, head_name, head_of


def _frozen_but_head(model: nn.Module) -> nn.Module:
    made = freeze(copy.deepcopy(model))
    thaw(head_of(made))
    return made


# --- Adapters ---------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    r"""The detour :math:`h+W_2\,\text{GELU}(W_1h+b_1)+b_2` through ``width`` numbers; at first :math:`W_2=b_2=0`.

    Houlsby et al. begin near zero; exactly zero begins at the very network.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(features, width), nn.GELU(), nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """``[…, features]`` to the same shape."""
        return h + self.up(self.act(self.down(h)))


def with_adapters(model: nn.Module, width: int, *, generator: torch.Generator) -> nn.Module:
    """Return a copy with a ``Bottleneck`` behind attention and MLP of each encoder block, before the addition.

    Adapters, layer norms and the head train, as in the paper.

    Raises
    ------
    ValueError : ``width`` is below 1, or the network has no encoder block of the laboratory's ``vit``, or has adapters.
    """
    at_least(1, width=width)
    _check_without("adapter", model)
    made = _frozen_but_head(model)
    blocks = [part for part in made.modules() if isinstance(part, EncoderBlock)]
    if not blocks:
        raise ValueError(f"model={type(model).__name__}: must have encoder blocks, as vit has")
    like = home(model)
    for block in blocks:
        size = block.attention.project.out_features
        with drawn_from(generator, like):
            behind, after = Bottleneck(size, width).to(like.device), Bottleneck(size, width).to(like.device)
        block.attention.add_module("adapter", behind.train(made.training))
        block.attention.register_forward_hook(_through_adapter)
        block.mlp.add_module("adapter", after.train(made.training))  # a Sequential runs it as its next step
    for part in made.modules():
        if isinstance(part, nn.LayerNorm):
            thaw(part)
    return made


def with_residual_adapters(model: nn.Module) -> nn.Module:
    r"""Return a copy in which each convolution larger than 1x1 is followed by :math:`h+A*h`, A a 1x1 convolution of 0.

    Adapters, batch norm (with its statistics: each task has its own) and the head train, as in the paper.

    Raises
    ------
    ValueError : the network has no convolution larger than 1x1, or has adapters.
    """
    _check_without("adapter", model)
    made = _frozen_but_head(model)
    found = [part for part in made.modules() if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    if not found:
        raise ValueError(f"model={type(model).__name__}: must have convolutions larger than 1x1")
    for part in found:
        like, channels = part.weight, part.out_channels
        adapter = torch.nn.utils.skip_init(
            nn.Conv2d, channels, channels, 1, bias=False, dtype=like.dtype, device=like.device
        )
        nn.init.zeros_(adapter.weight)
        part.add_module("adapter", adapter.train(made.training))
        part.register_forward_hook(_add_adapter)
    for norm in made.modules():
        if isinstance(norm, _BatchNorm):
            thaw(norm)
    return made


def _check_without(child: str, model: nn.Module) -> None:
    """Of one name there can be one: a second would take the first one's place, and its hook would count twice."""
    for name, part in model.named_modules():
        if child in part._modules:
            raise ValueError(
                f"model has {child!r} in {name!r} already: must be merged(model), or without_adapters(model), first"
            )


# Hooks and not wrappers: the network's weights keep their names, and copies and pickles keep functions of a module


def _through_adapter(part: Any, inputs: Any, output: Tensor) -> Tensor:
    return part.adapter(output)


def _add_adapter(part: Any, inputs: Any, output: Tensor) -> Tensor:
    return output + part.adapter(output)


def _add_low_rank(part: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + part.lora(inputs[0])


# --- Low-rank updates -------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    r"""The update :math:`\tfrac\alpha r\,BAx` of a linear layer or a convolution; A is drawn, B is 0 at first.

    For a convolution A is one of the same kernel into r channels, B a 1x1 convolution.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down: Any
        self.up: Any
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            size: Any = layer.kernel_size
            shape: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.down = nn.Conv2d(
                layer.in_channels, rank, size, padding_mode=layer.padding_mode, bias=False, **shape
            )  # fmt: skip
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input to what is added to its output."""
        return self.scale * self.up(self.down(x))

    def update(self) -> Tensor:
        r"""Return :math:`\tfrac\alpha r\,BA` as a matrix ``[out, in · kernel]``."""
        up, down = (part.weight.flatten(1) for part in (self.up, self.down))
        return self.scale * (up @ down)


def lora(
    model: nn.Module, rank: int, alpha: float, names: Sequence[str] = ("*",), *, generator: torch.Generator
) -> nn.Module:
    r"""Return a copy in which linear layers and convolutions have a low-rank update beside their weight: ``LowRank``.

    .. math:: h=Wx+\tfrac\alpha r\,BAx,\qquad B\in\mathbb R^{\text{out}\times r},\;A\in\mathbb R^{r\times\text{in}}

    A is drawn as the weights of such a layer are (``peft`` does so, too), B begins at 0. Updates and the head train.

    Parameters
    ----------
    names : patterns such as ``"*.qkv"`` or ``"stages.2.*"``, of which a layer's name must match one. The head, which
        trains anyway, never gets an update.

    Raises
    ------
    ValueError : ``rank`` is below 1, ``alpha`` not above 0, a pattern matches no layer, or a convolution has groups; or
        the network has updates already.
    """
    at_least(1, rank=rank)
    check_positive(alpha=alpha)
    _check_without("lora", model)
    made, head, like = _frozen_but_head(model), head_name(model), home(model)
    # exactly these classes: torch's attention reads the weights of its own kind of linear layer, and calls no hook
    layers = {n: part for n, part in made.named_modules() if type(part) in (nn.Linear, nn.Conv2d) and n != head}
    chosen = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in names)}
    for pattern in names or [""]:
        if not any(fnmatchcase(name, pattern) for name in layers):
            known = ", ".join(map(repr, layers)) or "none"
            raise ValueError(f"names={list(names)!r}: must be patterns of layers, and {pattern!r} fits none of {known}")
    for name, layer in layers.items():
        if name not in chosen:
            continue
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"names={list(names)!r}: must leave out {name!r}, a convolution of {layer.groups} groups")
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        with drawn_from(generator, like):
            update = LowRank(layer, rank, alpha)
        layer.add_module("lora", update.to(like.device).train(made.training))
        layer.register_forward_hook(_add_low_rank)
    return made


def rank_stabilised(alpha: float, rank: int) -> float:
    r"""Return the ``alpha`` with which ``lora``'s scale :math:`\alpha/r` becomes :math:`\alpha/\sqrt r`.

    With :math:`\alpha/r` the update shrinks as the rank grows, and a large rank learns no more than a small one.

    Raises
    ------
    ValueError : ``rank`` is below 1, or ``alpha`` not above 0.
    """
    at_least(1, rank=rank)
    check_positive(alpha=alpha)
    return alpha * math.sqrt(rank)


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    r"""Return a plain network with :math:`W+\tfrac\alpha rBA` for ``lora``, :math:`(I+A)W` for residual adapters.

    It computes the same (up to rounding) and costs what the network cost before. It is thawed: all of it can train.

    Raises
    ------
    ValueError : the network has neither, or has a ``Bottleneck``, which is no linear map.
    """
    made, found = copy.deepcopy(model), 0
    for part in made.modules():
        layer: Any = part
        if isinstance(layer._modules.get("lora"), LowRank):
            layer.weight += layer.lora.update().view_as(layer.weight)
            found += 1
        if isinstance(layer, nn.Conv2d) and "adapter" in layer._modules:
            mix: Any = layer.adapter
            rows = mix.weight.flatten(1)
            rows = rows + torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            layer.weight.copy_((rows @ layer.weight.flatten(1)).view_as(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(rows @ layer.bias)
            found += 1
        if isinstance(layer, Bottleneck):
            raise ValueError("model has a Bottleneck: must have linear adapters, GELU cannot be merged")
    if not found:
        raise ValueError(f"model={type(model).__name__}: must have low-rank updates or residual adapters")
    return thaw(_stripped(made))


def without_adapters(model: nn.Module) -> nn.Module:
    """Return a copy without adapters and low-rank updates: the network's own weights as they are. It is thawed."""
    return thaw(_stripped(copy.deepcopy(model)))


def _stripped(model: nn.Module) -> nn.Module:
    for part in model.modules():
        for child in ("lora", "adapter"):
            part._modules.pop(child, None)
        for key, hook in list(part._forward_hooks.items()):
            if hook in (_through_adapter, _add_adapter, _add_low_rank):
                del part._forward_hooks[key]
    return model


# --- Prompts ----------------------------------------------------------------------------------------------------------


class Prompted(nn.Module):
    """A frozen ``vit`` with ``prompts`` ``[layers, count, width]`` before an image's tokens.

    With one layer of prompts they enter the first block and go through all others; with as many as blocks each block
    gets its own in place of what the block before made of the last ones. The features are the mean over the image's
    own tokens. The laboratory's ``vit`` has no class token, which the paper reads instead.
    """

    def __init__(self, network: ViT, prompts: Tensor) -> None:
        super().__init__()
        self.network, self.prompts = network, nn.Parameter(prompts)

    @property
    def head(self) -> nn.Module:
        """The network's head, which trains."""
        return self.network.head

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, width]``."""
        network, (layers, count, _) = self.network, self.prompts.shape
        tokens = network.embed(x).flatten(2).transpose(1, 2) + network.position
        for place, block in enumerate(network.blocks):
            if place < layers:
                own = self.prompts[place].expand(len(x), -1, -1)
                tokens = torch.cat([own, tokens[:, count if place else 0 :]], 1)
            tokens = block(tokens)
        return network.norm(tokens)[:, count:].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, K]``."""
        return self.head(self.embedding(x))


def with_prompts(model: nn.Module, count: int, *, generator: torch.Generator) -> Prompted:
    r"""Return the network, a frozen copy, with ``count`` prompt tokens before the first block (VPT-shallow).

    They are drawn uniformly up to :math:`\pm\sqrt{6/(Cp^2+D)}`, as in the paper's code, for patches of C channels and
    p x p pixels and tokens of D numbers. Prompts and head train.

    Raises
    ------
    ValueError : ``count`` is below 1, or the network is no ``vit`` with a block.
    """
    return _prompted(model, 1, count, generator)


def with_deep_prompts(model: nn.Module, count: int, *, generator: torch.Generator) -> Prompted:
    """Return the network, a frozen copy, with ``count`` prompt tokens of its own for each block (VPT-deep).

    Otherwise as ``with_prompts``.
    """
    return _prompted(model, len(model.blocks) if isinstance(model, ViT) else 1, count, generator)


def _prompted(model: nn.Module, layers: int, count: int, generator: torch.Generator) -> Prompted:
    at_least(1, count=count)
    if not isinstance(model, ViT) or not len(model.blocks):
        raise ValueError(f"model={type(model).__name__}: must be a vit with a block")
    made = _frozen_but_head(model)
    assert isinstance(made, ViT)
    width, channels = made.position.shape[1], model.input_shape[0]
    bound = math.sqrt(6 / (channels * model.patch**2 + width))
    drawn = torch.rand(layers, count, width, generator=generator, dtype=torch.float64)
    return Prompted(made, ((2 * drawn - 1) * bound).to(made.position)).train(model.training)
