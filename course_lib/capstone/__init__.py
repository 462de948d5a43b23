"""The capstone: everything at once, against the clock. No method is new here; what is new is the race.

======================  =============================================================================================
name                    what it gives
======================  =============================================================================================
*rules*                 *what counts*
Task, Entry             what must be reached, and what takes part
run, race               one attempt; several entries in turns, as a ``Result``
epochs_needed           the shortest run that reaches the target on validation data
*script*                *where everybody begins*
fit_per_image           a ``DataLoader``, a transform an image, the loop (PyTorch's MNIST example)
*networks*              *what is trained*
example_net             the network of that example
quick_net               half the resolution from the first layer on
speed_net, whiten_stem  for photographs (Jordan 2024, arXiv:2404.00498)
*rungs*                 *from the script to the recipe*
RUNGS, applied          six changes, each of one chapter; an entry with any of them
native                  an entry without bfloat16, where this processor only emulates it
*combining*             *how rungs combine*
measured, Combinations  what the study found of all 64 sets: alone, left out, on average, in pairs
*text*                  *the second job*
documentation, windows  the text, and its stretches as a data set
CharTransformer         guesses the next character
*leaderboard*           *the class*
enter, leaderboard      a learner's best ratio to the first script; those of all who share a folder
======================  =============================================================================================
"""

from course_lib.capstone.combining import Combinations, every_set, measured
from course_lib.capstone.leaderboard import enter, leaderboard
from course_lib.capstone.networks import (
    ExampleNet,
    QuickNet,
    SpeedNet,
    example_net,
    quick_net,
    speed_net,
    whiten_stem,
)
from course_lib.capstone.processors import native
from course_lib.capstone.rules import (
    Attempt,
    Entry,
    Needed,
    Result,
    Task,
    accuracy,
    epochs_needed,
    race,
    run,
    trained,
    warm_up,
)
from course_lib.capstone.rungs import NAMES, RUNGS, applied, first_script
from course_lib.capstone.script import PerImage, fit_per_image
from course_lib.capstone.text import CharTransformer, bits, documentation, next_character, windows

__all__ = [
    "NAMES", "RUNGS", "Attempt", "CharTransformer", "Combinations", "Entry", "ExampleNet", "Needed", "PerImage",
    "QuickNet", "Result", "SpeedNet", "Task", "accuracy", "applied", "bits", "documentation", "enter",
    "epochs_needed", "every_set", "example_net", "first_script", "fit_per_image", "leaderboard", "measured",
    "native", "next_character", "quick_net", "race", "run", "speed_net", "trained", "warm_up",
    "whiten_stem", "windows",
]  # fmt: skip
