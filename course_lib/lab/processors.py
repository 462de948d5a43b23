"""What this processor multiplies: bfloat16 by instructions of its own, or only by emulation, which is far slower."""

import torch

from course_lib.lab import runtime


def multiplies_bfloat16() -> bool:
    """Whether the device in use has instructions for bfloat16.

    GPUs have, and processors with AVX512-BF16 or AMX. Others emulate it, and take several times as long as in float32.
    """
    if runtime.device().type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
