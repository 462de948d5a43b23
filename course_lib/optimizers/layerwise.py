"""Optimizers that look at a tensor as a whole: LAMB at its norm, Muon at its singular values, Shampoo at both sides."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from course_lib.optimizers._method import Method, Params
from course_lib.optimizers.elementwise import decay_weights, l2_penalty

# --- LAMB -----------------------------------------------------------------------------------------------------------


def adam_direction(g: Tensor, m: Tensor, v: Tensor, *, step: int, betas: tuple[float, float], eps: float) -> Tensor:
    r"""Return the direction of Adam's step: :math:`r = \hat m / (\sqrt{\hat v} + \epsilon)`, bias corrected."""
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m.div(1 - beta1**step).div_(v.div(1 - beta2**step).sqrt_().add_(eps))


def trust_ratio(theta: Tensor, u: Tensor) -> Tensor:
    r"""Return :math:`\|\theta\| / \|u\|`, a 0-dimensional tensor; 1 where either norm is zero."""
    weights, update = theta.norm(), u.norm()
    return torch.where((weights > 0) & (update > 0), weights / update, 1.0)


def lamb(theta: Tensor, r: Tensor, *, lr: float, weight_decay: float) -> None:
    r"""Step along Adam's direction :math:`r`, by a length in proportion to the norm of the layer's weights.

    .. math::
        u = r + \lambda\theta, \qquad \theta \leftarrow \theta - \eta\,\frac{\|\theta\|}{\|u\|}\,u

    Source: You et al. 2019, arXiv:1904.00962, with the identity as its :math:`\phi`.
    """
    u = l2_penalty(theta, r, weight_decay)
    theta.sub_(lr * trust_ratio(theta, u) * u)


class LAMB(Method):
    """Layer-wise adaptive moments, for large batches."""

    sees_whole_tensors = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        r = adam_direction(g, m, v, step=state["step"], betas=group["betas"], eps=group["eps"])
        lamb(theta, r, lr=group["lr"], weight_decay=group["weight_decay"])


# --- Muon -----------------------------------------------------------------------------------------------------------

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Chosen by Jordan et al. for the steepest slope at 0 that still keeps all singular values near 1."""


def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    r"""Bring all singular values of a matrix near 1, and leave its singular vectors: :math:`USV^T \to \approx UV^T`.

    .. math:: X \leftarrow aX + \big(bA + cA^2\big)X \quad\text{with}\quad A = XX^T, \quad X_0 = M/\|M\|_F

    Each round maps every singular value :math:`\sigma` to :math:`a\sigma + b\sigma^3 + c\sigma^5`; after five rounds
    of the default coefficients all that were not tiny lie between about 0.7 and 1.2. It takes nothing but products
    of matrices, in bfloat16: what a GPU does best, as a singular value decomposition is not.

    Returns a tensor of the same shape [A, B] in ``dtype``.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; it must have 2 dimensions")
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    X = matrix.to(dtype)
    X = X.T if tall else X  # the smaller side first: A is then as small as it can be
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=b, alpha=c)  # b A + c A², rounded once
        X = torch.addmm(X, B, X, beta=a)  # a X + B X
    return X.T if tall else X


def muon(theta: Tensor, g: Tensor, b: Tensor, *, lr: float, momentum: float, nesterov: bool, **newton: Any) -> None:
    r"""Step along the orthogonalised momentum (:math:`b`, or :math:`(1-\mu)g+\mu b` with Nesterov's look ahead).

    .. math:: b \leftarrow \mu b + (1-\mu)\,g, \qquad \theta \leftarrow \theta - \eta\,\mathrm{NewtonSchulz}(b)

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    b.lerp_(g, 1 - momentum)
    theta.add_(newton_schulz(g.lerp(b, momentum) if nesterov else b, **newton), alpha=-lr)


def shape_factor(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    r"""Return what the rate is multiplied with, so that matrices of all shapes move alike.

    ``"original"`` (and None): :math:`\sqrt{\max(1, A/B)}`; ``"match_rms_adamw"``: :math:`0.2\sqrt{\max(A, B)}`, which
    gives the step the size of AdamW's (Liu et al. 2025, arXiv:2502.16982).
    """
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


class Muon(Method):
    """Momentum, orthogonalised, for the matrices inside a network. Arguments as `torch.optim.Muon`.

    Takes 2-dimensional parameters only. Give biases, gains, embeddings and the last layer to AdamW. The
    attribute ``dtype``, which torch does not have, is that of the orthogonalisation: processors round bfloat16
    differently.
    """

    sees_whole_tensors = True
    dtype: torch.dtype = torch.bfloat16

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        newton = {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps}
        super().__init__(params, {**settings, **newton, "adjust_lr_fn": adjust_lr_fn})

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        for theta in group["params"]:
            if theta.ndim != 2:
                raise ValueError(
                    f"params holds a tensor of shape {tuple(theta.shape)}; Muon takes tensors of 2 dimensions only "
                    "(give the others to AdamW)"
                )

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decay_weights(theta, group["lr"], group["weight_decay"])
        muon(
            theta,
            g,
            state["momentum_buffer"],
            lr=group["lr"] * shape_factor(theta.shape, group["adjust_lr_fn"]),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            eps=group["eps"],
            dtype=self.dtype,
        )


# --- Shampoo --------------------------------------------------------------------------------------------------------


def unfolded_gram(g: Tensor, dim: int) -> Tensor:
    r"""Return :math:`G_{(i)} G_{(i)}^T`, how the slices of a tensor along one of its dimensions correlate: [n, n]."""
    unfolded = g.movedim(dim, 0).flatten(1) if g.ndim > 1 else g[:, None]  # [n, everything else]
    return unfolded @ unfolded.T


def unfolded_squares(g: Tensor, dim: int) -> Tensor:
    """Return the diagonal of `unfolded_gram` alone: [n]."""
    return g.square().movedim(dim, 0).reshape(g.shape[dim], -1).sum(dim=1)


def inverse_root(H: Tensor, order: int, eps: float) -> Tensor:
    r"""Return :math:`H^{-1/\text{order}}` of a positive matrix [n, n], or of a diagonal given as [n].

    Eigenvalues below ``eps``, which only rounding can have made, count as ``eps``.
    """
    if H.ndim == 1:
        return H.clamp(min=eps) ** (-1 / order)
    if not H.isfinite().all():
        return torch.full_like(H, math.nan)  # as every other rule does, where eigh would raise
    eigenvalues, Q = torch.linalg.eigh(H)
    return (Q * eigenvalues.clamp(min=eps) ** (-1 / order)) @ Q.T


def precondition(g: Tensor, roots: list[Tensor]) -> Tensor:
    r"""Multiply a tensor with a symmetric matrix along each of its dimensions: for a matrix, :math:`L\,G\,R`."""
    for dim, root in enumerate(roots):
        g = g.movedim(dim, -1)
        g = (g * root if root.ndim == 1 else g @ root).movedim(-1, dim)
    return g


class Shampoo(Method):
    r"""A preconditioner for each dimension of each tensor, from the covariance of all gradients so far.

    For a tensor of :math:`k` dimensions

    .. math:: H_i \leftarrow H_i + G_{(i)} G_{(i)}^T, \qquad
        \theta \leftarrow \theta - \eta\; G \times_1 H_1^{-1/2k} \cdots \times_k H_k^{-1/2k}

    from :math:`H_i = \epsilon I`; a matrix thus becomes :math:`L^{-1/4} G R^{-1/4}`.

    Parameters
    ----------
    momentum
        Heavy-ball momentum on the preconditioned gradient.
    weight_decay
        An L2 penalty.
    matrix_eps
        The :math:`\epsilon` above.
    precondition_frequency
        The roots are computed anew every so many steps; the covariance is updated at every step.
    max_precondition_dim
        Along a longer dimension only the diagonal of the covariance is kept.

    Source: Gupta, Koren & Singer 2018, arXiv:1802.09568.
    """

    sees_whole_tensors = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        matrix_eps: float = 1e-6,
        precondition_frequency: int = 1,
        max_precondition_dim: int = 1024,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrix_eps": matrix_eps}
        roots = {"precondition_frequency": precondition_frequency, "max_precondition_dim": max_precondition_dim}
        super().__init__(params, {**settings, **roots})

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def prepare(self, state: dict[str, Any], theta: Tensor, group: dict[str, Any]) -> None:
        super().prepare(state, theta, group)
        if "statistics" not in state:
            eps, limit = group["matrix_eps"], group["max_precondition_dim"]
            # A sum over thousands of steps stands still in bfloat16: its statistics are float32.
            dtype = torch.promote_types(theta.dtype, torch.float32)
            identities = [torch.eye(n) if n <= limit else torch.ones(n) for n in theta.shape or (1,)]
            state["statistics"] = [eps * identity.to(theta.device, dtype) for identity in identities]
            state["inverse_roots"] = [torch.zeros_like(H) for H in state["statistics"]]

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = l2_penalty(theta, g, group["weight_decay"])
        statistics, roots = state["statistics"], state["inverse_roots"]
        G = g.reshape(theta.shape or (1,)).to(statistics[0].dtype)
        for dim, H in enumerate(statistics):
            H.add_(unfolded_gram(G, dim) if H.ndim == 2 else unfolded_squares(G, dim))
        if (state["step"] - 1) % group["precondition_frequency"] == 0:
            for H, root in zip(statistics, roots, strict=True):
                root.copy_(inverse_root(H, 2 * G.ndim, group["matrix_eps"]))
        direction = precondition(G, roots).reshape(theta.shape).to(theta.dtype)
        if group["momentum"]:
            direction = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
        theta.add_(direction, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch rounds loaded state to the dtype of the parameters; the statistics keep their own.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [theta for group in self.param_groups for theta in group["params"]]
        for index, theta in zip(indices, params, strict=True):
            for name in ("statistics", "inverse_roots"):
                saved = state_dict["state"].get(index, {}).get(name, [])
                if saved:
                    self.state[theta][name] = [H.detach().clone().to(theta.device) for H in saved]
