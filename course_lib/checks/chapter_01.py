"""Checks of chapter 1, data preprocessing: four methods to write, a figure to read, a bug to find, a design.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports. Only the design, which hands in transforms of that module, is
trained through it.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.lab.data import Dataset, load
from course_lib.lab.experiments import one_thread
from course_lib.lab.judging import Design, Method, Mistake, OpenProject, Reading, Rule, Wrong, close
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.preprocessing import on_pixels


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Exercise 1: scaling


def _table(seed: int, *shape: int) -> Tensor:
    """Columns of different means and widths."""
    columns = shape[-1]
    return _drawn(seed, *shape) * torch.arange(1, columns + 1) - 4 + 3 * torch.arange(columns)


def _with_constant(table: Tensor, column: int, *values: float) -> Tensor:
    """The column becomes those values, again and again: whole numbers, so that their mean leaves no rounding error."""
    table[:, column] = torch.tensor(values).repeat(len(table))[: len(table)]
    return table


def _widths(table: Tensor) -> Tensor:
    return table.std(0, correction=0)


def _one_where_zero(std: Tensor) -> Tensor:
    return torch.where(std == 0, 1.0, std)


def _standardise(
    train: Tensor, rows: Tensor, *,
    figures: Callable[[Tensor, Tensor], Tensor] = lambda train, rows: train,
    mean: Callable[[Tensor], Tensor] = lambda table: table.mean(0),
    std: Callable[[Tensor], Tensor] = _widths,
    guarded: Callable[[Tensor], Tensor] = _one_where_zero,
) -> Tensor:  # fmt: skip
    """``rows`` scaled by the mean and the ``guarded`` std of ``figures(train, rows)``, which are those of ``train``."""
    table = figures(train, rows)
    return (rows - mean(table)) / guarded(std(table))


def _by_range(train: Tensor, rows: Tensor) -> Tensor:
    low, high = train.amin(0), train.amax(0)
    return (rows - low) / _one_where_zero(high - low)


def _constant_left(train: Tensor, rows: Tensor) -> Tensor:
    return torch.where(_widths(train) == 0, rows, _standardise(train, rows))


def _constant_zeroed(train: Tensor, rows: Tensor) -> Tensor:
    return torch.where(_widths(train) == 0, 0.0, _standardise(train, rows))


def _where_constant(found: Any, right: Tensor, train: Tensor, rows: Tensor) -> None:
    constant = _widths(train) == 0
    if not isinstance(found, Tensor) or found.shape != right.shape or close(found, right):
        return
    if close(found[:, ~constant], right[:, ~constant]):
        larger = found[:, constant].abs().max() > 100 * rows.abs().max()
        tiny = "is divided by a tiny number, and its values explode"
        raise Wrong(
            f"a column that is constant in train {tiny if larger else 'should be centred, and no more'}", _CONSTANT
        )


_TRAIN_ALONE = [
    "At the time of training, which rows are known?",
    "Both figures come from train, and rows are only scaled by them.",
]
_CONSTANT = [
    "What is the standard deviation of a constant column, and what happens in the division?",
    "Divide by 1 where the standard deviation is 0.",
]
_EACH_COLUMN = "A column may be in metres and its neighbour in grams. Along which dimension is a mean taken?"

exercise_1 = Method(
    "Scale rows by the figures of the training rows",
    right=_standardise,
    what="the scaled rows",
    explain=_where_constant,
    hint=["Work out one column by hand: its mean and its width, both from train.", "One mean and one width a column."],
    cases={
        "five rows of five columns": (_table(11, 5, 5), _table(12, 5, 5)),  # square, so that usual mistakes run
        "a column that is constant in train": (
            _with_constant(_table(13, 8, 3), 1, 5.0), _with_constant(_table(14, 6, 3), 1, 5.0, 7.0)
        ),
        "a single row": (_table(15, 20, 4), _table(16, 1, 4)),
    },
    mistakes=[
        Mistake(partial(_standardise, figures=lambda train, rows: rows), "rows are scaled by their own figures",
                _TRAIN_ALONE),
        Mistake(partial(_standardise, figures=lambda train, rows: torch.cat([train, rows])),
                "the figures are those of train and rows together", _TRAIN_ALONE),
        Mistake(partial(_standardise, std=lambda table: table.std(0)), "the variance is divided by N - 1",
                "Tensor.std has an argument for that: correction."),
        Mistake(partial(_standardise, std=lambda table: table.var(0, correction=0)),
                "the columns are divided by their variance", "In which unit is a variance? Its root is wanted."),
        Mistake(partial(_standardise, mean=lambda table: torch.zeros(())), "the mean is not taken off",
                "Each column should be centred before it is divided."),
        Mistake(partial(_standardise, std=lambda table: torch.ones(())), "the columns are centred, and not scaled",
                "Each should have a width of about 1 afterwards."),
        Mistake(partial(_standardise, mean=torch.mean, std=lambda table: table.std(correction=0)),
                "all columns share one mean and one standard deviation", _EACH_COLUMN),
        Mistake(partial(_standardise, mean=torch.mean), "all columns share one mean", _EACH_COLUMN),
        Mistake(partial(_standardise, std=lambda table: table.std(correction=0)),
                "all columns share one standard deviation", _EACH_COLUMN),
        Mistake(partial(_standardise, mean=lambda table: table.mean(1), std=lambda table: table.std(1, correction=0)),
                "the figures are taken along the rows of train, not down its columns", _EACH_COLUMN),
        Mistake(_by_range, "the columns are scaled to the range from 0 to 1",
                "That is min-max scaling, which one outlier can ruin. Use the mean and the standard deviation."),
        Mistake(partial(_standardise, guarded=lambda std: std), "a column that is constant in train is divided by 0",
                _CONSTANT),
        Mistake(_constant_left, "a constant column stays as it is", "It should be centred like the others."),
        Mistake(_constant_zeroed, "a column that is constant in train becomes 0 in rows",
                "In rows it may vary, and that may be news. It should only be centred."),
    ],
)  # fmt: skip


# Exercise 2: a shift


def _indices(offset: Tensor, size: int) -> Tensor:
    """Where each of ``size`` places of each image comes from: [N, size]."""
    return torch.arange(size) - offset[:, None]


def _shift(
    x: Tensor, down: Tensor, right: Tensor, *,
    place: Callable[[Tensor, int], Tensor] = lambda index, size: index.clamp(0, size - 1), outside: float = 0.0,
) -> Tensor:  # fmt: skip
    """What comes in from ``outside`` is a share of the pixel at ``place(index, size)``: 0 in the right answer."""
    rows, columns = (_indices(offset, size) for offset, size in zip((down, right), x.shape[2:], strict=True))
    inside = ((rows >= 0) & (rows < x.shape[2]))[:, :, None] & ((columns >= 0) & (columns < x.shape[3]))[:, None]
    rows, columns = place(rows, x.shape[2]), place(columns, x.shape[3])
    # [N, 1, 1], [N, H, 1] and [N, 1, W] lead the index, and the channels come last
    picked = x[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(-1, 1)
    return picked * torch.where(inside, 1.0, outside)[:, None]


def _offsets(*values: int) -> Tensor:
    return torch.tensor(values)


def _images(seed: int, *shape: int) -> Tensor:
    """No pixel is black."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


_OUTSIDE = [
    "What stands beside an image? Nothing that belongs to it.",
    "Pad the image with zeros first, or multiply by a mask of what came from inside.",
]
_DIRECTION = "The pixel that arrives at row r left from row r - down[i]."

exercise_2 = Method(
    "Shift each image by steps of its own",
    right=_shift,
    what="the shifted images",
    hint=["Try one image with a single white pixel. Where does it go?",
          "For each image: which row and which column does each pixel come from, and which of them exist?"],
    atol=1e-5,  # bilinear sampling is as good an answer, with rounding errors
    cases={
        "three images of 5 by 7": (_images(21, 3, 2, 5, 7), _offsets(1, -2, 0), _offsets(-3, 1, 2)),
        "four square images": (_images(22, 4, 1, 6, 6), _offsets(0, 3, -1, 2), _offsets(0, 0, -4, 1)),
        "shifts as large as the image and larger": (
            _images(23, 4, 3, 4, 5), _offsets(4, -9, 0, 1), _offsets(0, 2, -5, 7)
        ),
        "a single image": (_images(24, 1, 1, 3, 4), _offsets(-1), _offsets(1)),
    },
    mistakes=[
        Mistake(partial(_shift, place=torch.remainder, outside=1.0),
                "what leaves the image on one side comes back on the other", _OUTSIDE),
        Mistake(partial(_shift, outside=1.0), "the edge of the image is repeated", _OUTSIDE),
        Mistake(lambda x, down, right: _shift(x, down[:1].expand_as(down), right[:1].expand_as(right)),
                "all images are moved like the first", "down[i] and right[i] belong to image i."),
        Mistake(lambda x, down, right: _shift(x, right, down), "down and right are swapped",
                "x is [N, C, H, W]. Which dimension runs down?"),
        Mistake(lambda x, down, right: _shift(x, -down, -right), "the images move up and to the left", _DIRECTION),
        Mistake(lambda x, down, right: _shift(x, -down, right), "the images move up where they should move down",
                _DIRECTION),
        Mistake(lambda x, down, right: _shift(x, down, -right), "the images move left where they should move right",
                "The pixel that arrives at column c left from column c - right[i]."),
        Mistake(lambda x, down, right: _shift(x, down, 0 * right), "the images are moved down, and not to the right",
                "There are two shifts for each image."),
        Mistake(lambda x, down, right: _shift(x, 0 * down, right), "the images are moved to the right, and not down",
                "There are two shifts for each image."),
        Mistake(lambda x, down, right: x, "the images stay where they are", "Is the shifted batch what you return?"),
    ],
)  # fmt: skip


# Exercise 3: mixup

Mixed = tuple[Tensor, Tensor]


def _each_image(lam: Tensor) -> Tensor:
    return lam[:, None, None, None]


def _mixed(
    x: Tensor, y: Tensor, lam: Tensor, partner: Tensor, classes: int, *,
    images: Callable[[Tensor, Tensor], Tensor] = lambda lam, partner: lam,
    labels: Callable[[Tensor, Tensor], Tensor] = lambda lam, partner: lam,
    along: Callable[[Tensor], Tensor] = _each_image,
) -> Mixed:  # fmt: skip
    """Mixup whose shares are ``images(lam, partner)`` of each image and ``labels(lam, partner)`` of its label."""
    own, given = along(images(lam, partner)), labels(lam, partner)[:, None]
    rows = F.one_hot(y, classes).to(x.dtype)
    return own * x + (1 - own) * x[partner], given * rows + (1 - given) * rows[partner]


def _averaged_labels(x: Tensor, y: Tensor, lam: Tensor, partner: Tensor, classes: int) -> Mixed:
    return _mixed(x, y, lam, partner, classes)[0], lam * y + (1 - lam) * y[partner]


def _overwritten(x: Tensor, y: Tensor, lam: Tensor, partner: Tensor, classes: int) -> Mixed:
    rows = lam.new_zeros(len(y), classes).scatter(1, y[:, None], lam[:, None])
    return _mixed(x, y, lam, partner, classes)[0], rows.scatter(1, y[partner][:, None], 1 - lam[:, None])


def _fewer_columns(x: Tensor, y: Tensor, lam: Tensor, partner: Tensor, classes: int) -> Mixed:
    return _mixed(x, y, lam, partner, int(y.max()) + 1)


def _inverse(partner: Tensor) -> Tensor:
    """Whose partner each image is: the last one, or itself where it is nobody's."""
    whose = torch.arange(len(partner))
    whose[partner] = torch.arange(len(partner))
    return whose


def _mixup_case(seed: int, shape: tuple[int, ...], y: list[int], partner: list[int], classes: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, lam = torch.rand(shape, generator=generator), torch.rand(len(y), generator=generator) * 0.8 + 0.1
    return x, torch.tensor(y), lam, torch.tensor(partner), classes


_ONE_EACH = [
    "lam is [N] and x is [N, C, H, W]. Broadcasting lines shapes up from the right: which dimension does lam meet?",
    "lam.view(-1, 1, 1, 1) puts it along the images.",
]
_ITS_LABEL = "An image that is a third of a seven should be called a third of a seven."

exercise_3 = Method(
    "Mixup, its random numbers given",
    right=_mixed,
    what=("the mixed images", "the mixed labels"),
    hint=["Take a batch of two images. What should come out for lam = [1, 0]?",
          "The same two shares stand before the images and before the rows of labels."],
    cases={
        # As many channels, rows and columns as images: a wrong broadcast runs
        "a square batch": _mixup_case(31, (4, 4, 4, 4), [0, 3, 1, 2], [1, 2, 3, 0], 5),
        "partners that occur twice": _mixup_case(32, (5, 1, 3, 2), [2, 0, 1, 2, 0], [3, 3, 0, 1, 1], 3),
        "partners of the same class, and itself": _mixup_case(33, (4, 2, 2, 3), [1, 1, 0, 2], [1, 0, 2, 1], 3),
    },
    mistakes=[
        Mistake(partial(_mixed, images=lambda lam, partner: 1 - lam, labels=lambda lam, partner: 1 - lam),
                "the shares are swapped: lam goes to the partner", "With lam = 1, each image should stay as it is."),
        Mistake(partial(_mixed, labels=lambda lam, partner: 1 - lam), "the shares are swapped in the labels only",
                _ITS_LABEL),
        Mistake(partial(_mixed, images=lambda lam, partner: 1 - lam), "the shares are swapped in the images only",
                _ITS_LABEL),
        Mistake(partial(_mixed, labels=lambda lam, partner: torch.ones_like(lam)),
                "the images are mixed, and the labels are not", _ITS_LABEL),
        Mistake(partial(_mixed, labels=lambda lam, partner: torch.zeros_like(lam)),
                "each label is that of the partner alone", _ITS_LABEL),
        Mistake(partial(_mixed, labels=lambda lam, partner: (lam > 0.5).to(lam)),
                "each label is that of the larger share alone", _ITS_LABEL),
        Mistake(partial(_mixed, images=lambda lam, partner: torch.ones_like(lam)),
                "the labels are mixed, and the images are not", "Which images does partner name?"),
        Mistake(_averaged_labels, "the numbers of the classes are averaged",
                "Half a 2 and half a 4 is no 3. Make rows of probabilities first: F.one_hot."),
        Mistake(partial(_mixed, images=lambda lam, partner: lam[:1].expand_as(lam),
                        labels=lambda lam, partner: lam[:1].expand_as(lam)),
                "all images are mixed in the share of the first", "lam[i] belongs to image i."),
        Mistake(partial(_mixed, images=lambda lam, partner: lam.mean().expand_as(lam),
                        labels=lambda lam, partner: lam.mean().expand_as(lam)),
                "all images are mixed in the mean share", "lam[i] belongs to image i."),
        Mistake(partial(_mixed, images=lambda lam, partner: lam[partner], labels=lambda lam, partner: lam[partner]),
                "each image is mixed in the share of its partner", "lam[i] belongs to image i, as it is."),
        Mistake(partial(_mixed, along=lambda lam: lam), "lam runs along the columns of the images", _ONE_EACH),
        Mistake(partial(_mixed, along=lambda lam: lam[:, None]), "lam runs along the rows of the images", _ONE_EACH),
        Mistake(partial(_mixed, along=lambda lam: lam[:, None, None]), "lam runs along the channels", _ONE_EACH),
        Mistake(lambda x, y, lam, partner, classes: _mixed(x, y, lam, _inverse(partner), classes),
                "image i is mixed into image partner[i], not the other way round",
                "x[partner] is the batch whose image i is the partner of image i."),
        Mistake(lambda x, y, lam, partner, classes: _mixed(x, y, lam, torch.arange(len(x)).flip(0), classes),
                "the partners are those of the batch in reverse", "partner says who they are."),
        Mistake(_fewer_columns, "there is a column for the classes up to the largest in y, and not for all",
                "A class may be missing in a batch. F.one_hot takes their number."),
        Mistake(_overwritten, "where an image and its partner are of one class, its row does not add up to 1",
                "The second share is written over the first. It should be added."),
        Mistake(lambda *case: _mixed(*case)[::-1], "your function returns the labels first",
                "The order asked for is images, labels."),
        Mistake(lambda *case: _mixed(*case)[0], "your function returns only the images",
                "Their labels have changed too: return both."),
    ],
)  # fmt: skip


# Exercise 4: ZCA

Whitening = tuple[Tensor, Tensor]


def _covariance(train: Tensor, center: Tensor, less: int = 0) -> Tensor:
    return (train - center).T @ (train - center) / (len(train) - less)


def _zca(
    train: Tensor, eps: float, *, center: Callable[[Tensor], Tensor] = lambda train: train.mean(0), less: int = 0,
    scale: Callable[[Tensor, float], Tensor] = lambda values, eps: (values + eps).rsqrt(),
) -> Whitening:  # fmt: skip
    """``V diag(scale(values, eps)) V^T``; the covariance is about ``center(train)`` and divided by ``N - less``."""
    values, vectors = torch.linalg.eigh(_covariance(train, center(train), less))
    # Rounding leaves eigenvalues a little below zero, which have no root
    return (vectors * scale(values.clamp(min=0), eps)) @ vectors.T, train.mean(0)


def _thin(train: Tensor, eps: float) -> Whitening:
    """By a thin SVD, which leaves out the directions that the rows do not span."""
    mean = train.mean(0)
    _, widths, vt = torch.linalg.svd((train - mean) / len(train) ** 0.5, full_matrices=False)
    return (vt.T * (widths.square() + eps).rsqrt()) @ vt, mean


def _each_column_alone(train: Tensor, eps: float) -> Whitening:
    return (train.var(0, correction=0) + eps).rsqrt().diag(), train.mean(0)


def _not_turned_back(found: Any, right: Whitening, train: Tensor, eps: float) -> None:
    """Eigenvectors have no sign of their own, so what is built of them is told by what any choice of signs shares."""
    parts = found if isinstance(found, (tuple, list)) else ()
    matrix = parts[0] if len(parts) == 2 else None
    if not isinstance(matrix, Tensor) or matrix.shape != right[0].shape or not matrix.isfinite().all():
        return
    matrix = matrix.to(right[0])
    symmetric = close(matrix, matrix.T)
    if not symmetric and close(matrix @ matrix.T, right[0] @ right[0]):
        raise Wrong("the data come out white, but W is not symmetric: they are turned, and not turned back",
                    ["(x - mean) @ V has new axes. What brings the old ones back?",
                     "PCA whitening is V (Λ + eps)^(-1/2). ZCA has one more factor on the right."])  # fmt: skip
    if not symmetric and close(matrix.T @ matrix, right[0] @ right[0]):
        raise Wrong("your W is the transpose of one that whitens",
                    "The rows of x come from the left: they meet V first, and V^T last.")  # fmt: skip
    same_scales = close(torch.linalg.eigvalsh(matrix), torch.linalg.eigvalsh(right[0]))
    if symmetric and same_scales and not close(matrix, right[0]):
        raise Wrong("W has the right scales in the wrong directions",
                    ["Are the eigenvectors the rows or the columns of what eigh returns?",
                     "They are the columns: V * scale scales each of them."])  # fmt: skip


_BY_HAND = ["With eps = 0 the covariance of (train - mean) @ W is the identity. Is it?",
            "C is V Λ V^T. W has the same V, and another number in the place of each eigenvalue."]  # fmt: skip

exercise_4 = Method(
    "ZCA whitening",
    right=_zca,
    what=("W", "the mean"),
    hint=_BY_HAND,
    explain=_not_turned_back,
    cases={
        "30 rows of 4 columns, large eps": (_table(41, 30, 4) @ _drawn(42, 4, 4), 0.5),
        "5 rows of 8 columns": (_table(43, 5, 8) @ _drawn(44, 8, 8), 0.01),
        "50 rows of 2 columns, small eps": (_table(45, 50, 2) @ _drawn(46, 2, 2), 1e-4),
    },
    mistakes=[
        Mistake(partial(_zca, center=torch.zeros_like), "the covariance is not taken about the mean",
                "Taking the mean off comes first, also for the covariance."),
        Mistake(partial(_zca, less=1), "the covariance is divided by N - 1", "torch.cov has an argument: correction."),
        Mistake(partial(_zca, scale=lambda values, eps: 1 / (values.sqrt() + eps)), "eps stands outside the root",
                "It is added to the eigenvalue."),
        Mistake(partial(_zca, scale=lambda values, eps: values.rsqrt()), "eps is missing",
                "Without it a direction in which nothing varies is divided by 0."),
        Mistake(partial(_zca, scale=lambda values, eps: 1 / (values + eps)), "the square root is missing",
                "An eigenvalue is a variance. By what does a column become as wide as 1?"),
        Mistake(partial(_zca, scale=lambda values, eps: (values + eps).sqrt()),
                "the wide directions become wider: the root is not inverted", "Whitening divides."),
        Mistake(partial(_zca, scale=lambda values, eps: values + eps), "W is the covariance itself",
                "Each eigenvalue λ gives way to (λ + eps)^(-1/2)."),
        Mistake(_each_column_alone, "each column is scaled alone",
                "That leaves their correlations. The eigenvectors of the covariance mix them."),
        Mistake(_thin, "the directions in which the training rows do not vary are lost",
                "There are D eigenvalues, zeros among them. full_matrices=True, or eigh, gives all directions."),
        Mistake(lambda *case: _zca(*case)[::-1], "your function returns the mean first",
                "The order asked for is W, mean."),
        Mistake(lambda *case: _zca(*case)[0], "your function returns only W",
                "New data must be centred by the same mean: return W, mean."),
    ],
)  # fmt: skip


exercise_5 = Reading(
    "Whose augmentation saved the most labels? A figure to read",
    right=("Ben", "c"),
    choices={
        "Ada": "Ada gains the most points, but her labels do too: twice as many would have done the same",
        "Ben": "",
        "Cleo": "Cleo's lines cross: with 3,000 labels her augmentation does harm",
        "Dan": "Dan's bars overlap everywhere: his runs cannot tell whether anything was saved",
    },
    reasons={
        "a": "the gain in points is the largest elsewhere, and a point is cheap where the line is steep",
        "b": "how accurate it is says nothing about what augmentation did",
        "c": "",
        "d": "that holds for all four, and points are not labels",
    },
    hint="From a square, go to the right until the circles are as high. How many times as many labels is that?",
    reason_hint="Along which axis are labels measured?",
)


# Exercise 6: cross-validation

Learner = Callable[[Tensor, Tensor, Tensor], Tensor]


def _correlations(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(0), y.double() - y.double().mean()
    return (x * y[:, None]).mean(0).abs() / (x.std(0) * y.std() + 1e-12)


def _nearest_mean(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    return torch.cdist(new, torch.stack([x[y == label].mean(0) for label in range(int(y.max()) + 1)])).argmin(1)


def _best(x: Tensor, y: Tensor, k: int, among: Tensor) -> Tensor:
    """The k columns of the largest correlation in the rows ``among``."""
    return _correlations(x[among], y[among]).topk(k).indices


def _on_training_rows(x: Tensor, y: Tensor, k: int, held_out: Tensor, folds: Tensor) -> Tensor:
    return _best(x, y, k, ~held_out)


def _mean_of_folds(hits: list[Tensor]) -> Tensor:
    return torch.stack([fold.mean() for fold in hits]).mean()


def _cross_validate(
    x: Tensor, y: Tensor, folds: Tensor, k: int, learn: Learner, *,
    choose: Callable[[Tensor, Tensor, int, Tensor, Tensor], Tensor] = _on_training_rows,
    taught: Callable[[Tensor], Tensor] = torch.logical_not,
    tested: Callable[[Tensor], Tensor] = lambda held_out: held_out,
    left_out: int = 0,
    mean: Callable[[list[Tensor]], Tensor] = _mean_of_folds,
) -> Tensor:  # fmt: skip
    """``choose(x, y, k, held_out, folds)`` gives the columns, ``taught`` and ``tested(held_out)`` the rows."""
    hits = []
    for fold in range(int(folds.max()) + 1 - left_out):
        held_out = folds == fold
        columns, rows, test = choose(x, y, k, held_out, folds), taught(held_out), tested(held_out)
        guess = learn(x[rows][:, columns], y[rows], x[test][:, columns])
        hits.append((guess == y[test]).double())
    return mean(hits)


def _noise(seed: int, rows: int, columns: int, *sizes: int) -> tuple[Any, ...]:
    """A table whose columns say nothing of the labels, in shuffled folds of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(rows) % 2)[torch.randperm(rows, generator=generator)]
    folds = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return _drawn(seed, rows, columns), y, folds[torch.randperm(rows, generator=generator)]


def _signal(seed: int, rows: int, columns: int, *sizes: int) -> tuple[Any, ...]:
    """As `_noise`, but the first two columns do say something."""
    x, y, folds = _noise(seed, rows, columns, *sizes)
    x[:, :2] += y[:, None]
    return x, y, folds


_KS = (1, 3, 6, 12)  # one accuracy may be right by luck, so that answers are told apart by several


def _accuracies(rule: Rule, *case: Any) -> tuple[Any, ...]:
    return tuple(rule(*case, k, _nearest_mean) for k in _KS)


_PEEKED = [
    "Which rows does `correlations` see, and are the held-out ones among them?",
    "Whatever is learnt from labels, columns included, is learnt once more in each fold, from its training rows.",
]
_ONLY_COLUMNS = "Only the choice of the columns was wrong. Leave the rest as it was."

exercise_6 = Method(
    "Find the bug: a cross-validation that promises too much",
    right=_cross_validate,
    ask=_accuracies,
    what=[f"the accuracy with k = {k}" for k in _KS],
    hint=["Follow the labels of a held-out row: where do they enter?", "Only where its guess is judged."],
    cases={
        "noise in four equal folds": _noise(61, 40, 200, 10, 10, 10, 10),
        "noise in uneven folds": _noise(62, 45, 100, 20, 12, 8, 5),
        "two columns that tell something": _signal(63, 60, 50, 15, 15, 15, 15),
    },
    mistakes=[
        Mistake(partial(_cross_validate, choose=lambda x, y, k, held_out, folds: _best(x, y, k, folds >= 0)),
                "the columns are chosen with the help of the held-out labels", _PEEKED),
        Mistake(partial(_cross_validate, choose=lambda x, y, k, held_out, folds: _best(x, y, k, held_out)),
                "the columns are chosen on the held-out rows", "~ turns a mask round. Which rows may be looked at?"),
        Mistake(partial(_cross_validate, choose=lambda x, y, k, held_out, folds: _best(x, y, k, folds != 0)),
                "the columns are chosen once, on the training rows of the first fold",
                "Those rows are held out in the other folds. The choice belongs inside the loop."),
        Mistake(partial(_cross_validate, taught=torch.ones_like), "learn is given the held-out rows too",
                _ONLY_COLUMNS),
        Mistake(partial(_cross_validate, tested=torch.logical_not), "the rows that were learnt from are judged",
                _ONLY_COLUMNS),
        Mistake(partial(_cross_validate, choose=lambda x, y, k, held_out, folds: torch.arange(x.shape[1])),
                "no columns are chosen", "The method that is judged chooses k columns, and should go on doing so."),
        Mistake(partial(_cross_validate, choose=lambda x, y, k, held_out, folds: torch.arange(k)),
                "the first k columns are taken", "The method that is judged takes those of the largest correlation."),
        Mistake(partial(_cross_validate, choose=lambda x, y, k, held_out, folds:
                        (-_correlations(x[~held_out], y[~held_out])).topk(k).indices),
                "the columns of the smallest correlation are taken", _ONLY_COLUMNS),
        Mistake(partial(_cross_validate, left_out=1), "the last fold is left out", _ONLY_COLUMNS),
        Mistake(partial(_cross_validate, mean=lambda hits: torch.cat(hits).mean()),
                "the mean is over all rows, not over the folds",
                "That is as good a mean, but another one: a large fold counts more. Leave it as it was."),
    ],
)  # fmt: skip


# Exercises 7 and 8

EPOCHS, BATCH, RATE = 100, 50, 0.003


def _transforms(answer: Any) -> None:
    wanted = "For instance: mine = (partial(pre.random_rotation, degrees=5),)"
    if callable(answer):
        raise Wrong("expected a tuple of transforms, and this is a function alone", wanted)
    if not isinstance(answer, (tuple, list)):
        raise Wrong("expected a tuple of transforms", wanted)
    try:
        on_pixels(_few_labels().train, *answer)
    except ValueError as error:
        raise Wrong(str(error), wanted) from None


@functools.cache
def _few_labels() -> Dataset:
    return load(
        "glyphs", classes="digits", size=16, difficulty=0.5, count=4200, train_size=200, val_size=1000, test_size=3000,
        seed=9,
    )  # fmt: skip


def _augmented_accuracy(answer: Any, seed: int) -> float:
    data = _few_labels()
    recipe = Recipe(
        epochs=EPOCHS,
        batch_size=BATCH,
        optimizer=partial(torch.optim.Adam, lr=RATE),
        precision="float64",
        validate_every=EPOCHS,
        augment=on_pixels(data.train, *answer) if answer else None,
    )
    model = fresh(partial(mlp, data.input_shape, len(data.classes), width=64), recipe, seed=seed)
    with one_thread():  # several would wait for each other where the machine has other work: batches are small
        fit(model, data, recipe, seed=seed, progress=False)
        return evaluate(model, data.test).accuracy


exercise_7 = Design(
    "Design an augmentation: 0.73 with 200 labels",
    admit=_transforms,
    score=_augmented_accuracy,
    seeds=(101, 102, 103, 104),
    least=0.73,
    hint=["What do these digits differ in from image to image? Look at twenty of one class.",
          "More than one thing at once, and none of them far: small images have little to lose."],
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: what is wrong with a data set of your own",
    rubric=["copies", "labels", "the split", "the augmentation", "honesty"],
)
