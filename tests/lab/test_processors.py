"""Whether a device multiplies bfloat16."""

import pytest
import torch

from course_lib.lab.processors import multiplies_bfloat16


def test_a_gpu_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr("course_lib.lab.processors.runtime.device", lambda: torch.device("cuda"))
    assert multiplies_bfloat16()


@pytest.mark.parametrize(("avx", "amx"), [(True, False), (False, True), (False, False)])
def test_a_processor_is_asked(monkeypatch, avx, amx):
    monkeypatch.setattr("course_lib.lab.processors.runtime.device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert multiplies_bfloat16() == (avx or amx)
