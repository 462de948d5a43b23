"""The outputs of layers within a network, by name, while it runs.

``features(model, names)`` is a context: what the named layers give in the last pass within it stands in its dictionary.
A name is that of ``model.named_modules()`` (``"hidden.1"``, ``"stages.2"``; ``""`` is the network itself, its logits),
or ``"embedding"``: what goes into ``model.head``, for the networks of the laboratory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

EMBEDDING = "embedding"


@contextmanager
def features(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within it the outputs of the named layers are kept, as the network's last pass gave them.

    They hang on the graph: gradients flow from them back into the network. A layer that is called several times a pass
    keeps its last output. The network is otherwise as it was, within and after.

    Raises
    ------
    ValueError : the network has no layer of a name; or, in the pass, a layer's output is no tensor.
    """
    found: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:
            layer, before = _layer(model, name)
            if before:
                handles.append(layer.register_forward_pre_hook(partial(_keep_input, found, name)))
            else:
                handles.append(layer.register_forward_hook(partial(_keep_output, found, name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _layer(model: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The layer, and whether its input is meant."""
    parts = dict(model.named_modules())
    if name in parts:
        return parts[name], False
    if name == EMBEDDING and "head" in parts:
        return parts["head"], True
    known = ", ".join(repr(part) for part in [*parts][1:40]) or "none"
    more = f" or {EMBEDDING!r}" if "head" in parts else ""
    raise ValueError(f"layer={name!r}: must be one of {type(model).__name__}'s layers, {known}{more}")


def _keep_output(found: dict[str, Tensor], name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
    found[name] = _checked(name, output)


def _keep_input(found: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    found[name] = _checked(name, inputs[0])


def _checked(name: str, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"layer={name!r} gives {type(output).__name__}: must be a layer that gives one tensor")
    return output
