"""What runs where bfloat16 is only emulated."""

from dataclasses import replace

import pytest
import torch

from course_lib.capstone import applied, native, processors
from course_lib.lab.processors import multiplies_bfloat16


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


def test_a_gpu_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr("course_lib.lab.processors.runtime.device", lambda: torch.device("cuda"))
    assert multiplies_bfloat16()


@pytest.mark.parametrize(("avx", "amx"), [(True, False), (False, True), (False, False)])
def test_a_processor_is_asked(monkeypatch, avx, amx):
    monkeypatch.setattr("course_lib.lab.processors.runtime.device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert multiplies_bfloat16() == (avx or amx)
