"""Checks of chapter 1: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

from functools import partial

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn.functional as F
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.model_selection import PredefinedSplit
from sklearn.preprocessing import StandardScaler

from course_lib import preprocessing as pre
from course_lib.checks import chapter_01
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "01_data_preprocessing.ipynb"

standardise, shift, mixed, zca, cross_validate = (
    getattr(chapter_01, f"exercise_{number}").right for number in (1, 2, 3, 4, 6)
)


def sklearn_standardise(train, rows):
    return torch.as_tensor(StandardScaler().fit(train.numpy()).transform(rows.numpy()))


def standardise_in_a_loop(train, rows):
    result = rows.clone()
    for column in range(train.shape[1]):
        values = train[:, column].tolist()
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        result[:, column] -= mean
        if variance > 0:
            result[:, column] /= variance**0.5
    return result


def scipy_shift(x, down, right):
    moves = zip(x.numpy(), down.tolist(), right.tolist(), strict=True)
    return torch.as_tensor(np.stack([scipy.ndimage.shift(image, (0, d, r), order=0) for image, d, r in moves]))


def shift_by_slices(x, down, right):
    result = torch.zeros_like(x)
    height, width = x.shape[2:]
    for image, new, d, r in zip(x, result, down.tolist(), right.tolist(), strict=True):
        if abs(d) < height and abs(r) < width:
            new[:, max(d, 0) : height + min(d, 0), max(r, 0) : width + min(r, 0)] = image[
                :, max(-d, 0) : height + min(-d, 0), max(-r, 0) : width + min(-r, 0)
            ]
    return result


def sampled_shift(x, down, right):
    """Bilinear, with its rounding errors."""
    height, width = x.shape[2:]
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, 0, 2], theta[:, 1, 2] = -2 * right / width, -2 * down / height
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def mixed_by_matrix(x, y, lam, partner, classes):
    """Both are products with one matrix: lam on its diagonal, and the rest at the partner."""
    shares = torch.diag(lam)
    shares.index_put_((torch.arange(len(y)), partner), 1 - lam, accumulate=True)
    return [torch.einsum("ij,jchw->ichw", shares, x), shares @ torch.eye(classes)[y]]


def mixed_in_a_loop(x, y, lam, partner, classes):
    images, labels = torch.empty_like(x), torch.zeros(len(x), classes)
    for i, j in enumerate(partner.tolist()):
        images[i] = torch.lerp(x[j], x[i], lam[i])
        labels[i, y[i]] += lam[i]
        labels[i, y[j]] += 1 - lam[i]
    return images, labels


def zca_by_matrix_power(train, eps):
    covariance = np.cov(train.numpy(), rowvar=False, bias=True) + eps * np.eye(train.shape[1])
    return torch.as_tensor(scipy.linalg.inv(scipy.linalg.sqrtm(covariance).real)), train.mean(0)


def zca_by_svd(train, eps):
    mean = train.mean(0)
    _, widths, vt = torch.linalg.svd(train - mean, full_matrices=True)
    values = torch.zeros(train.shape[1], dtype=train.dtype)
    values[: len(widths)] = widths.square() / len(train)
    return vt.T @ torch.diag((values + eps) ** -0.5) @ vt, mean


def cross_validate_by_sklearn(x, y, folds, k, learn):
    """F of an analysis of variance ranks two classes as the correlation does."""
    scores = []
    for train, test in PredefinedSplit(folds.numpy()).split():
        chosen = SelectKBest(f_classif, k=k).fit(x[train].numpy(), y[train].numpy()).get_support()
        guess = learn(x[train][:, chosen], y[train], x[test][:, chosen])
        scores.append(float((guess == y[test]).float().mean()))
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("01.1", sklearn_standardise),
        ("01.1", standardise_in_a_loop),
        ("01.2", scipy_shift),
        ("01.2", shift_by_slices),
        ("01.2", sampled_shift),
        ("01.3", mixed_by_matrix),
        ("01.3", mixed_in_a_loop),
        ("01.4", zca_by_matrix_power),
        ("01.4", zca_by_svd),
        ("01.6", cross_validate_by_sklearn),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def given(x, y, folds, k, learn):
    """The function that exercise 6 gives."""
    columns = chapter_01._correlations(x, y).topk(k).indices
    hits = []
    for fold in range(int(folds.max()) + 1):
        held_out = folds == fold
        guess = learn(x[~held_out][:, columns], y[~held_out], x[held_out][:, columns])
        hits.append((guess == y[held_out]).double().mean())
    return torch.stack(hits).mean()


def test_what_is_to_be_mended_promises_much_on_noise():
    case = chapter_01.exercise_6.cases["noise in four equal folds"]
    promised = chapter_01._accuracies(given, *case)[-1]
    kept = chapter_01._accuracies(cross_validate, *case)[-1]
    assert promised > 0.85
    assert 0.3 < kept < 0.7


# Usual mistakes


def with_a_tiny_number(tiny):
    return lambda train, rows: (rows - train.mean(0)) / (train.std(0, correction=0) + tiny)


def scaled_in_place(train, rows):
    result = standardise(train, rows)
    rows -= train.mean(0)
    return result


def not_turned_back(train, eps, signs=1, flipped=()):
    """PCA whitening, in which each sign and the order of the new axes are free."""
    values, vectors = torch.linalg.eigh(torch.cov(train.T, correction=0))
    return (signs * vectors * (values + eps).rsqrt()).flip(flipped), train.mean(0)


def by_cholesky(train, eps):
    covariance = torch.cov(train.T, correction=0) + eps * torch.eye(train.shape[1], dtype=train.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(covariance)), train.mean(0)


def transposed(train, eps):
    matrix, mean = not_turned_back(train, eps, signs=-1)
    return matrix.T, mean


def rows_for_columns(train, eps):
    values, vectors = torch.linalg.eigh(torch.cov(train.T, correction=0))
    return (vectors.T * (values + eps).rsqrt()) @ vectors, train.mean(0)


def repeated_outside(x, down, right):
    """Right unless an image is moved out of sight."""
    gone = (down.abs() >= x.shape[2]) | (right.abs() >= x.shape[3])
    return torch.where(gone[:, None, None, None], x, shift(x, down, right))


def by_union(x, y, folds, k, learn):
    """Columns that did well in any fold."""
    columns = [chapter_01._best(x, y, k, folds != fold) for fold in range(int(folds.max()) + 1)]
    chosen = torch.cat(columns).unique()
    return cross_validate(x[:, chosen], y, folds, len(chosen), learn)


WEAK = [
    (),
    (partial(pre.random_rotation, degrees=5),),
    (pre.random_flip,),
    (pre.trivial_augment,),
]

MISTAKES = [
    ("01.1", with_a_tiny_number(1e-7), "constant in train is divided by a tiny number", "what happens in the division"),
    ("01.1", with_a_tiny_number(1e-12), "divided by a tiny number, .* explode .on a column", "what happens in the"),
    ("01.1", lambda *case: standardise(*case).nan_to_num() + (case[0].std(0) == 0), "centred, and no more", "division"),
    ("01.1", lambda train, rows: standardise(train, rows) / 3, "the scaled rows is not right", "one column by hand"),
    ("01.1", lambda train, rows: standardise(train, rows)[0], r"shape \[5, 5\], and has \[5\]", "by hand"),
    ("01.1", scaled_in_place, "changes its argument rows in place", "still needs"),
    ("01.2", lambda x, down, right: shift(x, down // 2, right), "the shifted images is not right", "single white"),
    ("01.2", repeated_outside, "not right: .* .on shifts as large as the image", "single white"),
    ("01.2", lambda x, down, right: shift(x, down, right)[:, 0], r"have shape \[3, 2, 5, 7\], and has", "single white"),
    ("01.3", lambda *case: mixed(*case)[::-1][:1], r"return 2 values .* and returns 1 values", "batch of two"),
    ("01.3", lambda x, *rest: (mixed(x, *rest)[0], mixed(x, *rest)[1].log()), "mixed labels is not finite", "two"),
    ("01.3", lambda x, *rest: mixed(2 * x, *rest), "the mixed images is not right", "batch of two"),
    ("01.4", not_turned_back, "W is not symmetric: they are turned, and not turned back", "old ones back"),
    ("01.4", partial(not_turned_back, signs=-1), "turned, and not turned back", "old ones back"),
    ("01.4", partial(not_turned_back, flipped=(1,)), "turned, and not turned back", "old ones back"),
    ("01.4", by_cholesky, "turned, and not turned back", "old ones back"),
    ("01.4", transposed, "the transpose of one that whitens", "from the left"),
    ("01.4", rows_for_columns, "right scales in the wrong directions", "rows or the columns"),
    ("01.4", lambda train, eps: (-zca(train, eps)[0], train.mean(0)), "W is not right", "identity"),
    ("01.4", lambda train, eps: (zca(train, eps)[0], train.mean()), r"the mean should have shape \[4\]", "identity"),
    ("01.4", lambda train, eps: (zca(train, eps)[0], 0 * train.mean(0)), "the mean is not right", "identity"),
    ("01.6", given, "with the help of the held-out labels", "Which rows does"),
    ("01.6", by_union, "the accuracy with k = . is not right", "held-out row"),
    ("01.7", partial(pre.random_rotation, degrees=5), "a function alone", "For instance"),
    ("01.7", (pre.rotate, pre.random_flip, 3), "transforms holds 3", "For instance"),
    ("01.7", (lambda x, generator: x[:, :, :9],), "your design raised RuntimeError", ""),
    *[("01.7", weak, r"mean accuracy of 0\.[56]\d", "What do these digits differ in") for weak in WEAK],
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


@pytest.mark.parametrize("exercise", checking.asked(NOTEBOOK))
def test_the_printed_solutions_pass(exercise):
    names = {"torch": torch, "pre": pre, "partial": partial, "correlations": chapter_01._correlations}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
