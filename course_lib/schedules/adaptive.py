r"""Rates that find themselves: optimizers that need no schedule, or no rate.

=====================  ==========================================================  ====================================
name                   how it works                                                source
=====================  ==========================================================  ====================================
``SGDHD``, ``AdamHD``  the rate itself follows its gradient                        Baydin et al. 2017, arXiv:1703.04782
``ScheduleFreeSGD``,   an average of the iterates in place of a rate that falls    Defazio et al. 2024,
``ScheduleFreeAdamW``                                                              arXiv:2405.15682
``Prodigy``            Adam whose rate is an estimate of the way to go             Mishchenko & Defazio 2023,
                                                                                   arXiv:2306.06101
=====================  ==========================================================  ====================================

As in chapter 2 each rule is a small function on tensors, in place, and the class keeps its state.

**Schedule-free in fit.** The method knows three points: z takes the steps, x is the average that is evaluated, and the
gradient is taken at y, between the two. Here the network holds *x between two steps and y only within one*: ``step``
goes to y, calls the closure, and comes back. So nobody has to switch modes: validations, ``keep``, checkpoints and the
network that remains see x. It needs ``step(closure)``, which ``fit`` gives. Statistics of batch norm are of y.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.optimizers import Method

Params = Any
Closure = Any

# --- Hypergradient descent --------------------------------------------------------------------------------------------


def hypergradient(g: list[Tensor], u: list[Tensor]) -> float:
    r"""Return the derivative of the loss by the rate of the step before, :math:`-g^\top u`.

    That step was :math:`\theta \leftarrow \theta - \eta\,u`, so moving the rate moves :math:`\theta` along -u, and the
    loss by :math:`-g^\top u` with the gradient g at the new place. The rate grows while gradients keep their direction.
    Source: Baydin et al. 2017, arXiv:1703.04782.
    """
    return -sum(torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(g, u, strict=True))


def adam_update(g: Tensor, m: Tensor, v: Tensor, *, step: int, betas: tuple[float, float], eps: float) -> Tensor:
    r"""Return Adam's step for a rate of 1, :math:`\hat m/(\sqrt{\hat v} + \epsilon)`; m and v are updated."""
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return (m / (1 - beta1**step)).div_((v / (1 - beta2**step)).sqrt_().add_(eps))


class Hypergradient(Method):
    """An optimizer whose rate takes a step of its own first: ``lr <- lr - hyper_lr * hypergradient``.

    Each group has its own rate, which stands in ``group["lr"]`` (and so in ``history.rates``); a schedule would
    overwrite it. Nothing keeps the rate above zero, as in the paper: with a ``hyper_lr`` that is too large it swings.
    """

    def __init__(self, params: Params, settings: dict[str, Any]) -> None:
        require("hyper_lr", settings["hyper_lr"], lambda x: is_number(x) and x >= 0, "a finite number >= 0")
        super().__init__(params, settings)

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the step for a rate of 1."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Move the rate of each group, then its parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            thetas = [theta for theta in group["params"] if theta.grad is not None]
            gradients = [theta.grad for theta in thetas]
            before = [self.state[theta].get("update", torch.zeros_like(theta)) for theta in thetas]
            group["lr"] = group["lr"] - group["hyper_lr"] * hypergradient(gradients, before)
            for theta, g in zip(thetas, gradients, strict=True):
                state = self.state[theta]
                self.prepare(state, theta, group)
                state["step"] = state.get("step", 0) + 1
                state["update"] = self.direction(g, state, group)
                theta.add_(state["update"], alpha=-group["lr"])
        return loss


class SGDHD(Hypergradient):
    r"""SGD with hypergradient descent: :math:`\eta \leftarrow \eta + \beta\,g_t^\top g_{t-1}`, then an SGD step.

    ``hyper_lr`` is the paper's :math:`\beta`. Source: Baydin et al. 2017, arXiv:1703.04782.
    """

    def __init__(self, params: Params, lr: float = 1e-3, hyper_lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "hyper_lr": hyper_lr})

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return g.clone()


class AdamHD(Hypergradient):
    r"""Adam with hypergradient descent: the rate grows with :math:`g_t^\top u_{t-1}`, u being Adam's last step.

    Source: Baydin et al. 2017, arXiv:1703.04782.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        hyper_lr: float = 1e-7,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "hyper_lr": hyper_lr, "betas": betas, "eps": eps})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        return adam_update(g, m, v, step=state["step"], betas=group["betas"], eps=group["eps"])


# --- Schedule-free ----------------------------------------------------------------------------------------------------


def gradient_point(x: Tensor, z: Tensor, beta: float) -> Tensor:
    r"""Return where the gradient is taken: :math:`y = (1-\beta)\,z + \beta\,x`."""
    return z.lerp(x, beta)


def averaged_step(x: Tensor, z: Tensor, u: Tensor, *, lr: float, c: float) -> None:
    r"""Take a step with z, and move the average x towards it.

    .. math:: z \leftarrow z - \gamma u, \qquad x \leftarrow (1-c)\,x + c\,z

    u is the gradient at y, or what Adam makes of it. With :math:`c = 1/t` x is the plain mean of all z.
    Source: Defazio et al. 2024, arXiv:2405.15682.
    """
    z.sub_(u, alpha=lr)
    x.lerp_(z, c)


class ScheduleFree(Method):
    """See ``ScheduleFreeSGD`` and ``ScheduleFreeAdamW``; the network holds x but for the time of the closure."""

    def __init__(self, params: Params, settings: dict[str, Any]) -> None:
        at_least(0, warmup_steps=settings["warmup_steps"])
        super().__init__(params, {**settings, "steps": 0, "highest_lr": 0.0, "weight_sum": 0.0})

    def beta(self, group: dict[str, Any]) -> float:
        """Return how much of y is x."""
        raise NotImplementedError

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the step of z for a rate of 1."""
        return g

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require("momentum or betas[0]", self.beta(group), lambda x: 0 < x < 1, "above 0 and below 1")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; the ``closure`` is called once, with the network at y.

        Raises
        ------
        ValueError : there is no closure.
        """
        if closure is None:
            raise ValueError("closure is None; the gradient must be taken elsewhere than at the weights: step(closure)")
        kept: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for theta in group["params"]:
                if theta in self.state:  # before the first step x, y and z are one
                    kept[theta] = theta.clone()
                    theta.copy_(gradient_point(theta, self.state[theta]["z"], self.beta(group)))
        gradients: list[Tensor] = []
        try:
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for theta in group["params"]:
                    if theta.grad is not None:
                        decay = group["weight_decay"]
                        self._prepare(theta, group)
                        u = self.direction(theta.grad, self.state[theta], group)
                        gradients.append(u.add(theta, alpha=decay) if decay else u)  # the decay of y, as in the paper
        finally:  # a run that is interrupted here must not keep y
            for theta, x in kept.items():
                theta.copy_(x)
        remaining = iter(gradients)
        for group in self.param_groups:
            lr, c = self._rate_and_weight(group)
            for theta in group["params"]:
                if theta.grad is not None:
                    averaged_step(theta, self.state[theta]["z"], next(remaining), lr=lr, c=c)
        return loss

    def _prepare(self, theta: Tensor, group: dict[str, Any]) -> None:
        state = self.state[theta]
        if "z" not in state:
            state["z"] = theta.clone()
        self.prepare(state, theta, group)
        state["step"] = state.get("step", 0) + 1

    def _rate_and_weight(self, group: dict[str, Any]) -> tuple[float, float]:
        """The step's rate, and the part of x that it replaces: by the squares of the highest rates so far."""
        group["steps"] += 1
        lr = group["lr"] * min(1.0, group["steps"] / max(1, group["warmup_steps"]))
        group["highest_lr"] = max(group["highest_lr"], lr)
        weight = group["highest_lr"] ** 2
        group["weight_sum"] += weight
        return lr, weight / group["weight_sum"] if group["weight_sum"] else 0.0


class ScheduleFreeSGD(ScheduleFree):
    """SGD that averages its iterates so well that its rate need not fall: no schedule, no end to be known.

    ``lr`` and ``warmup_steps`` (a straight line up) are for z, ``momentum`` is how much of y is x. Rates are larger
    than those of SGD with momentum: 1 is usual. Source: Defazio et al. 2024, arXiv:2405.15682.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        super().__init__(params, settings)

    def beta(self, group: dict[str, Any]) -> float:
        return group["momentum"]


class ScheduleFreeAdamW(ScheduleFree):
    """The same around Adam's division: ``betas[0]`` is how much of y is x, there is no other momentum.

    Source: Defazio et al. 2024, arXiv:2405.15682.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        eps: float = 1e-8,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "warmup_steps": warmup_steps, "eps": eps}
        super().__init__(params, settings)

    def beta(self, group: dict[str, Any]) -> float:
        return group["betas"][0]

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg_sq",)

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        v, beta2 = state["exp_avg_sq"], group["betas"][1]
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return g / (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])


# --- Prodigy ----------------------------------------------------------------------------------------------------------


def distance_terms(
    g: Tensor, theta: Tensor, theta0: Tensor, s: Tensor, *, d: float, d0: float, lr: float, beta3: float
) -> tuple[float, float]:
    r"""Update s, and return what one parameter adds to the numerator and to the denominator of the estimate.

    .. math::
        s \leftarrow \beta_3 s + \frac{d}{d_0}\,\eta d\,g, \qquad
        \hat d = \frac{\sum_t \beta_3^{T-t}\,\frac{d_t}{d_0}\,\eta_t d_t\; g_t^\top(\theta_0 - \theta_t)}{\|s\|_1}

    For a convex loss :math:`g^\top(\theta_0 - \theta)` can only be large if the minimum is far from :math:`\theta_0`,
    so the fraction is a lower bound for that distance. Source: Mishchenko & Defazio 2023, arXiv:2306.06101.
    """
    s.mul_(beta3).add_(g, alpha=d / d0 * d * lr)
    return d / d0 * d * lr * torch.dot(g.flatten(), (theta0 - theta).flatten()).item(), s.abs().sum().item()


def prodigy(theta: Tensor, m: Tensor, v: Tensor, *, lr: float, d: float, new_d: float, eps: float) -> None:
    r"""Step as Adam, its averages being of d times the gradients.

    .. math:: \theta \leftarrow \theta - \eta d\,\frac{m}{\sqrt v + d \epsilon}

    The rate is that of the d before, the floor of the divisor that of the new one, as in the authors' own code.
    """
    theta.addcdiv_(m, v.sqrt().add_(new_d * eps), value=-d * lr)


class Prodigy(Method):
    """Adam whose rate is an estimate d of the distance from the start to the solution: leave ``lr`` at 1.

    d starts at ``d0`` and never falls; a schedule may multiply ``lr``. All groups share one d, which stands in
    ``group["d"]``. ``weight_decay`` is outside the division, as in AdamW. Moments are not corrected for their start.
    Source: Mishchenko & Defazio 2023, arXiv:2306.06101, in the form of their code.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
    ) -> None:
        for name, value in {"d0": d0, "d_coef": d_coef}.items():
            require(name, value, lambda x: is_number(x) and x > 0, "a finite number > 0")
        usual = "None (the root of betas[1]), or a number >= 0 and < 1"
        require("beta3", beta3, lambda x: x is None or (is_number(x) and 0 <= x < 1), usual)
        settings = {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "d0": d0, "d_coef": d_coef, "d": d0, "numerator": 0.0})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "s")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Estimate the distance anew from all parameters, then move them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shared = self.param_groups[0]
        d, d0 = shared["d"], shared["d0"]
        beta3 = math.sqrt(shared["betas"][1]) if shared["beta3"] is None else shared["beta3"]
        numerator, denominator = beta3 * shared["numerator"], 0.0
        moved = [(theta, group) for group in self.param_groups for theta in group["params"] if theta.grad is not None]
        for theta, group in moved:
            state, g = self.state[theta], theta.grad
            if "start" not in state:
                state["start"] = theta.clone()
            self.prepare(state, theta, group)
            beta1, beta2 = group["betas"]
            state["exp_avg"].mul_(beta1).add_(g, alpha=d * (1 - beta1))
            state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=d * d * (1 - beta2))
            more, size = distance_terms(g, theta, state["start"], state["s"], d=d, d0=d0, lr=group["lr"], beta3=beta3)
            numerator, denominator = numerator + more, denominator + size
        if denominator == 0:  # no gradient yet: nothing to learn from, nowhere to go
            return loss
        new_d = max(d, shared["d_coef"] * numerator / denominator)
        for group in self.param_groups:
            group["d"], group["numerator"] = new_d, numerator
        for theta, group in moved:
            state = self.state[theta]
            theta.mul_(1 - group["weight_decay"] * d * group["lr"])
            prodigy(
                theta,
                state["exp_avg"],
                state["exp_avg_sq"],
                lr=group["lr"],
                d=d,
                new_d=new_d,
                eps=group["eps"],
            )
        return loss
