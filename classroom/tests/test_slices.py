"""What a learner's cells need of a chapter."""

from classroom.judge.slices import needed

CHAPTER = [
    "import torch\nfrom course_lib.lab import Recipe, fit, load\nfrom functools import partial",
    "data = load('glyphs')\nbase = Recipe(epochs=3)\nsmall = replace(base, epochs=1)",
    "def rule(w):\n    return w * torch.pi\n\nnetwork = partial(mlp, data.input_shape)",
    "trained = fit(network, data, base)",
]


def test_only_what_is_named_and_what_that_needs() -> None:
    found = needed(CHAPTER, ["mine = replace(small, optimizer=rule)"])
    assert found.statements == (
        "import torch", "from course_lib.lab import Recipe", "base = Recipe(epochs=3)",
        "small = replace(base, epochs=1)", "def rule(w):\n    return w * torch.pi",
    )  # fmt: skip
    assert not found.left_out


def test_what_takes_long_is_left_out_and_said() -> None:
    assert needed(CHAPTER, ["mine = trained"]).left_out == {"trained"}
    assert needed(CHAPTER, ["mine = network"]).left_out == {"data", "network"}


def test_a_cell_that_is_no_python_needs_nothing() -> None:
    assert needed(CHAPTER, ["def broken(:"]).statements == ()
