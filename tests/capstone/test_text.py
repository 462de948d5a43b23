"""The second job: a text and its windows, a transformer that looks backwards only, and its objective in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from course_lib.capstone import CharTransformer, bits, documentation, next_character, windows
from course_lib.capstone.text import ALPHABET, LENGTHS, RUNGS, char_transformer, encoded, first_script, fused, up_to
from course_lib.lab.data import Split
from course_lib.lab.models import mlp
from course_lib.lab.training import evaluate

TEXT = "".join(ALPHABET[(7 * k * k + 3 * k) % len(ALPHABET)] for k in range(530))


def decoded(codes):
    return "".join(ALPHABET[int(code)] for code in codes)


@pytest.fixture
def model():
    """With weights so large that every character makes a difference."""
    torch.manual_seed(16)
    model = CharTransformer(10, 20, width=16, heads=4, depth=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def codes(count=3, length=10, classes=20, seed=5):
    return torch.randint(0, classes, (count, length), generator=torch.Generator().manual_seed(seed)).float()


# The text


def test_the_documentation_is_long_and_of_the_alphabet():
    text = documentation()
    assert len(text) > 300_000
    assert text is documentation()
    strange = sum(letter not in ALPHABET for letter in text)
    assert strange < 1e-3 * len(text), "nearly nothing becomes a question mark"
    found = encoded(text)
    assert (found.min(), found.max()) >= (0, 0)
    assert found.max() < len(ALPHABET)
    assert decoded(found[:2000]) == "".join(c if c in ALPHABET else "?" for c in text[:2000])
    assert "torch" in text


def test_the_alphabet_is_told_apart_and_others_are_question_marks():
    assert len(set(ALPHABET)) == len(ALPHABET) == 96
    assert encoded(ALPHABET).tolist() == list(range(96))
    assert decoded(encoded("é\tx\n")) == "??x\n"
    assert encoded("ab").dtype == torch.int64


@pytest.mark.parametrize("length", [1, 7, 10, 64])
def test_windows_make_up_the_text_and_labels_follow(length):
    data = windows(TEXT, length)
    splits = (data.train, data.val, data.test)
    assert data.input_shape == (length,)
    together = torch.cat([split.inputs for split in splits]).flatten()
    assert TEXT.startswith(decoded(together)), "in order, nothing twice, nothing left out between"
    assert len(TEXT) - 1 - len(together) < length, "all that fits"
    labels = torch.cat([split.labels for split in splits])
    assert decoded(labels) == "".join(TEXT[end] for end in range(length, len(together) + 1, length))
    assert data.classes == tuple(ALPHABET)


def test_the_last_parts_are_for_validation_and_test():
    data = windows(TEXT, 5, val=0.2, test=0.1)
    assert [len(split) for split in (data.train, data.val, data.test)] == [74, 21, 10]
    assert TEXT[: 5 * 74] == decoded(data.train.inputs.flatten())
    assert all(split.mean == (0.0,) * 5 and split.std == (1.0,) * 5 for split in (data.train, data.val, data.test))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"val": 0.0}, "val=0.0: must be a share"),
        ({"val": 0.5, "test": 0.5}, "test=0.5: must be a share above 0 that leaves something"),
        ({"length": 300}, "text=1: must be long enough"),
    ],
)
def test_windows_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows(TEXT, **arguments)


# The network


@pytest.mark.parametrize("attend", [None, fused], ids=["written out", "fused"])
@pytest.mark.parametrize("place", [1, 4, 9])
def test_a_later_character_changes_nothing_before_it(model, attend, place):
    for layer in model.layers:
        layer.attend = attend or layer.attend
    x = codes()
    other = x.clone()
    other[:, place] = (other[:, place] + 1) % 20
    before, after = model.everywhere(x), model.everywhere(other)
    torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-6)
    moved = (after[:, place:] - before[:, place:]).abs().amax((0, 2))
    assert (moved > 1e-3).all(), "and what comes after it, all of it"


def test_written_out_and_fused_agree(model):
    other = CharTransformer(10, 20, width=16, heads=4, depth=2, attend=fused)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.everywhere(codes()), model.everywhere(codes()), rtol=1e-5, atol=1e-5)


def test_the_answer_is_that_of_the_last_place(model):
    x = codes()
    torch.testing.assert_close(model(x), model.everywhere(x)[:, -1])
    assert model(x).shape == (3, 20)
    torch.testing.assert_close(model.everywhere(x[:, :4]), model.everywhere(x)[:, :4], rtol=0, atol=1e-6)


def test_the_place_of_a_character_matters(model):
    """The same letter everywhere: without places every answer is the same, since all gather the same."""
    x = torch.full((1, 10), 7.0)
    with torch.no_grad():
        answers = model.everywhere(x)[0]
        assert (answers[1:] - answers[:-1]).abs().amax(1).min() > 1e-2
        model.places.zero_()
        torch.testing.assert_close(model.everywhere(x)[0], answers_alike(model.everywhere(x)[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(CharTransformer(10, 20).places, torch.zeros(10, 64))


def answers_alike(answers):
    return answers[:1].expand_as(answers)


def test_a_layer_is_attention_and_two_linear_layers(model):
    """Against torch's own multi-head attention with the same weights."""
    layer, x = model.layers[0], torch.randn(2, 10, 16)
    normed = layer.norm1(x)
    mask = torch.triu(torch.full((10, 10), -math.inf), 1)
    attended, _ = F.multi_head_attention_forward(
        normed.transpose(0, 1), normed.transpose(0, 1), normed.transpose(0, 1), 16, 4, layer.qkv.weight, None, None,
        None, False, 0.0, layer.out.weight, None, attn_mask=mask, need_weights=False,
    )  # fmt: skip
    mixed = x + attended.transpose(0, 1)
    hidden = F.gelu(F.linear(layer.norm2(mixed), layer.up.weight))
    torch.testing.assert_close(layer(x), mixed + F.linear(hidden, layer.down.weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"width": 10, "heads": 4}, "width=10: must be a multiple of heads=4"), ({"depth": 0}, "depth=0")],
)
def test_a_network_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        CharTransformer(10, 20, **arguments)


# The objective


def test_the_objective_is_the_mean_over_all_places_in_float64(model):
    model = model.double()
    x, y = codes().double(), torch.tensor([3, 0, 19])
    following = [[*map(int, row[1:]), int(label)] for row, label in zip(x, y, strict=True)]
    total = 0.0
    for row, wanted in zip(x, following, strict=True):
        for place in range(10):
            logits = model(row[None, : place + 1])[0].tolist()  # only what came before
            total -= logits[wanted[place]] - math.log(math.fsum(map(math.exp, logits)))
    assert next_character(model, x, y).item() == pytest.approx(total / 30, rel=1e-12)


def test_bits_are_those_of_the_objective(model):
    x, y = codes(600), torch.zeros(600, dtype=torch.int64)
    split = Split(x, y, (0.0,) * 10, (1.0,) * 10)
    with torch.no_grad():
        wanted = next_character(model, x, y).item() / math.log(2)
    assert bits(model, split) == pytest.approx(wanted, rel=1e-4)
    assert bits(model, split) == pytest.approx(
        evaluate(model, split, objective=next_character).loss * math.log2(math.e)
    )


def test_a_uniform_guess_costs_the_logarithm_of_the_alphabet():
    data = windows(TEXT, 8)
    network = char_transformer(data.input_shape, len(data.classes))
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    assert bits(network, data.test) == pytest.approx(math.log2(96), rel=1e-5)


def test_the_objective_needs_a_network_that_answers_everywhere():
    with pytest.raises(AttributeError, match="everywhere"):
        next_character(mlp((10,), 20), codes(), torch.zeros(3, dtype=torch.int64))


# The ladder


def test_the_ladder_up_to_each_rung():
    names = list(LENGTHS)
    assert names[1:] == [rung.name for rung in RUNGS]
    assert up_to(names[0]).recipe.batch_size == first_script().recipe.batch_size
    top = up_to(names[-1])
    assert (top.recipe.precision, top.recipe.epochs) == ("bfloat16", LENGTHS["bfloat16"])
    assert top.network.keywords == {"attend": fused}
    assert isinstance(top.network, partial)
    before = up_to("one cycle")
    assert (before.recipe.precision, before.network) == ("float32", char_transformer)
    assert before.recipe.schedule is not None
    assert up_to("higher rate").recipe.schedule is None
    with pytest.raises(ValueError, match="name='Adam': must be one of first script"):
        up_to("Adam")
