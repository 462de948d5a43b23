"""The second job: a transformer that guesses the next character, on text that every reader of the course has.

======================  =============================================================================================
name                    what it gives
======================  =============================================================================================
``documentation``       the documentation of torch's functions, as one string: it lies in the pinned package itself
``windows``             a text as a ``Dataset`` for ``fit``: stretches of characters, and the one that follows
``CharTransformer``     a decoder of the usual kind (Radford et al. 2019, GPT-2), small
``next_character``      the objective: cross-entropy of every character given those before it
``bits``                bits a character on a split
``RUNGS``               what carries over from the images, and what is new
======================  =============================================================================================

Sources: Vaswani et al. 2017, arXiv:1706.03762; the size and the habit of characters are those of Karpathy's nanoGPT.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.capstone.rules import Entry
from course_lib.efficiency.attention import naive_attention
from course_lib.efficiency.ladder import Rung
from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Dataset, Split
from course_lib.lab.training import Recipe, evaluate
from course_lib.optimizers import Composite, Muon
from course_lib.schedules import linear_between, one_cycle, schedule

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""The characters that are told apart; others become a question mark."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[N, heads, T, d]`` -> what each place gathers from those up to it."""


@lru_cache(maxsize=1)
def documentation() -> str:
    """The descriptions of torch's functions, one after the other: some 400,000 characters of English and formulas.

    They are the long strings of ``torch/_torch_docs.py``, which is read, not run.
    """
    source = (Path(torch.__file__).parent / "_torch_docs.py").read_text(encoding="utf-8")
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    long = (" ".join(text.split(" ")).strip() for text in texts if isinstance(text, str) and len(text) > 200)
    return "\n\n".join(long)


def encoded(text: str) -> Tensor:
    """Characters as positions in ``ALPHABET``, int64 ``[len(text)]``."""
    codes = {letter: i for i, letter in enumerate(ALPHABET)}
    return torch.tensor([codes.get(letter, codes["?"]) for letter in text])


def windows(text: str, length: int = 64, *, val: float = 0.1, test: float = 0.1) -> Dataset:
    """Cut a text into stretches of ``length`` characters, each with the character that follows it.

    Inputs are the codes ``[N, length]`` (as float32, which holds them exactly: a data set of numbers), labels the next
    characters ``[N]``. The last parts of the text are for validation and test.

    Raises
    ------
    ValueError : the text is too short for a window in each split, or the shares leave nothing to train on.
    """
    at_least(1, length=length)
    require("val", val, lambda share: 0 < share < 1, "a share between 0 and 1")
    require("test", test, lambda share: 0 < share < 1 - val, "a share above 0 that leaves something to train on")
    codes, count = encoded(text), (len(text) - 1) // length
    last, middle = round(count * test), round(count * val)
    require(
        "text", count, lambda n: min(last, middle, n - last - middle) >= 1, "long enough for a window in each split"
    )
    x = codes[: count * length].view(count, length).float()
    y = codes[length : count * length + 1 : length]
    ends = [0, count - last - middle, count - last, count]
    train, validation, held = (
        Split(x[a:b], y[a:b], mean=(0.0,) * length, std=(1.0,) * length)  # codes stay codes
        for a, b in pairwise(ends)
    )
    return Dataset("documentation", train, validation, held, classes=tuple(ALPHABET))


# --- The network ------------------------------------------------------------------------------------------------------

written_out: Attend = partial(naive_attention, causal=True)
"""Attention as the formula has it: all scores in memory."""
fused: Attend = partial(F.scaled_dot_product_attention, is_causal=True)
"""The same in one call (chapter 15)."""


class Layer(nn.Module):
    """Attention, then two linear layers, each added to what came in, normalised before."""

    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[N, T, width]`` to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, T, width] -> [N, heads, T, d]
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """Codes ``[N, T]`` to the logits of the next character ``[N, classes]``; ``everywhere`` gives those of each place.

    Parameters
    ----------
    length, classes : characters that are seen, and that are told apart.
    width, depth, heads : numbers of a token, layers, heads of attention.
    attend : ``written_out`` or ``fused``.
    """

    def __init__(
        self,
        length: int,
        classes: int,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        attend: Attend = written_out,
    ) -> None:
        super().__init__()
        at_least(1, length=length, classes=classes, depth=depth, heads=heads)
        require("width", width, lambda w: w % heads == 0, f"a multiple of heads={heads}")
        self.letters, self.places = nn.Embedding(classes, width), nn.Parameter(torch.zeros(length, width))
        self.layers = nn.Sequential(*(Layer(width, heads, attend) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for layer in self.layers:  # as GPT-2: what is added to the stream starts small
            nn.init.normal_(layer.out.weight, std=0.02)  # type: ignore[union-attr, arg-type]
            nn.init.normal_(layer.down.weight, std=0.02)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(self.letters.weight, std=0.02)

    def everywhere(self, x: Tensor) -> Tensor:
        """Codes ``[N, T]`` to logits ``[N, T, classes]``, each from the characters up to its place."""
        return self.head(self.norm(self.layers(self.letters(x.long()) + self.places[: x.shape[1]])))

    def forward(self, x: Tensor) -> Tensor:
        """Codes ``[N, T]`` to the logits of what follows ``[N, classes]``."""
        return self.everywhere(x)[:, -1]


def char_transformer(input_shape: tuple[int, ...], classes: int, *, attend: Attend = written_out) -> CharTransformer:
    """Return the small transformer that takes part in the race."""
    return CharTransformer(input_shape[0], classes, attend=attend)


def next_character(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy (nats) of every character given those before it, ``y`` the last of them."""
    logits = model.everywhere(x)  # type: ignore[operator]  # ours has it
    targets = torch.cat([x[:, 1:].long(), y[:, None]], dim=1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def bits(model: nn.Module, split: Split) -> float:
    """Bits a character on a split."""
    return evaluate(model, split, objective=next_character, batch_size=256).loss / math.log(2)


# --- The ladder -------------------------------------------------------------------------------------------------------


def first_script(batch_size: int = 64) -> Entry:
    """Return the first script: attention written out, AdamW at its default rate."""
    recipe = Recipe(epochs=1, batch_size=batch_size, optimizer=torch.optim.AdamW, objective=next_character)
    return Entry(network=char_transformer, recipe=recipe)


def muon_and_adam(named: Iterable[tuple[str, nn.Parameter]], lr: float = 0.02) -> Composite:
    """Muon for the matrices inside the layers, AdamW for letters, places, norms and the head."""
    named = list(named)
    inner = [p for name, p in named if name.startswith("layers") and p.ndim == 2]
    other = [p for name, p in named if not (name.startswith("layers") and p.ndim == 2)]
    return Composite(Muon(inner, lr=lr, weight_decay=0.0), torch.optim.AdamW(other, lr=lr / 4, weight_decay=0.0))


def higher_cycle(step: int, total: int) -> float:
    """Up to the peak in a fifth of the run, then down to nothing, in straight lines."""
    return one_cycle(step, total, pct_start=0.2, between=linear_between)


def _recipe(entry: Entry, **slots: object) -> Entry:
    return replace(entry, recipe=replace(entry.recipe, **slots))  # type: ignore[arg-type]


RUNGS: tuple[Rung[Entry], ...] = (
    Rung("higher rate", lambda entry: _recipe(entry, optimizer=partial(torch.optim.AdamW, lr=3e-3))),
    Rung("one cycle", lambda entry: _recipe(entry, schedule=schedule(higher_cycle))),
    Rung("small batches", lambda entry: _recipe(entry, batch_size=16)),
    Rung("Muon", lambda entry: _recipe(entry, optimizer=muon_and_adam)),
    Rung("one call for attention", lambda entry: replace(entry, network=partial(char_transformer, attend=fused))),
    Rung("bfloat16", lambda entry: _recipe(entry, precision="bfloat16")),
)

TARGET = 1.9
"""Bits a character on text that was not trained on."""

LENGTHS = {
    "first script": 12,
    "higher rate": 9,
    "one cycle": 7,
    "small batches": 4,
    "Muon": 3,
    "one call for attention": 3,
    "bfloat16": 3,
}
"""Epochs of each rung of the ladder: the fewest that pass the target by 0.01 on the validation text, with seed 100."""


def up_to(name: str) -> Entry:
    """Return the ladder up to a rung, with the length of its run.

    Raises
    ------
    ValueError : there is no such rung.
    """
    require("name", name, lambda given: given in LENGTHS, f"one of {', '.join(LENGTHS)}")
    entry = first_script()
    for rung in RUNGS[: list(LENGTHS).index(name)]:
        entry = rung.apply(entry)
    return entry.lasting(LENGTHS[name])
