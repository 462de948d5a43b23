"""Optimizers that treat every number of a network alike and alone: SGD, Adagrad, RMSprop, Adam, AdamW, Lion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.optimizers._method import Method, Params

# --- Weight decay, in its two forms ---------------------------------------------------------------------------------


def l2_penalty(theta: Tensor, g: Tensor, weight_decay: float) -> Tensor:
    r"""Return the gradient with that of the penalty :math:`\tfrac{\lambda}{2}\|\theta\|^2`: :math:`g+\lambda\theta`."""
    return g.add(theta, alpha=weight_decay) if weight_decay else g


def decay_weights(theta: Tensor, lr: float, weight_decay: float) -> None:
    r"""Shrink the weights, whatever the gradient: :math:`\theta \leftarrow (1-\eta\lambda)\,\theta`.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101.
    """
    if weight_decay:
        theta.mul_(1 - lr * weight_decay)


# --- SGD ------------------------------------------------------------------------------------------------------------


def gradient_descent(theta: Tensor, g: Tensor, *, lr: float) -> None:
    r"""Step against the gradient: :math:`\theta \leftarrow \theta - \eta g`."""
    theta.add_(g, alpha=-lr)


def heavy_ball(theta: Tensor, g: Tensor, b: Tensor, *, lr: float, momentum: float, dampening: float = 0.0) -> None:
    r"""Step along a running sum :math:`b` of gradients (Polyak 1964).

    .. math:: b \leftarrow \mu b + (1-\tau)\,g, \qquad \theta \leftarrow \theta - \eta b

    with momentum :math:`\mu` and dampening :math:`\tau`.
    """
    b.mul_(momentum).add_(g, alpha=1 - dampening)
    theta.add_(b, alpha=-lr)


def nesterov(theta: Tensor, g: Tensor, b: Tensor, *, lr: float, momentum: float) -> None:
    r"""Step along the running sum as it will be one step ahead, were the gradient to stay (Sutskever et al. 2013).

    .. math:: b \leftarrow \mu b + g, \qquad \theta \leftarrow \theta - \eta\,(g + \mu b)
    """
    b.mul_(momentum).add_(g)
    theta.add_(g.add(b, alpha=momentum), alpha=-lr)


class SGD(Method):
    """Stochastic gradient descent, plain, with momentum or with Nesterov momentum. Arguments as `torch.optim.SGD`."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "nesterov": nesterov, "maximize": maximize})

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov is True with momentum {group['momentum']!r} and dampening {group['dampening']!r}; "
                "it must have a momentum > 0 and a dampening of 0"
            )

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        g = l2_penalty(theta, g, group["weight_decay"])
        if not momentum:
            gradient_descent(theta, g, lr=lr)
        elif group["nesterov"]:
            nesterov(theta, g, state["momentum_buffer"], lr=lr, momentum=momentum)
        else:
            # As in torch, the first gradient enters whole: there is nothing yet to dampen it against.
            dampening = group["dampening"] if state["step"] > 1 else 0.0
            heavy_ball(theta, g, state["momentum_buffer"], lr=lr, momentum=momentum, dampening=dampening)


# --- Adagrad --------------------------------------------------------------------------------------------------------


def adagrad(theta: Tensor, g: Tensor, s: Tensor, *, lr: float, eps: float) -> None:
    r"""Divide by the root of the sum :math:`s` of all squared gradients (Duchi, Hazan & Singer 2011).

    .. math:: s \leftarrow s + g^2, \qquad \theta \leftarrow \theta - \eta\,\frac{g}{\sqrt{s} + \epsilon}
    """
    s.addcmul_(g, g)
    theta.addcdiv_(g, s.sqrt().add_(eps), value=-lr)


class Adagrad(Method):
    """A learning rate for each weight, smaller the more the weight has moved. Arguments as `torch.optim.Adagrad`."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps, "maximize": maximize}
        super().__init__(params, {**settings, "initial_accumulator_value": initial_accumulator_value})

    def prepare(self, state: dict[str, Any], theta: Tensor, group: dict[str, Any]) -> None:
        if "sum" not in state:
            state["sum"] = torch.full_like(theta, group["initial_accumulator_value"])

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = l2_penalty(theta, g, group["weight_decay"])
        lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
        adagrad(theta, g, state["sum"], lr=lr, eps=group["eps"])


# --- RMSprop --------------------------------------------------------------------------------------------------------


def root_mean_square(g: Tensor, v: Tensor, alpha: float) -> Tensor:
    r"""Return the running root mean square of the gradient: :math:`v \leftarrow \alpha v + (1-\alpha)g^2`, its root."""
    return v.mul_(alpha).addcmul_(g, g, value=1 - alpha).sqrt()


def standard_deviation(g: Tensor, v: Tensor, mean: Tensor, alpha: float) -> Tensor:
    r"""Return the running standard deviation of the gradient: :math:`\sqrt{v - \bar g^2}` of two running means."""
    v.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    mean.lerp_(g, 1 - alpha)
    return v.addcmul(mean, mean, value=-1).sqrt_()


def rmsprop(theta: Tensor, g: Tensor, scale: Tensor, *, lr: float) -> None:
    r"""Divide the gradient by its recent scale :math:`\sqrt{v}+\epsilon` (Tieleman & Hinton 2012).

    .. math:: \theta \leftarrow \theta - \eta\,\frac{g}{\sqrt{v} + \epsilon}
    """
    theta.addcdiv_(g, scale, value=-lr)


def rmsprop_momentum(theta: Tensor, g: Tensor, scale: Tensor, b: Tensor, *, lr: float, momentum: float) -> None:
    r"""Step along a running sum of rescaled gradients.

    .. math:: b \leftarrow \mu b + \frac{g}{\sqrt{v} + \epsilon}, \qquad \theta \leftarrow \theta - \eta b
    """
    b.mul_(momentum).addcdiv_(g, scale)
    theta.add_(b, alpha=-lr)


class RMSprop(Method):
    """Gradients divided by their recent scale. Arguments as `torch.optim.RMSprop`."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**settings, "centered": centered, "maximize": maximize})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        mean = ("grad_avg",) if group["centered"] else ()
        buffer = ("momentum_buffer",) if group["momentum"] else ()
        return ("square_avg", *mean, *buffer)

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = l2_penalty(theta, g, group["weight_decay"])
        v, alpha = state["square_avg"], group["alpha"]
        centered = group["centered"]
        scale = standard_deviation(g, v, state["grad_avg"], alpha) if centered else root_mean_square(g, v, alpha)
        scale.add_(group["eps"])
        if group["momentum"]:
            buffer = state["momentum_buffer"]
            rmsprop_momentum(theta, g, scale, buffer, lr=group["lr"], momentum=group["momentum"])
        else:
            rmsprop(theta, g, scale, lr=group["lr"])


# --- Adam, AMSGrad, AdamW -------------------------------------------------------------------------------------------


def adam(
    theta: Tensor, g: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, betas: tuple[float, float], eps: float
) -> None:
    r"""Step along the mean gradient, divided by its root mean square, both corrected for their start at zero.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2, \qquad
        \theta \leftarrow \theta - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)} + \epsilon}

    at step :math:`t = 1, 2, \dots` Source: Kingma & Ba 2014, arXiv:1412.6980, algorithm 1.
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    theta.addcdiv_(m, scale, value=-lr / (1 - beta1**step))


def amsgrad(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    r"""Take Adam's step with the largest :math:`v` so far: :math:`\hat v \leftarrow \max(\hat v, v)` in its place.

    As in torch, the bias is corrected after the maximum; the paper corrects none.
    Source: Reddi, Kale & Kumar 2018, arXiv:1904.09237.
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale = v_max.clamp_min_(v).sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    theta.addcdiv_(m, scale, value=-lr / (1 - beta1**step))


class Adam(Method):
    """Adaptive moment estimation, weight decay as an L2 penalty. Arguments as `torch.optim.Adam`."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "amsgrad": amsgrad, "maximize": maximize})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.adam_step(theta, l2_penalty(theta, g, group["weight_decay"]), state, group)

    def adam_step(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Take the step without any weight decay."""
        m, v = state["exp_avg"], state["exp_avg_sq"]
        settings = {"step": state["step"], "lr": group["lr"], "betas": group["betas"], "eps": group["eps"]}
        if group["amsgrad"]:
            amsgrad(theta, g, m, v, state["max_exp_avg_sq"], **settings)
        else:
            adam(theta, g, m, v, **settings)


class AdamW(Adam):
    """Adam with weight decay that the division does not touch. Arguments as `torch.optim.AdamW`."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decay_weights(theta, group["lr"], group["weight_decay"])
        self.adam_step(theta, g, state, group)


# --- Lion -----------------------------------------------------------------------------------------------------------


def lion(theta: Tensor, g: Tensor, m: Tensor, *, lr: float, betas: tuple[float, float]) -> None:
    r"""Step by the sign of an interpolation between momentum and gradient: every weight moves by exactly the rate.

    .. math::
        \theta \leftarrow \theta - \eta\,\mathrm{sign}\big(\beta_1 m + (1-\beta_1)\,g\big), \qquad
        m \leftarrow \beta_2 m + (1-\beta_2)\,g

    Source: Chen et al. 2023, arXiv:2302.06675.
    """
    beta1, beta2 = betas
    theta.add_(sign(m.lerp(g, 1 - beta1)), alpha=-lr)
    m.lerp_(g, 1 - beta2)


def sign(x: Tensor) -> Tensor:
    """Return the sign of each number; NaN where it is not finite, which ``torch.sign`` alone would hide."""
    return x.sign().add_(x.sub(x))


class Lion(Method):
    """Evolved sign momentum, with decoupled weight decay. Arguments as in the paper's own implementation.

    Its steps are larger than Adam's: the authors advise a rate 3 to 10 times smaller and a decay as much larger.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decay_weights(theta, group["lr"], group["weight_decay"])
        lion(theta, g, state["exp_avg"], lr=group["lr"], betas=group["betas"])
