"""How many bytes a network's forward passes leave for its backward passes: activations, counted as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Saved:
    """Count the bytes that are saved for backward within its ``with`` blocks, until the graph lets go of them.

    >>> saved = Saved(model.parameters())
    >>> with saved:
    ...     loss = model(x).sum()
    >>> saved.now, saved.peak

    Memory that several operations save counts once, ``apart`` (the parameters) not at all.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self._users: dict[int, int] = {}
        self._hooks: list[saved_tensors_hooks] = []

    def __enter__(self) -> Saved:
        hooks = saved_tensors_hooks(self._pack, lambda held: held.tensor)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)

    def hold(self, *tensors: Tensor) -> list[Held]:
        """Count tensors until the result goes."""
        return [self._pack(tensor) for tensor in tensors]

    def _pack(self, tensor: Tensor) -> Held:
        storage, held = tensor.untyped_storage(), Held(tensor)
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._apart or size == 0:
            return held
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._let_go, place, size)
        return held

    def _let_go(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.now -= size


class Held:
    """A saved tensor; the graph holds it, and lets it go after the backward pass."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
