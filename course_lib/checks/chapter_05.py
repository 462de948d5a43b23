"""Checks of chapter 5, regularization: four methods to write, a figure to read, a bug to find, a training to rescue.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import optimizers
from course_lib.checks.designs import hidden_glyphs, normal
from course_lib.lab.experiments import one_thread
from course_lib.lab.judging import Case, Design, Method, Mistake, OpenProject, Reading, Wrong, call, close
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.preprocessing import flip_symmetric
from course_lib.regularization import decay_only_weights

# Exercise 1: the soft threshold


def _soft(
    w: Tensor, t: float, *,
    sign: Callable[[Tensor], Tensor] = torch.sign,
    size: Callable[[Tensor, float], Tensor] = lambda size, t: (size - t).clamp_min(0),
) -> Tensor:  # fmt: skip
    """``sign(w)`` times ``size(|w|, t)``."""
    return sign(w) * size(w.abs(), t)


def _with_zero(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


_WHICH_W = "Minimise (v - w)²/2 + t |v| for w = 3, -3 and 0.2, with t = 1. Where does the slope of |v| change its sign?"
_NO_FURTHER = [
    "What becomes of w = 0.2 with t = 0.5? Towards zero is right; past zero |v| grows again.",
    "How large is what is left of |w|, and can it be less than nothing?",
]
_BOTH_SIDES = [
    "Try w = -3 with t = 1. The penalty pulls it towards zero as it pulls +3.",
    "Shrink the size |w|, and give it its sign back.",
]
_ALL_SHRINK = [
    "The penalty t |v| costs a large weight more, not less. Does a large weight feel it in yours?",
    "Its slope is t everywhere but at zero: by how much does each weight move?",
]
_AT_ZERO = "What is 0 / 0? w.sign() is 0 at 0, and divides by nothing."

exercise_1 = Method(
    "The soft threshold",
    right=_soft,
    what="the new w",
    hint=[_WHICH_W, "Two things are done to each number: its size shrinks by t, and stops at zero."],
    cases={
        "a vector with small and large numbers": (_with_zero(2.0, -1.5, 0.3, -0.2, 0.9, 0.0, -3.0, 0.5), 0.5),
        "a matrix": (normal(11, 3, 4), 0.8),
        "a single number": (torch.tensor(-2.0, dtype=torch.float64), 0.3),
        "four dimensions, all below t": (normal(12, 2, 3, 2, 2).clamp(-1, 1), 1.5),
        "a threshold of 0": (_with_zero(1.0, 0.0, -2.0), 0.0),
    },
    mistakes=[
        Mistake(partial(_soft, sign=torch.ones_like), "the sign is gone: what was below zero is above it now",
                _BOTH_SIDES),
        Mistake(partial(_soft, size=lambda size, t: size - t),
                "t is taken from the small ones too, so that they come out on the other side of zero", _NO_FURTHER),
        Mistake(partial(_soft, size=lambda size, t: size * (size > t)),
                "that is the hard threshold: small ones become zero, and the others stay as they are", _ALL_SHRINK),
        Mistake(lambda w, t: (w - t).clamp_min(0),
                "t is taken from w, not from its size: all that is below zero is gone", _BOTH_SIDES),
        Mistake(lambda w, t: w - t, "t is taken from each number, whatever its sign", _BOTH_SIDES),
        Mistake(lambda w, t: w.clamp(-t, t), "that cuts off what is larger than t, and keeps the small ones",
                "That is what has to be taken away from w. What is left?"),
        Mistake(partial(_soft, size=lambda size, t: size / (1 + t)),
                "each number shrinks by the same factor, and none becomes zero",
                ["That is the step of t v²/2. What is the slope of t |v| where v is small?", _WHICH_W]),
        Mistake(partial(_soft, size=lambda size, t: size * (1 - t)),
                "each number shrinks by the same factor, and none becomes zero",
                ["That is a step of weight decay. What is the slope of t |v| where v is small?", _WHICH_W]),
        Mistake(partial(_soft, size=lambda size, t: (size - t / 2).clamp_min(0)), "the threshold is t/2",
                "Before the squared distance stands a half: (v - w)²/2 has the slope v - w."),
        Mistake(partial(_soft, size=lambda size, t: (size - 2 * t).clamp_min(0)), "the threshold is 2t",
                "The slope of t |v| is t. For which w is v = 0 the best?"),
        Mistake(partial(_soft, size=lambda size, t: (size - t) * (size < t)),
                "the comparison is the wrong way round: small ones stay, and large ones become zero", _WHICH_W),
        Mistake(partial(_soft, size=lambda size, t: (size - t).abs()),
                "what is below zero after t is taken away is turned around, and should be zero", _NO_FURTHER),
        Mistake(lambda w, t: -_soft(w, t), "the sign is wrong: each number changes sides", _BOTH_SIDES),
        Mistake(partial(_soft, sign=lambda w: w / w.abs()),
                "a weight of 0 becomes NaN: w / |w| divides by it", _AT_ZERO),
        # Right until t is 0 too: t / |w| is infinite elsewhere, and the clamp takes that
        Mistake(lambda w, t: w * (1 - t / w.abs()).clamp_min(0), "a weight of 0 becomes NaN: t / |w| is 0 / 0 there",
                _AT_ZERO),
    ],
)  # fmt: skip


# Exercise 2: inverted dropout


def _kept_share(mask: Tensor, p: float) -> float:
    return 1 / (1 - p)


def _dropout(
    x: Tensor, u: Tensor, p: float, training: bool, *,
    keeps: Callable[[Tensor, float], Tensor] = torch.ge,
    scale: Callable[[Tensor, float], Any] = _kept_share,
    evaluated: Callable[[Tensor, Tensor, float], Tensor] = lambda x, u, p: x,
) -> Tensor:  # fmt: skip
    """x where ``keeps(u, p)``, times ``scale(mask, p)``; ``evaluated(x, u, p)`` where it does not train."""
    if not training:
        return evaluated(x, u, p)
    mask = keeps(u, p).to(x.dtype)
    return x * mask * scale(mask, p)


def _other_entries(found: Any, right: Tensor, *case: Any) -> None:
    if isinstance(found, Tensor) and found.shape == right.shape and not close(found != 0, right != 0):
        raise Wrong("other numbers are switched off than u says",
                    "Draw nothing yourself: each number of u belongs to the number of x at its place.")  # fmt: skip


def _uniform(seed: int, *shape: int, hit: float) -> Tensor:
    """Uniform numbers in [0, 1) of which the first is ``hit``."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn.view(-1)[0] = hit
    return drawn


_IN_THE_MEAN = [
    "An entry is kept with probability 1 - p. What is its mean, and what should that be?",
    "The next layer should see the same mean in training as in evaluation, where nothing is dropped.",
]
_EVALUATION = "What is kept was scaled in training so that nothing has to be done in evaluation."
_CHANCE = "How often is u, uniform in [0, 1), at least p? And how often should an entry be kept?"

exercise_2 = Method(
    "Inverted dropout by hand",
    right=_dropout,
    explain=_other_entries,
    what="the result",
    hint=["Take x = 1 everywhere and p = 0.75. Which numbers may come out, and what is their mean?", *_IN_THE_MEAN],
    unchanged=["x *= … and x[mask] = 0 change the caller's activations. Which expression makes new ones?",
               "x * mask makes a new tensor, and torch.where(…) too."],
    cases={
        # p far from a half, so that p and 1 - p can be told apart; the first of u is p itself
        "a batch in training": (normal(21, 4, 5), _uniform(22, 4, 5, hit=0.3), 0.3, True),
        "images in training, p large": (normal(23, 2, 3, 3, 3), _uniform(24, 2, 3, 3, 3, hit=0.8), 0.8, True),
        "a batch in evaluation": (normal(25, 4, 5), _uniform(26, 4, 5, hit=0.4), 0.4, False),
        "p = 0 in training": (normal(27, 6), _uniform(28, 6, hit=0.0), 0.0, True),
    },
    mistakes=[
        Mistake(partial(_dropout, scale=lambda mask, p: 1.0), "what is kept is not scaled",
                [*_IN_THE_MEAN, "The first dropout scaled in evaluation instead. Inverted is: done in training."]),
        Mistake(partial(_dropout, scale=lambda mask, p: 1 - p),
                "what is kept is multiplied by 1 - p, and becomes smaller still", _IN_THE_MEAN),
        Mistake(partial(_dropout, scale=lambda mask, p: 1 / p),
                "what is kept is divided by p, the probability of being dropped", _IN_THE_MEAN),
        Mistake(partial(_dropout, keeps=torch.lt), "what should be dropped is kept, and the other way round", _CHANCE),
        Mistake(partial(_dropout, keeps=torch.lt, scale=lambda mask, p: 1 / p),
                "p is taken for the probability of keeping", _CHANCE),
        Mistake(partial(_dropout, keeps=torch.lt, scale=lambda mask, p: 1.0),
                "what should be dropped is kept, and nothing is scaled", [_CHANCE, *_IN_THE_MEAN]),
        Mistake(partial(_dropout, keeps=torch.gt), "an entry whose u is p itself is dropped, and should be kept",
                "u can be 0, and never 1. With p = 0, what would become of an entry with u = 0?"),
        Mistake(partial(_dropout, scale=lambda mask, p: 1 / mask.mean()),
                "you divide by the share that happened to be kept, not by its probability",
                "If chance drops everything, that share is 0. What is the probability of keeping, whatever comes?"),
        Mistake(lambda x, u, p, training: x / (1 - p) if training else x, "all is scaled, and nothing dropped",
                "Where does u come in?"),
        Mistake(lambda x, u, p, training: _dropout(x, u, p, not training),
                "nothing happens in training: x comes back as it was",
                "When is dropout to be switched on, in training or in evaluation?"),
        Mistake(lambda x, u, p, training: (u >= p).to(x.dtype), "the mask is returned",
                "Which numbers does it act on?"),
        Mistake(lambda x, u, p, training: (u >= p).to(x.dtype) / (1 - p), "the scaled mask is returned",
                "Which numbers does it act on?"),
        Mistake(lambda x, u, p, training: _dropout(x, u, p, True), "entries are dropped in evaluation too",
                "What does the argument training say?"),
        Mistake(partial(_dropout, evaluated=lambda x, u, p: x * (u >= p)), "entries are dropped in evaluation too",
                "What does the argument training say?"),
        Mistake(partial(_dropout, evaluated=lambda x, u, p: x * (1 - p)), "x is multiplied by 1 - p in evaluation",
                _EVALUATION),
        Mistake(partial(_dropout, evaluated=lambda x, u, p: x / (1 - p)), "x is scaled in evaluation too", _EVALUATION),
        Mistake(partial(_dropout, evaluated=lambda x, u, p: torch.zeros_like(x)), "in evaluation all is dropped",
                _EVALUATION),
    ],
)  # fmt: skip


# Exercise 3: how many parameters ridge leaves free


def _eigenvalues(X: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(X.T @ X).clamp_min(0)


def _degrees(
    X: Tensor, alpha: float, *,
    values: Callable[[Tensor], Tensor] = _eigenvalues,
    share: Callable[[Tensor, float], Tensor] = lambda values, alpha: values / (values + alpha),
    total: Callable[[Tensor], Tensor] = torch.sum,
) -> float:  # fmt: skip
    """``total(share(values(X), alpha))``: each direction counts as far as ridge leaves it alone."""
    return total(share(values(X), alpha)).item()


def _features(seed: int, rows: int, *lengths: float) -> Tensor:
    """Columns of these sizes whose means are not zero."""
    return (normal(seed, rows, len(lengths)) + 0.7) * torch.tensor(lengths, dtype=torch.float64)


_SHRUNK = [
    "Ridge multiplies what least squares finds along direction j by λ_j / (λ_j + α). What is that at α = 0, and at an "
    "α without bound?",
    "A direction that is left alone counts as one parameter, one that is shrunk to nothing as none. Add them up.",
]
_SQUARES = "XᵀX = V S Uᵀ U S Vᵀ. What are its eigenvalues, in terms of the singular values S of X?"

exercise_3 = Method(
    "The degrees of freedom that ridge leaves",
    right=_degrees,
    what="the number of degrees of freedom",
    hint=["Take one feature, X = [[3], [4]]. XᵀX is 25: with α = 25, half a parameter is left.", *_SHRUNK],
    cases={
        "8 examples of 3 features": (_features(31, 8, 2.0, 1.0, 0.4), 2.0),
        "a single feature": (_features(32, 5, 1.5), 0.7),
        "3 examples of 6 features": (_features(33, 3, 1.0, 0.5, 2.0, 1.5, 0.2, 1.0), 0.5),
        "features of very different sizes": (_features(34, 20, 30.0, 1.0, 0.03), 0.1),
    },
    mistakes=[
        Mistake(partial(_degrees, values=lambda X: torch.linalg.svdvals(X)),
                "the singular values of X stand where their squares should", _SQUARES),
        Mistake(partial(_degrees, values=lambda X: _eigenvalues(X).square()),
                "the eigenvalues are squared once more", [_SQUARES, "Those of XᵀX are squares already."]),
        Mistake(partial(_degrees, share=lambda values, alpha: alpha / (values + alpha)),
                "that counts what ridge takes away, not what it leaves", _SHRUNK),
        Mistake(lambda X, alpha: X.shape[1], "that is the number of features, whatever α", _SHRUNK),
        Mistake(lambda X, alpha: len(X), "that is the number of examples",
                ["Which directions can ridge shrink, and how many are there?", *_SHRUNK]),
        Mistake(lambda X, alpha: len(X) - _degrees(X, alpha),
                "those are the degrees of freedom that are left for the noise",
                ["Which of the two parts is the model's?", *_SHRUNK]),
        Mistake(partial(_degrees, total=torch.mean), "that is the mean over the directions, not their sum", _SHRUNK),
        Mistake(partial(_degrees, share=lambda values, alpha: values.square() / (values + alpha).square()),
                "each share is squared: that belongs to the variance of the predictions",
                ["The trace of the matrix that makes predictions of y is wanted, of the matrix itself.", *_SHRUNK]),
        Mistake(partial(_degrees, share=lambda values, alpha: 1 - (alpha / (values + alpha)).square()),
                "1 minus a square is another definition, that of the residual's degrees of freedom",
                ["The trace of the matrix that makes predictions of y is wanted, of the matrix itself.", *_SHRUNK]),
        Mistake(partial(_degrees, share=lambda values, alpha: values / (values + alpha**2)), "α is squared",
                "α enters ridge as it is: (XᵀX + α I)⁻¹."),
        Mistake(partial(_degrees, share=lambda values, alpha: values / (values + alpha**0.5)),
                "the root of α stands where α should", "α enters ridge as it is: (XᵀX + α I)⁻¹."),
        Mistake(lambda X, alpha: (_eigenvalues(X).sum() / (_eigenvalues(X).sum() + alpha)).item(),
                "the eigenvalues are added up before they are divided",
                ["Each direction has a share of its own.", *_SHRUNK]),
        Mistake(partial(_degrees, share=lambda values, alpha: 1 / (values + alpha)),
                "that is the trace of the inverse alone", ["Which matrix does ridge multiply it with?", *_SHRUNK]),
        Mistake(partial(_degrees, share=lambda values, alpha: values),
                "that is the trace of XᵀX: α is missing", _SHRUNK),
        Mistake(lambda X, alpha: _degrees(X / len(X) ** 0.5, alpha),
                "XᵀX is divided by the number of examples",
                "That belongs to a loss that is a mean. Here α stands beside XᵀX as it is."),
        Mistake(lambda X, alpha: _degrees(X - X.mean(0), alpha), "the features are centred first",
                "That belongs to a ridge with an intercept. Here X is used as it is."),
    ],
)  # fmt: skip


# Four panels: training and validation accuracy over the strength, a dot where each colleague stands. Ada stands far to
# the left: a large gap, and validation still rises with the strength. Ben stands to the right of the peak of his
# validation accuracy: both of his curves have come down, the gap is small. Cleo stands on the peak; her gap is neither
# the largest nor the smallest. Dan's curves are flat, and his gap is the smallest of the four. Of the four validation
# accuracies at the dots, Ada's and not Ben's is the lowest.
exercise_4 = Reading(
    "Who should regularize less? A figure to read",
    right=("Ben", "d"),
    choices={
        "Ada": "Ada's validation accuracy still rises to the right of her dot: she should regularize more",
        "Ben": "",
        "Cleo": "Cleo stands at the peak of her validation accuracy: either way it goes down",
        "Dan": "Dan's validation accuracy is the same at every strength: less would change nothing, nor would more",
    },
    reasons={
        "a": "the largest gap is Ada's, and a large gap alone asks for more, if for anything",
        "b": "the smallest gap is Dan's; and a small gap is what regularization is for, as long as validation gains",
        "c": "the lowest of the four is Ada's; and how high it can be depends on the task",
        "d": "",
    },
    hint=["Go from each dot to the left. Whose validation accuracy rises?",
          "Regularization costs training accuracy everywhere. Whom does it cost validation accuracy too?"],
    reason_hint="What do both of his curves do on the way from the left to the dot?",
)  # fmt: skip


# Exercise 5: label smoothing that spreads too little


def _smoothed(
    logits: Tensor, y: Tensor, eps: float, *,
    wrong: Callable[[int, float], float] = lambda classes, eps: eps / classes,
    right: Callable[[int, float], float] = lambda classes, eps: 1 - eps + eps / classes,
    log_q: Callable[[Tensor], Tensor] = lambda logits: logits.log_softmax(1),
    total: Callable[[Tensor], Tensor] = lambda terms: terms.sum(1).mean(),
) -> Tensor:  # fmt: skip
    """Minus ``total`` of the targets, each of ``wrong(K, eps)`` or ``right(K, eps)``, times ``log_q(logits)``."""
    classes = logits.shape[1]
    targets = torch.full_like(logits, wrong(classes, eps))
    targets[torch.arange(len(y)), y] = right(classes, eps)
    return -total(targets * log_q(logits))


def _divergence(logits: Tensor, y: Tensor, eps: float) -> Tensor:
    targets = (1 - eps) * torch.eye(logits.shape[1], dtype=logits.dtype)[y] + eps / logits.shape[1]
    return torch.special.xlogy(targets, targets).sum(1).mean() + _smoothed(logits, y, eps)


def _labelled(seed: int, examples: int, classes: int, eps: float) -> Case:
    labels = torch.randint(classes, (examples,), generator=torch.Generator().manual_seed(seed))
    return 2 * normal(seed, examples, classes), labels, eps


_OF_ALL = [
    "Over how many classes do torch and the paper spread eps: over the wrong ones, or over all K?",
    "A target is 1 - eps of the label and eps of a uniform one, in which each of the K classes has 1/K: the right one "
    "too.",
]
_ONE_NUMBER = "First the classes are added up, then the examples averaged. Which of the two is missing, or wrong?"

exercise_5 = Method(
    "Find the bug: label smoothing that is not torch's",
    right=_smoothed,
    what="the loss",
    hint=["Print the targets for one example, and the sum of each row. What does torch's loss multiply?", *_OF_ALL],
    cases={
        "6 examples of 4 classes": _labelled(51, 6, 4, 0.2),
        "5 examples of 2 classes": _labelled(52, 5, 2, 0.5),
        "a single example of 10 classes": _labelled(53, 1, 10, 0.1),
        "no smoothing": _labelled(54, 7, 3, 0.0),
    },
    mistakes=[
        Mistake(partial(_smoothed, wrong=lambda classes, eps: eps / (classes - 1), right=lambda classes, eps: 1 - eps),
                "eps is still spread over the wrong classes alone: torch and the paper spread it over all K", _OF_ALL),
        Mistake(partial(_smoothed, right=lambda classes, eps: 1 - eps),
                "the right class has no part of eps, so that the targets of an example do not add up to 1", _OF_ALL),
        Mistake(partial(_smoothed, wrong=lambda classes, eps: eps / (classes - 1)),
                "the wrong classes share all of eps, and the right one has a part of it too: above 1 in all", _OF_ALL),
        Mistake(partial(_smoothed, wrong=lambda classes, eps: eps, right=lambda classes, eps: 1 - eps),
                "each wrong class has all of eps", _OF_ALL),
        Mistake(partial(_smoothed, right=lambda classes, eps: 1.0),
                "the right class keeps all of its 1, and the others come on top", _OF_ALL),
        Mistake(partial(_smoothed, wrong=lambda classes, eps: (1 - eps) / classes,
                        right=lambda classes, eps: eps + (1 - eps) / classes),
                "eps and 1 - eps are exchanged", "At eps = 0 the loss should be the usual one. Is yours?"),
        Mistake(partial(_smoothed, wrong=lambda classes, eps: 0.0, right=lambda classes, eps: 1.0),
                "that is the cross-entropy without smoothing", "Where does eps come in?"),
        Mistake(partial(_smoothed, wrong=lambda classes, eps: 0.0, right=lambda classes, eps: 1 - eps),
                "the wrong classes have no part of eps", _OF_ALL),
        Mistake(partial(_smoothed, total=torch.sum), "the examples are added up: the mean over them is missing",
                _ONE_NUMBER),
        Mistake(partial(_smoothed, total=lambda terms: terms.sum(1)),
                "that is a loss for each example: the mean over them is missing", _ONE_NUMBER),
        Mistake(partial(_smoothed, total=torch.mean), "that is the mean over examples and classes", _ONE_NUMBER),
        Mistake(partial(_smoothed, total=lambda terms: terms.mean(1).sum()),
                "that is the mean over the classes, added up over the examples", _ONE_NUMBER),
        Mistake(partial(_smoothed, total=lambda terms: -terms.sum(1).mean()), "the minus is missing",
                "The logarithm of a probability is below 0. What is a loss?"),
        Mistake(partial(_smoothed, log_q=lambda logits: logits), "the logits stand where log-probabilities should",
                "What turns logits into logarithms of probabilities?"),
        Mistake(partial(_smoothed, log_q=lambda logits: logits.softmax(1)),
                "the probabilities stand where their logarithms should", "What does the cross-entropy multiply?"),
        Mistake(partial(_smoothed, log_q=lambda logits: logits.log_softmax(0)),
                "the softmax is taken over the examples", "Which axis holds the classes?"),
        Mistake(_divergence, "the entropy of the targets is taken away: that is the divergence, not the cross-entropy",
                "Both have the same gradient. Torch's loss does not subtract what cannot be changed."),
    ],
)  # fmt: skip


# Exercise 6: the soft threshold of whole rows


def _lengths(W: Tensor) -> Tensor:
    return W.norm(dim=1, keepdim=True)


def _group(
    W: Tensor, t: float, *,
    lengths: Callable[[Tensor], Tensor] = _lengths,
    left: Callable[[Tensor, float], Tensor] = lambda lengths, t: (lengths - t).clamp_min(0),
    over: Callable[[Tensor], Tensor] = lambda lengths: lengths.clamp_min(torch.finfo(torch.float64).tiny),
) -> Tensor:  # fmt: skip
    """Each row of the length ``left(lengths(W), t)``, in its own direction: W times that over ``over(lengths(W))``."""
    found = lengths(W)
    return W * (left(found, t) / over(found))


def _as_they_are(lengths: Tensor) -> Tensor:
    return lengths


def _rows(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


_A_ROW = [
    "Take one row, [3, 4], and t = 1. How long is it before, how long after, and which way does it point?",
    "Its length goes from 5 to 4, so that both numbers are multiplied by 4/5.",
]
_EACH_ROW = ["A unit is a row, W[r]. Along which axis are the squares added up?", *_A_ROW]
_SHORT = [
    "How long is a row of length 0.3 after a step of t = 0.5? A length is never below zero.",
    "torch.clamp(…, min=0), of what is left of the length.",
]
_NO_DIRECTION = [
    "A row of zeros has no direction, and stays what it is. What does your code divide by there?",
    "Divide by lengths.clamp_min(1e-12): a row of zeros is multiplied by something finite then.",
]

exercise_6 = Method(
    "The soft threshold of whole rows",
    right=_group,
    what="the new W",
    hint=[*_A_ROW, *_SHORT],
    unchanged=["W[r] = … and W *= … change the caller's weights. Which expression makes new ones?",
               "W * factors, with factors of shape [units, 1], makes a new tensor."],
    cases={
        # No row of zeros yet: it would make NaN of several mistakes, which could not be told apart
        "4 units of 3 inputs, one of them weak": (
            _rows((1.0, -2.0, 0.6), (0.2, 0.1, -0.3), (-0.9, 0.3, 1.1), (0.1, 2.5, -0.4)), 0.7
        ),
        "a unit of zeros": (_rows((0.0, 0.0), (1.5, -1.0), (0.3, 0.2)), 0.5),
        "a threshold of 0, and a unit of zeros": (_rows((1.0, 2.0, -1.0), (0.0, 0.0, 0.0)), 0.0),
        "2 units of 5 inputs, both weak": (normal(61, 2, 5).clamp(-1, 1), 3.0),
        "a single unit": (normal(62, 1, 6), 0.4),
    },
    mistakes=[
        Mistake(lambda W, t: _soft(W, t), "each number is shrunk by itself, as in exercise 1",
                ["Then single numbers become zero, and no unit as a whole. What belongs together here?", *_A_ROW]),
        Mistake(lambda W, t: _group(W.T, t).T,
                "the columns are shrunk: those are the inputs, not the units", _EACH_ROW),
        Mistake(partial(_group, left=lambda lengths, t: lengths - t, over=_as_they_are),
                "a row shorter than t comes out on the other side of zero", _SHORT),
        Mistake(partial(_group, left=lambda lengths, t: lengths * (lengths > t)),
                "short rows become zero, and the others stay as they are",
                ["The penalty pulls at long rows too. By how much?", *_A_ROW]),
        Mistake(partial(_group, left=lambda lengths, t: lengths.clamp_max(t)),
                "rows longer than t are cut to that length, and short ones stay: that is max-norm",
                ["That is what has to be taken away from W. What is left?", *_A_ROW]),
        Mistake(partial(_group, lengths=lambda W: W.norm()), "the length is that of the whole matrix", _EACH_ROW),
        Mistake(partial(_group, lengths=lambda W: W.square().sum(1, keepdim=True)),
                "the squared length stands where the length should", ["Where is the root?", *_A_ROW]),
        Mistake(partial(_group, lengths=lambda W: W.abs().sum(1, keepdim=True)),
                "the length is the sum of sizes, not the Euclidean one", _A_ROW),
        Mistake(partial(_group, lengths=lambda W: W.abs().amax(1, keepdim=True)),
                "the length is the largest size in the row, not the Euclidean one", _A_ROW),
        Mistake(lambda W, t: _group(W, t * W.shape[1] ** 0.5),
                "each row shrinks by t times the root of the number of inputs: your t has that factor, or your length "
                "is the root of a mean of squares",
                ["Some write the penalty with it, for groups of different sizes. Here t is used as it is.", *_A_ROW]),
        Mistake(lambda W, t: _group(W, t / 2), "each row shrinks by t/2",
                "Before the squared distance stands a half: the slope of t ‖v‖ is t along v."),
        Mistake(partial(_group, over=torch.ones_like),
                "each row is multiplied by the length that is left, without being divided by its own", _A_ROW),
        Mistake(lambda W, t: W / (1 + t), "all rows shrink by the same factor, and none becomes zero",
                ["That is the step of a squared length. What is the slope of t ‖v‖ where v is short?", *_A_ROW]),
        Mistake(lambda W, t: (_lengths(W) - t).clamp_min(0)[:, 0], "the new lengths are returned",
                "Which way do the rows point?"),
        # Right as long as there is no row of zeros
        Mistake(partial(_group, over=_as_they_are),
                "a row of zeros becomes NaN: it is divided by its length", _NO_DIRECTION),
        Mistake(lambda W, t: W * (1 - t / _lengths(W)).clamp_min(0),
                "a row of zeros becomes NaN where t is 0 too: 0 / 0", _NO_DIRECTION),
    ],
)  # fmt: skip


# Exercise 7: a network that learns wrong labels by heart

WRONG = 0.3
"""The share of the 600 training labels that are another class; those of the test split are right."""

BASE = Recipe(
    epochs=30,
    batch_size=60,
    optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    precision="float64",
    validate_every=30,
)
"""What the learner starts from: it ends with all labels known by heart, the wrong ones too."""

_FREE = ("optimizer", "objective")
_FOR_INSTANCE = "For instance: mine = lambda: reg.with_dropout(network(), 0.1), replace(base, objective=…)"
_DECAY = "For instance: optimizer=partial(base.optimizer, weight_decay=1e-4). Rate and momentum stay as they are."
_ONLY_DROPOUT = "Free are the objective, the weight decay and dropout: lambda: reg.with_dropout(network(), p)"


def network() -> nn.Module:
    """What the learner's network is apart from its dropout."""
    return mlp((1, 16, 16), 10, width=256)


def _regularizers_only(answer: Any) -> None:
    """Admits a function that makes `network`, with dropout or without, and a recipe of another objective and decay."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not isinstance(answer[1], Recipe):
        raise Wrong("expected two things: a function that makes the network, and a Recipe", _FOR_INSTANCE)
    _admit_recipe(answer[1])
    _admit_network(answer[0])


def _admit_recipe(recipe: Recipe) -> None:
    others = [slot.name for slot in fields(Recipe) if slot.name not in _FREE]
    if changed := [name for name in others if getattr(recipe, name) != getattr(BASE, name)]:
        raise Wrong(f"besides the optimizer's decay and the objective you changed {', '.join(changed)}",
                    "Start from replace(base, …), with objective=… or optimizer=….")  # fmt: skip
    if not callable(recipe.objective):
        raise Wrong("the objective should be a function (model, x, y) -> loss",
                    "For instance: objective=partial(reg.label_smoothing, smoothing=0.05)")  # fmt: skip
    optimizer: Any = recipe.optimizer
    if isinstance(optimizer, partial) and optimizer.func is decay_only_weights:
        optimizer = optimizer.keywords.get("make")  # its decay belongs to decay_only_weights
    if not isinstance(optimizer, partial) or optimizer.func not in (torch.optim.SGD, optimizers.SGD) or optimizer.args:
        raise Wrong("the optimizer should be base's SGD, with another weight_decay at most", _DECAY)
    wanted: dict[str, float] = {"lr": 0.03, "momentum": 0.9}
    given = {name: value for name, value in optimizer.keywords.items() if name != "weight_decay"}
    if changed := sorted(name for name in {*wanted, *given} if given.get(name) != wanted.get(name)):
        raise Wrong(f"your SGD changes {', '.join(changed)}", _DECAY)


def _admit_network(make: Any) -> None:
    if isinstance(make, nn.Module):
        raise Wrong("that is a network, and what is wanted is a function that makes one",
                    "Each run needs a new one: put lambda: before what makes it.")  # fmt: skip
    for seed in (0, 1):
        mine, plain = fresh(lambda: call(make), BASE, seed=seed), fresh(network, BASE, seed=seed)
        if not isinstance(mine, nn.Module):
            raise Wrong("your function makes no network", _FOR_INSTANCE)
        pairs = list(mine.parameters()), list(plain.parameters())
        if [p.shape for p in pairs[0]] != [p.shape for p in pairs[1]]:
            raise Wrong("your network has other weights than network() has", _ONLY_DROPOUT)
        if not close(pairs[0], pairs[1]):
            raise Wrong("your network does not begin with the weights that network() draws",
                        "Make it inside of your function, so that each run draws its own: lambda: reg.with_dropout("
                        "network(), p)")  # fmt: skip
        x = normal(seed, 8, *plain.input_shape)  # type: ignore[misc]
        if not close(call(mine.eval(), x), plain(x)):
            raise Wrong("in evaluation your network says something else than network() with the same weights",
                        "Dropout acts in training alone. What does yours do in evaluation?")  # fmt: skip


def _accuracy(answer: tuple[Callable[[], nn.Module], Recipe], seed: int) -> float:
    """Test accuracy on digits of this seed, of a network of this seed that is told wrong labels."""
    make, recipe = answer
    data = hidden_glyphs(seed, 600)
    told = flip_symmetric(data.train.labels, WRONG, len(data.classes), torch.Generator().manual_seed(seed))
    model = fresh(make, recipe, seed=seed)
    with one_thread():  # several would wait for each other where the machine has other work: batches are small
        fit(model, replace(data, train=replace(data.train, labels=told)), recipe, seed=seed, progress=False)
        return evaluate(model, data.test).accuracy


exercise_7 = Design(
    "Do not learn the wrong labels by heart",
    admit=_regularizers_only,
    score=_accuracy,
    seeds=(531, 532, 533, 534),
    least=0.66,
    hint=["How many of the training labels, as they were given, does your network know at the end? More than seven of "
          "ten should worry you.",
          "Usual strengths are for right labels. Go up by factors, until the training accuracy falls.",
          "No decay reaches it alone, nor does dropout. Put two together that act in different ways, or take an "
          "objective on which a hopeless example has no pull."],
    diverged="A smaller strength: which of them multiplies the weights, or the loss?",
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: regularize a training of your own",
    rubric=["the gap", "tuning", "what is reported", "combinations", "honesty"],
)
