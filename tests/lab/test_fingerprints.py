"""A fingerprint changes with what a run depends on, and with nothing else."""

import functools
import os
import struct
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from course_lib import optimizers
from course_lib.lab.data import load
from course_lib.lab.fingerprints import Unfingerprintable, describe, fingerprint
from course_lib.lab.models import mlp
from course_lib.lab.runtime import seed_everything
from course_lib.lab.training import Recipe

ROOT = Path(__file__).resolve().parents[2]
SCALE = 2.0


def scaled(x):
    """Uses a global."""
    return SCALE * x


def calls_another(x):
    return scaled(x) + 1


def closing_over(value):
    def inner(x):
        return x * value

    return inner


class WithCached:
    """Its class holds a lock, and a Struct."""

    LAYOUT = struct.Struct("<4sI")

    def __init__(self, rate):
        self.rate = rate

    @functools.cached_property
    def doubled(self):
        return 2 * self.rate


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")


class Rule:
    factor = 2

    def __init__(self, rate):
        self.rate = rate

    def step(self, w):
        return w - self.rate * self.factor


class Other(Rule):
    def step(self, w):
        return w + self.rate * self.factor


def network(seed=0, width=8):
    seed_everything(seed)
    return mlp((1, 4, 4), 3, width=width)


ALIKE = {
    "numbers": lambda: (1, 2.5, -0.0, "word", None, True, 1j),
    "a mapping": lambda: {"a": 1, "b": [torch.ones(2)]},
    "a tensor": lambda: torch.arange(6.0).reshape(2, 3),
    "a bfloat16 tensor that is a view": lambda: torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4)[:, 1:3],
    "an array": lambda: np.arange(5),
    "a generator": lambda: torch.Generator().manual_seed(3),
    "numpy's generator": lambda: np.random.default_rng(3),
    "a network": network,
    "a recipe": lambda: Recipe(optimizer=partial(optimizers.Adam, lr=0.1), objective=closing_over(network())),
    "a closure": lambda: closing_over(3.0),
    "an object": lambda: Rule(0.1),
    "a class with a cached property and a layout of bytes": lambda: WithCached(0.1),
    "a dataclass": Settings,
    "a method": lambda: Rule(0.1).step,
    "a data set": lambda: load("digits", train_size=50),
}


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_equal_contents_have_one_fingerprint(make):
    assert fingerprint(make()) == fingerprint(make())


DIFFERENT = {
    "numbers": (1, 2),
    "kinds of number": (1, 1.0),
    "order": ((1, 2), (2, 1)),
    "nesting": (((1,), 2), (1, (2,))),
    "shapes": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "types": (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    "one bit": (torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0]))),
    "states": (torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)),
    "weights": (network(seed=0), network(seed=1)),
    "structure": (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())),
    "settings of a layer": (nn.Dropout(0.1), nn.Dropout(0.2)),
    "closed-over numbers": (closing_over(1.0), closing_over(9.0)),
    "closed-over weights": (closing_over(network(seed=0)), closing_over(network(seed=1))),
    "settings of a partial": (partial(optimizers.Adam, lr=0.1), partial(optimizers.Adam, lr=0.2)),
    "classes": (Rule(0.1), Other(0.1)),
    "layouts of bytes": (struct.Struct("<4sI"), struct.Struct("<8sI")),
    "what a cached property computes": (functools.cached_property(lambda _: 1), functools.cached_property(lambda _: 2)),
    "optimizers": (optimizers.Adam, optimizers.AdamW),
    "functions of a library": (torch.relu, torch.tanh),
    "a wrapped function": (torch.no_grad()(closing_over(1.0)), torch.no_grad()(closing_over(2.0))),
    "lambdas in one line": (lambda x: x + 1, lambda x: x + 2),
    "fields": (Settings(), replace(Settings(), rate=0.2)),
    "seeds of data": (load("digits", train_size=50), load("digits", train_size=50, seed=1)),
    "normalisation": (
        load("digits").train,
        replace(load("digits").train, mean=(0.5,)),
    ),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_other_contents_have_another(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_a_global_that_a_function_uses_counts_even_two_calls_down(monkeypatch):
    before = fingerprint(scaled), fingerprint(calls_another)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    after = fingerprint(scaled), fingerprint(calls_another)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_chapters_code_counts_where_it_is_reached_through_its_module(tmp_path):
    """``optimizers.newton_schulz(g)`` in a learner's function depends on that function, not only on its name."""

    def uses(g):
        return optimizers.newton_schulz(g)

    before = fingerprint(uses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "newton_schulz", scaled)
        assert fingerprint(uses) != before


def test_a_function_that_calls_itself_ends():
    def countdown(n):
        return countdown(n - 1) if n else 0

    def countup(n):
        return countup(n + 1) if n else 0

    assert fingerprint(countdown) == fingerprint(countdown) != fingerprint(countup)


SOURCES = {
    "the same": ("def f(x):\n    return x + 1\n", True),
    "commented": ('def f(x):\n    """Adds."""\n    # one\n    return (x + 1)\n', True),
    "another sum": ("def f(x):\n    return x + 2\n", False),
    "another default": ("def f(x, y=1):\n    return x + 1\n", False),
}


@pytest.mark.parametrize(("source", "same"), SOURCES.values(), ids=SOURCES)
def test_code_counts_and_comments_do_not(tmp_path, source, same):
    script = (
        "import sys; sys.path.insert(0, {!r}); from f import f; from course_lib.lab.fingerprints import fingerprint"
    )

    def of(text, folder):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f.py").write_text(text)
        return run(script.format(str(tmp_path / folder)) + "; print(fingerprint(f))")

    assert (of(source, "a") == of(SOURCES["the same"][0], "b")) is same


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_process_finds_the_same():
    script = """
        from functools import partial
        from course_lib import optimizers
        from course_lib.lab.fingerprints import fingerprint
        from course_lib.lab.training import Recipe
        recipe = Recipe(optimizer=partial(optimizers.Muon, lr=0.1), watch={"a": len, "b": max})
        print(fingerprint(recipe), fingerprint({"x", "y"}))
    """
    assert run(script, PYTHONHASHSEED="1") == run(script, PYTHONHASHSEED="2")


def test_what_has_no_contents_is_named_with_the_way_to_it():
    def uses(x):
        return numbers

    numbers = (n for n in range(3))
    with pytest.raises(
        Unfingerprintable, match=r"\['objective'\] -> numbers of .*uses is generator, of which there is no"
    ):
        fingerprint({"objective": uses})


def test_describe_names_a_function_and_its_settings_without_an_address():
    assert describe(partial(torch.optim.SGD, lr=0.1)) == "SGD(lr=0.1)"
    assert describe({"a": closing_over(1)}) == "{'a': closing_over.<locals>.inner}"
    assert describe(3) == "3"


def test_an_optimizer_that_was_made_is_the_same_as_before():
    """torch wraps the step of its class when the first one is made, also where the class only inherits it."""

    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Inheriting(Mine):
        rate = 3

    before = fingerprint(Mine), fingerprint(Inheriting)
    for cls in (Mine, Inheriting):
        cls([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert getattr(Mine.step, "hooked", False), "torch still does so"
    assert (fingerprint(Mine), fingerprint(Inheriting)) == before
