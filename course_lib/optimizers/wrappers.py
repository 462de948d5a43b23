"""Optimizers around another optimizer: SAM changes where the gradient is taken, Lookahead where the steps lead to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from course_lib.lab.arguments import require
from course_lib.optimizers._method import COUNT, FLAG, FRACTION, NON_NEGATIVE, Closure, refuse_sparse


class Wrapper(Optimizer):
    """An optimizer around ``base``, with which it shares parameter groups, so that a schedule reaches both."""

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise ValueError(f"base is {base!r}; it must be an optimizer, such as SGD(model.parameters(), lr=0.1)")
        self.base = base
        super().__init__(base.param_groups, base.defaults)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base, the very same list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        pass  # Optimizer.__init__ starts with a list of its own; there is only the base's here

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not any(param_group is known for known in self.base.param_groups):
            self.base.add_param_group(param_group)

    def parameters(self) -> list[Tensor]:
        """All parameters, group by group."""
        return [theta for group in self.param_groups for theta in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "base" not in state_dict:
            raise ValueError(
                f"state_dict has the keys {sorted(state_dict)}; it must also have 'base', the state of the wrapped "
                f"{type(self.base).__name__}"
            )
        self.base.load_state_dict(state_dict["base"])
        super().load_state_dict({name: part for name, part in state_dict.items() if name != "base"})

    def __getstate__(self) -> dict[str, Any]:
        # A schedule replaces `step` on the instance it drives; a copy must have its own.
        return {name: part for name, part in self.__dict__.items() if not name.startswith("_") and name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: part for name, part in state.items() if name != "param_groups"})


# --- SAM ------------------------------------------------------------------------------------------------------------


def sharpest_direction(thetas: list[Tensor], gradients: list[Tensor], rho: float) -> list[Tensor]:
    r"""Return the step of length :math:`\rho` up the gradient: :math:`\hat\epsilon = \rho\,g/\|g\|`.

    The norm is that of all gradients together. To first order, no other point at that distance has a higher loss.
    Source: Foret et al. 2020, arXiv:2010.01412.
    """
    scale = rho / get_total_norm(gradients).clamp(min=1e-12)  # a zero gradient leads nowhere
    return [g * scale.to(g) for g in gradients]


def adaptive_sharpest_direction(thetas: list[Tensor], gradients: list[Tensor], rho: float) -> list[Tensor]:
    r"""Return the same step with each weight measured in units of itself: :math:`\rho\,\theta^2 g/\|\theta g\|`.

    Rescaling one layer up and the next one down then changes nothing.
    Source: Kwon et al. 2021, arXiv:2102.11600.
    """
    norm = get_total_norm([theta * g for theta, g in zip(thetas, gradients, strict=True)])
    scale = rho / norm.clamp(min=1e-12)
    return [theta.square() * g * scale.to(g) for theta, g in zip(thetas, gradients, strict=True)]


class SAM(Wrapper):
    """Sharpness-aware minimisation: the base optimizer steps from here, with the gradient of the worst point nearby.

    ``SAM(SGD(model.parameters(), lr=0.1), rho=0.05)``. Each step costs two gradients. The closure is called twice and
    must zero the gradients, compute the loss, call ``backward`` and return the loss; the returned loss is that of the
    unperturbed weights. Running statistics (batch normalisation) see both passes. Without a closure, call
    `first_step`, compute the gradients anew, and call `second_step`.
    """

    def __init__(self, base: Optimizer, rho: float = 0.05, adaptive: bool = False) -> None:
        require("rho", rho, *NON_NEGATIVE)
        require("adaptive", adaptive, *FLAG)
        super().__init__(base)
        self.rho = rho
        self.adaptive = adaptive

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb to the sharpest point within ``rho``, with the gradients as they are; remember the way back."""
        thetas = [theta for theta in self.parameters() if theta.grad is not None]
        for theta in thetas:
            refuse_sparse(self, theta)
            self.state[theta]["weights"] = theta.clone()
        direction = adaptive_sharpest_direction if self.adaptive else sharpest_direction
        gradients = [theta.grad for theta in thetas if theta.grad is not None]
        for theta, climb in zip(thetas, direction(thetas, gradients, self.rho), strict=True):
            theta.add_(climb)

    @torch.no_grad()
    def go_back(self) -> None:
        """Undo `first_step`, to the last bit."""
        for theta in self.parameters():
            if theta in self.state:
                theta.copy_(self.state.pop(theta)["weights"])

    def second_step(self) -> None:
        """Go back, and let the base optimizer step with the gradients of the point left behind."""
        self.go_back()
        self.base.step()

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; the ``closure`` is called twice."""
        if closure is None:
            raise ValueError(
                "closure is None; SAM needs the gradient at two points: call step(closure), or first_step(), "
                "compute the gradients anew, and second_step()"
            )
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        try:
            with torch.enable_grad():
                closure()
        except BaseException:  # a run that is interrupted here must not keep the perturbed weights
            self.go_back()
            raise
        self.second_step()
        return loss


# --- Lookahead ------------------------------------------------------------------------------------------------------


def lookahead(theta: Tensor, phi: Tensor, alpha: float) -> None:
    r"""Move the slow weights part of the way to the fast ones, and start again from there.

    .. math:: \phi \leftarrow \phi + \alpha\,(\theta - \phi), \qquad \theta \leftarrow \phi

    Source: Zhang et al. 2019, arXiv:1907.08610.
    """
    theta.copy_(phi.lerp_(theta, alpha))


class Lookahead(Wrapper):
    """k steps forward, one step back: ``Lookahead(SGD(model.parameters(), lr=0.1), k=5, alpha=0.5)``.

    The base optimizer moves the fast weights, those of the network; every ``k`` steps they return to the slow ones,
    which have moved by ``alpha`` of the way. The base keeps its momentum.
    """

    def __init__(self, base: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        require("k", k, *COUNT)
        require("alpha", alpha, *FRACTION)
        super().__init__(base)
        self.k = k
        self.alpha = alpha

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step of the base optimizer, and every ``k`` of them one of the slow weights."""
        thetas = self.parameters()
        for theta in thetas:
            if theta not in self.state:
                self.state[theta] = {"slow_weights": theta.clone(), "step": 0}
        loss = self.base.step(closure)
        for theta in thetas:
            state = self.state[theta]
            state["step"] += 1
            if state["step"] % self.k == 0:
                lookahead(theta, state["slow_weights"], self.alpha)
        return loss
