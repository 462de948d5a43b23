"""What runs where bfloat16 is only emulated."""

from dataclasses import replace

import pytest

from course_lib.capstone import applied, native, processors


@pytest.mark.parametrize("can", [True, False])
def test_bfloat16_is_raced_only_where_it_is_multiplied(monkeypatch, can):
    monkeypatch.setattr(processors, "multiplies_bfloat16", lambda: can)
    entry = applied()
    assert entry.recipe.precision == "bfloat16"
    assert native(entry).recipe == replace(entry.recipe, precision="bfloat16" if can else "float32")
    assert native(entry).channels_last == entry.channels_last


def test_other_entries_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(processors, "multiplies_bfloat16", lambda: False)
    entry = applied(frozenset({"one cycle"}))
    assert native(entry) is entry
