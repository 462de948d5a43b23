r"""Why soft targets help, in formulas: their gradient, what they hold beside the label, and how much noise they spare.

=======================  ===================================================  =========================================
name                     what it gives                                        source
=======================  ===================================================  =========================================
``soft_gradient``        the gradient of the soft loss for the logits         Hinton, Vinyals & Dean 2015,
``hot_gradient``         its limit at high temperatures                       arXiv:1503.02531
``distance_to_limit``    how far the one is from the other
``dark_knowledge``       what the teacher thinks of each class's images       Hinton, Vinyals & Dean 2015
``gradient_weights``     soft targets as weights of examples                  Furlanello et al. 2018, arXiv:1805.04770
``risk``                 the empirical risk under given targets               Menon et al. 2020, arXiv:2005.10419
``risk_variance``        its variance, over labels that might have been
                         drawn
``sampled_risks``        the same by drawing labels
``teacher_risk``         bias and variance where the teacher's
                         probabilities are off
=======================  ===================================================  =========================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from course_lib.distillation.targets import centred
from course_lib.lab.arguments import at_least
from course_lib.lab.data import Split
from course_lib.lab.training import logits_of
from course_lib.regularization.drawing import check_matrix, check_positive

# --- The gradient -----------------------------------------------------------------------------------------------------


def soft_gradient(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return :math:`\tfrac TN(q^T-p^T)`, the gradient of ``soft_loss`` for the student's logits: ``[N, K]``.

    :math:`\text{KL}(p^T\|q^T)` has the gradient :math:`(q^T-p^T)` for :math:`z/T`, so :math:`(q^T-p^T)/T` for z; the
    factor :math:`T^2` makes T of it.

    Raises
    ------
    ValueError : ``temperature`` is no number above 0, or the logits are not of one shape.
    """
    check_positive(temperature=temperature)
    _check_alike(student_logits, teacher_logits)
    q, p = (student_logits / temperature).softmax(1), (teacher_logits / temperature).softmax(1)
    return temperature / len(q) * (q - p)


def hot_gradient(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Return :math:`(z_c-v_c)/(NK)`, the limit of ``soft_gradient`` as T grows: ``[N, K]``; c for centred logits.

    At a high temperature :math:`\text{softmax}(z/T)\approx\tfrac1K(1+z_c/T)`, and T times the difference is left.

    Raises
    ------
    ValueError : the logits are not of one shape.
    """
    _check_alike(student_logits, teacher_logits)
    return (centred(student_logits) - centred(teacher_logits)) / student_logits.numel()


def distance_to_limit(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> float:
    """Return the norm of ``soft_gradient`` minus ``hot_gradient``, over the norm of the latter; it falls as 1/T.

    Raises
    ------
    ValueError : as ``soft_gradient``, or student and teacher have the same logits, so that there is no gradient.
    """
    found = soft_gradient(student_logits.double(), teacher_logits.double(), temperature)
    limit = hot_gradient(student_logits.double(), teacher_logits.double())
    # what rounding leaves of equal logits is no direction
    if limit.norm() * limit.numel() <= 1e-12 * (student_logits.norm() + teacher_logits.norm()):
        raise ValueError("student_logits equal teacher_logits but for a constant: must differ, or there is no gradient")
    return ((found - limit).norm() / limit.norm()).item()


def _check_alike(student_logits: Tensor, teacher_logits: Tensor) -> None:
    check_matrix(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits are {list(teacher_logits.shape)}: must be {list(student_logits.shape)}, as the student's"
        )


# --- What is in them --------------------------------------------------------------------------------------------------


class DarkKnowledge(NamedTuple):
    """What a teacher thinks of the images of each class.

    Attributes
    ----------
    sure : ``[K]``, the mean probability of the true class.
    others : ``[K, K]``, row by row the mean probabilities of the other classes; 0 on the diagonal. Row and ``sure`` add
        up to 1.
    """

    sure: Tensor
    others: Tensor


def dark_knowledge(teacher: nn.Module, split: Split, temperature: float = 1.0) -> DarkKnowledge:
    """Return the teacher's mean soft label by true class, the true class apart. NaN for a class without images.

    Raises
    ------
    ValueError : ``temperature`` is no number above 0.
    """
    check_positive(temperature=temperature)
    p = (logits_of(teacher, split).double() / temperature).softmax(1).cpu()
    sums = torch.zeros(p.shape[1], p.shape[1], dtype=p.dtype).index_add_(0, split.labels.cpu(), p)
    mean = sums / torch.bincount(split.labels.cpu(), minlength=p.shape[1])[:, None]
    return DarkKnowledge(mean.diagonal().clone(), mean - mean.diagonal().diag())


def gradient_weights(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return how much each example counts in a batch ``[N]`` if only the label's part of a soft target is kept.

    The gradient of the soft loss for the label's logit is :math:`q_y-p_y`, against :math:`q_y-1` from the label: where
    the student has not learnt yet (:math:`q_y\approx0`) it is the label's gradient times :math:`p_y`. Over their mean,
    :math:`w_i=p_{y_i}/\tfrac1N\sum_jp_{y_j}`, these are the paper's importance weights; for an experiment it takes the
    teacher's largest probability in the place of :math:`p_y` (CWTM).

    Raises
    ------
    ValueError : the logits are no matrix, or the labels not as many.
    """
    check_matrix(teacher_logits=teacher_logits)
    if labels.dtype != torch.int64 or labels.shape != teacher_logits.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: must be int64 [{len(teacher_logits)}]")
    p = teacher_logits.softmax(1).gather(1, labels.to(teacher_logits.device)[:, None])[:, 0]
    return p / p.mean()


# --- How much noise they spare ----------------------------------------------------------------------------------------


def risk(losses: Tensor, targets: Tensor) -> float:
    r"""Return :math:`\tfrac1N\sum_{ik}t_{ik}\ell_{ik}`, :math:`\ell_{ik}` being the loss if k were the label of i.

    ``losses`` and ``targets`` are ``[N, K]``: one-hot labels, the posterior :math:`P(k\mid x_i)`, or a teacher's
    probabilities.

    Raises
    ------
    ValueError : they are not of one shape, or the targets are no probabilities.
    """
    _check_risk(losses, targets)
    return (losses * targets).sum(1).mean().item()


def risk_variance(losses: Tensor, posterior: Tensor) -> float:
    r"""Return the variance of ``risk`` over labels drawn from the posterior, the inputs given.

    .. math:: \frac1{N^2}\sum_i\Big(\sum_kp_{ik}\ell_{ik}^2-\big(\sum_kp_{ik}\ell_{ik}\big)^2\Big)

    Its expectation is the risk under the posterior itself, which has no variance: that is what a teacher who knows the
    posterior spares. (What the draw of the inputs adds is the same for both.)

    Raises
    ------
    ValueError : as ``risk``.
    """
    _check_risk(losses, posterior)
    # around the mean: the difference of two large squares would lose its digits
    mean = (losses * posterior).sum(1, keepdim=True)
    return ((posterior * (losses - mean).square()).sum().item()) / len(losses) ** 2


def sampled_risks(losses: Tensor, posterior: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return the ``risk`` of ``draws`` sets of labels, each drawn from the posterior: ``[draws]``.

    Raises
    ------
    ValueError : ``draws`` is below 1; and as ``risk``.
    """
    at_least(1, draws=draws)
    _check_risk(losses, posterior)
    # where the generator is: the draws are then the same for tensors on any device
    chances = posterior.to(generator.device)
    labels = torch.multinomial(chances, draws, replacement=True, generator=generator)  # [N, draws]
    return losses.gather(1, labels.to(losses.device)).mean(0)


class TeacherRisk(NamedTuple):
    """Errors of two estimates of the risk under the posterior, as expected squares.

    Attributes
    ----------
    one_hot : of the risk under labels drawn once: their variance.
    teacher : of the risk under the teacher's probabilities: its squared bias.
    bias : the teacher's, with its sign.
    bound : what the bias is at most: the mean norm of the losses times the mean distance of the probabilities.
    """

    one_hot: float
    teacher: float
    bias: float
    bound: float


def teacher_risk(losses: Tensor, posterior: Tensor, teacher: Tensor) -> TeacherRisk:
    r"""Return what a teacher whose probabilities ``[N, K]`` are off gives, beside what drawn labels give.

    .. math:: \text{bias}=\frac1N\sum_{ik}(p^t_{ik}-p_{ik})\,\ell_{ik},\qquad
       |\text{bias}|\le\frac1N\sum_i\|p^t_i-p_i\|\,\|\ell_i\|

    The variance of one-hot labels falls as 1/N, the bias of a teacher does not: with enough examples labels win.

    Raises
    ------
    ValueError : as ``risk``.
    """
    bias = risk(losses, teacher) - risk(losses, posterior)
    bound = ((teacher - posterior).norm(dim=1) * losses.norm(dim=1)).mean().item()
    return TeacherRisk(risk_variance(losses, posterior), bias**2, bias, bound)


def _check_risk(losses: Tensor, targets: Tensor) -> None:
    check_matrix(losses=losses, targets=targets)
    if losses.shape != targets.shape or not len(losses):
        raise ValueError(
            f"targets are {list(targets.shape)}: must be {list(losses.shape)}, [N, K] as the losses, N > 0"
        )
    off = (targets.sum(1) - 1).abs().max().item()
    if not (targets >= 0).all() or not off < 1e-4:
        raise ValueError(f"targets have rows that miss a sum of 1 by {off:g}: must be probabilities, row by row")
