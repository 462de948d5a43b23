r"""Objectives that ask the student for the teacher's logits: soft targets and what came of them.

=====================  =====================================================  =========================================
name                   what it asks for                                       source
=====================  =====================================================  =========================================
``soft_targets``       the teacher's probabilities at a high temperature      Hinton, Vinyals & Dean 2015,
                                                                              arXiv:1503.02531
``match_logits``       its logits, by the squared error                       Ba & Caruana 2013, arXiv:1312.6184
``decoupled``          how sure it is of the label, and what it thinks of     Zhao et al. 2022, arXiv:2203.08679
                       the other classes, each with a weight of its own
``standardized``       its logits' order and proportions, not their size      Sun et al. 2024, arXiv:2403.01427
``labelled_only``      the label, where there is one
=====================  =====================================================  =========================================

Each is an objective around another, ``Recipe(objective=partial(soft_targets, teacher=frozen(teacher)))``, and has its
loss as a function of logits ``[N, K]`` beside it. Labels ``y`` are int64 ``[N]``, -100 where there is none, or
probabilities ``[N, K]``; only ``decoupled`` needs positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib.distillation.lessons import Teacher, lesson
from course_lib.lab.training import Inputs, Objective, cross_entropy
from course_lib.regularization.consistency import kl_divergence
from course_lib.regularization.drawing import check_chance, check_not_negative, check_positive
from course_lib.regularization.passes import Seen

UNLABELLED = -100
"""The label of an example that has none: what ``F.cross_entropy`` leaves out."""


def exact(logits: Tensor) -> Tensor:
    """Logits in float32 at least: a divergence of two nearly equal distributions in bfloat16 is rounding alone."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


# --- Soft targets -----------------------------------------------------------------------------------------------------


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return :math:`T^2\,\tfrac1N\sum_i\text{KL}\big(p^T_i\,\|\,q^T_i\big)`, with :math:`p^T=\text{softmax}(v/T)`.

    v are the teacher's logits, and :math:`q^T` is the same of the student's z. Its gradient for z is
    :math:`T(q^T-p^T)/N`, which keeps its size as T grows: that is what :math:`T^2` is for.

    Raises
    ------
    ValueError : ``temperature`` is no number above 0.
    """
    check_positive(temperature=temperature)
    z, v = exact(student_logits) / temperature, exact(teacher_logits) / temperature
    return temperature**2 * kl_divergence(v, z).mean()


def soft_targets(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    temperature: float = 4.0,
    mix: float = 0.9,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return :math:`(1-\lambda)` of the objective and :math:`\lambda` (``mix``) of the soft loss.

    At ``mix=1`` the objective is not computed, and the labels are not looked at.

    Raises
    ------
    ValueError : ``temperature`` is no number above 0, ``mix`` none from 0 to 1; or the teacher is in training mode or
        has another number of classes.
    """
    check_positive(temperature=temperature)
    check_chance(mix=mix)
    seen = lesson(model, x, objective, teacher=teacher)
    soft = soft_loss(seen.logits, seen.taught(teacher), temperature)
    return _mixed(soft, seen, x, y, mix, objective)


def _mixed(soft: Tensor, seen: Seen, x: Inputs, y: Tensor, mix: float, objective: Objective) -> Tensor:
    # the objective of a batch without labels is NaN, and 0 times that as well
    return soft if mix == 1 else (1 - mix) * objective(seen, x, y) + mix * soft


# --- Logits themselves ------------------------------------------------------------------------------------------------


def centred(logits: Tensor) -> Tensor:
    """Take the mean over classes off each example's logits ``[N, K]``: the softmax does not see it."""
    return logits - logits.mean(1, keepdim=True)


def logit_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Return :math:`\tfrac1N\sum_i\tfrac12\|z_i-v_i\|^2`.

    Of centred logits this is K times the limit of ``soft_loss`` at high temperatures.
    """
    return 0.5 * (exact(student_logits) - exact(teacher_logits)).square().sum(1).mean()


def match_logits(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    strength: float = 1.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Return the objective and ``strength`` times the squared error of the logits.

    The paper trains on the squared error alone: without an objective, ``objective=unlabelled``.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0; or the teacher is in training mode or has other classes.
    """
    check_not_negative(strength=strength)
    seen = lesson(model, x, objective, teacher=teacher)
    return objective(seen, x, y) + strength * logit_loss(seen.logits, seen.taught(teacher))


# --- Two parts of the divergence --------------------------------------------------------------------------------------


def target_class_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Return :math:`T^2\,\text{KL}(b_p\,\|\,b_q)`, b being (:math:`p_y`, :math:`1-p_y`): ``[N]``; the paper's TCKD."""
    z, v = exact(student_logits) / temperature, exact(teacher_logits) / temperature
    return temperature**2 * kl_divergence(_label_or_not(v, labels), _label_or_not(z, labels))


def other_classes_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Return :math:`T^2\,\text{KL}(\hat p\,\|\,\hat q)`, :math:`\hat p` being p without the label's class: ``[N]``.

    The paper's NCKD. Together: :math:`\text{KL}(p\,\|\,q)=\text{TCKD}+(1-p_y)\,\text{NCKD}`.
    """
    z, v = exact(student_logits) / temperature, exact(teacher_logits) / temperature
    return temperature**2 * kl_divergence(_without(v, labels), _without(z, labels))


def _label_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """Log probabilities of the label and of all others together: ``[N, K] -> [N, 2]``.

    By ``logsumexp`` of the others: 1 - p loses all its digits where the network is sure.
    """
    of_label = logits.gather(1, labels[:, None])
    others = _without(logits, labels).logsumexp(1, keepdim=True)
    return torch.cat([of_label, others], 1)


def _without(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of all classes but the label: ``[N, K] -> [N, K - 1]``."""
    classes = logits.shape[1]
    places = torch.arange(classes - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, places + (places >= labels[:, None]))


def decoupled(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective and the mean of :math:`\alpha\,\text{TCKD}+\beta\,\text{NCKD}`, over those with a label.

    In the plain divergence the second part has the weight :math:`1-p_y`, next to nothing where the teacher is sure.

    Raises
    ------
    ValueError : ``temperature`` is no number above 0, ``alpha`` or ``beta`` none of at least 0, the labels are not
        int64 ``[N]``; or the teacher is in training mode or has other classes.
    """
    check_positive(temperature=temperature)
    check_not_negative(alpha=alpha, beta=beta)
    if y.dtype != torch.int64 or y.ndim != 1:
        raise ValueError(f"y is {y.dtype} {list(y.shape)}: must be int64 [N]; mixed labels have no class of their own")
    seen = lesson(model, x, objective, teacher=teacher)
    z, v = seen.logits, seen.taught(teacher)
    labelled = y != UNLABELLED
    labels = y.clamp_min(0)  # any class will do where there is none: it counts nothing
    both = alpha * target_class_losses(z, v, labels, temperature) + beta * other_classes_losses(
        z, v, labels, temperature
    )
    return objective(seen, x, y) + (both * labelled).sum() / labelled.sum().clamp_min(1)


# --- Standardised logits ----------------------------------------------------------------------------------------------


def standardized_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Return each example's logits ``[N, K]`` with mean 0 and standard deviation 1 over the classes (K - 1 in it)."""
    logits = exact(logits)
    return centred(logits) / (logits.std(1, keepdim=True) + eps)


def standardized(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    temperature: float = 2.0,
    mix: float = 0.9,
    objective: Objective = cross_entropy,
) -> Tensor:
    """As ``soft_targets``, of standardised logits: student and teacher each have their own temperature an example.

    A small student need not reach the teacher's large logits; only how they lie to one another counts.

    Raises
    ------
    ValueError : as ``soft_targets``.
    """
    check_positive(temperature=temperature)
    check_chance(mix=mix)
    seen = lesson(model, x, objective, teacher=teacher)
    z, v = standardized_logits(seen.logits), standardized_logits(seen.taught(teacher))
    return _mixed(soft_loss(z, v, temperature), seen, x, y, mix, objective)


# --- Examples without a label -----------------------------------------------------------------------------------------


def unlabelled(model: nn.Module, x: Inputs, y: Tensor) -> Tensor:
    """Return 0 that hangs on the network: the objective that asks for nothing."""
    return 0 * model(x).sum()


def labelled_only(model: nn.Module, x: Inputs, y: Tensor, *, objective: Objective = cross_entropy) -> Tensor:
    """Return the objective of the examples whose label is not -100: the mean over these; 0 where there are none.

    The network runs on the whole batch, so that batch norm sees all of it. It belongs innermost, around an objective
    that needs logits alone: ``partial(soft_targets, teacher=teacher, objective=labelled_only)``.
    """
    logits = model(x)
    if y.is_floating_point():
        return objective(Seen(model, x, logits), x, y)
    labelled = y != UNLABELLED
    if not labelled.any():
        return 0 * logits.sum()
    part = tuple(each[labelled] for each in x) if isinstance(x, tuple) else x[labelled]
    return objective(Seen(model, part, logits[labelled]), part, y[labelled])
