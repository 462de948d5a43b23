"""An entry as this processor should race it."""

from __future__ import annotations

from dataclasses import replace

from course_lib.capstone.rules import Entry
from course_lib.lab.processors import multiplies_bfloat16


def native(entry: Entry) -> Entry:
    """The entry, with float32 in the place of bfloat16 where the processor would only emulate it."""
    if entry.recipe.precision != "bfloat16" or multiplies_bfloat16():
        return entry
    return replace(entry, recipe=replace(entry.recipe, precision="float32"))
