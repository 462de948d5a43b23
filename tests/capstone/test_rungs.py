"""The ladders: each rung changes its own slot and nothing else. How large its values are is nobody's business here."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch

from course_lib.capstone import NAMES, RUNGS, applied, example_net, first_script, quick_net, rungs, text
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.training import Recipe

CHANGES = {
    "whole batches": {"per_image"},
    "SGD with momentum": {"optimizer"},
    "one cycle": {"schedule"},
    "quick network": {"network"},
    "small batches": {"batch_size"},
    "channels last, bf16": {"channels_last", "precision"},
}
TEXT_CHANGES = {
    "higher rate": {"optimizer"},
    "one cycle": {"schedule"},
    "small batches": {"batch_size"},
    "Muon": {"optimizer"},
    "one call for attention": {"network"},
    "bfloat16": {"precision"},
}


def settings(entry):
    own = {field.name: getattr(entry, field.name) for field in fields(entry) if field.name != "recipe"}
    return own | {field.name: getattr(entry.recipe, field.name) for field in fields(Recipe)}


def changed(before, after):
    return {
        slot for slot, value in settings(before).items() if fingerprint(settings(after)[slot]) != fingerprint(value)
    }


@pytest.mark.parametrize(
    ("script", "ladder", "changes"),
    [(first_script, RUNGS, CHANGES), (text.first_script, text.RUNGS, TEXT_CHANGES)],
    ids=["images", "text"],
)
def test_each_rung_changes_its_own_slot_and_leaves_the_entry_alone(script, ladder, changes):
    assert [rung.name for rung in ladder] == list(changes)
    for rung in ladder:
        start = script()
        before = settings(start)
        assert changed(start, rung.apply(start)) == changes[rung.name], rung.name
        assert settings(start) == before


@pytest.mark.parametrize("name", NAMES)
def test_one_rung_by_name(name):
    rung = next(rung for rung in RUNGS if rung.name == name)
    assert not changed(applied([name]), rung.apply(first_script()))
    assert changed(first_script(), applied([name])) == CHANGES[name]
    assert changed(applied(), applied(set(NAMES) - {name})) == CHANGES[name]


def test_all_rungs_none_and_those_of_another_entry():
    assert changed(first_script(), applied()) == set().union(*CHANGES.values())
    assert not changed(first_script(), applied([]))
    other = applied(["one cycle"]).lasting(7)
    assert changed(other, applied(["quick network"], other)) == {"network"}
    assert applied(["quick network"], other).recipe.epochs == 7


def test_a_name_that_there_is_not():
    with pytest.raises(ValueError, match=r"names=\['one bicycle'\]: must be among whole batches, SGD"):
        applied(["one bicycle"])


def test_everybody_begins_with_the_script():
    start = first_script()
    assert (start.network, start.per_image, start.channels_last) == (example_net, True, False)
    assert start.recipe.optimizer is torch.optim.Adam
    assert applied().network is quick_net


@pytest.mark.parametrize(("cycle", "peak"), [(rungs.higher_cycle, rungs.PEAK), (text.higher_cycle, 1.0)])
def test_a_cycle_goes_up_once_and_down_to_nothing(cycle, peak):
    factors = [cycle(step, 200) for step in range(200)]
    top = factors.index(max(factors))
    assert max(factors) == pytest.approx(peak, rel=0.02)
    assert all(a < b for a, b in pairwise(factors[: top + 1]))
    assert all(a > b for a, b in pairwise(factors[top:]))
    assert factors[0] < 0.2 * peak
    assert factors[-1] < 0.02 * peak


@pytest.mark.parametrize("ladder", [RUNGS, text.RUNGS], ids=["images", "text"])
def test_the_optimizers_of_the_rungs_take_every_parameter_once(ladder):
    network = quick_net((1, 16, 16), 10) if ladder is RUNGS else text.CharTransformer(8, 20, width=8, heads=2)
    start = first_script() if ladder is RUNGS else text.first_script()
    for rung in ladder:
        optimizer = rung.apply(start).recipe.optimizer(network.named_parameters())
        taken = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(taken) == sorted(map(id, network.parameters())), rung.name


def test_muon_takes_the_matrices_inside_the_layers():
    network = text.CharTransformer(8, 20, width=8, heads=2)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    muon, _ = text.muon_and_adam(network.named_parameters()).parts
    inside = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    wanted = {f"layers.{layer}.{part}.weight" for layer in (0, 1) for part in ("qkv", "out", "up", "down")}
    assert inside == wanted
