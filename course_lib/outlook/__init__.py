"""Chapter 17: which technique when, how techniques combine, and what a larger run would reach and cost.

===================  ===================================================================================================
``findings``         what the course's studies found, sorted by what it relieves; each figure read when it is asked for
``adviser``          ``advise``, ``advice_table``, ``adviser``: the same as a frame, a table, an explorer
``pairs``            what is known of two techniques together, measured or cited, and the matrix of it
``scaling_laws``     the law of parameters and examples: its fit, the best split of a budget, extrapolation
``run_cost``         time, energy, money and carbon of a run; failures and checkpoints
===================  ===================================================================================================
"""

from course_lib.outlook.adviser import advice_table, advise, adviser
from course_lib.outlook.findings import FINDINGS, HURTS, Finding
from course_lib.outlook.measured import verdict
from course_lib.outlook.pairs import PAIRS, Pair
from course_lib.outlook.run_cost import (
    PUBLISHED_RUNS,
    Assumptions,
    RunCost,
    checkpoint_interval,
    compare_with_published,
    goodput,
    run_cost,
    sensitivity,
)
from course_lib.outlook.scaling_laws import (
    Extrapolation,
    JointLaw,
    extrapolate,
    fit_joint_law,
)

__all__ = [
    "FINDINGS",
    "HURTS",
    "PAIRS",
    "PUBLISHED_RUNS",
    "Assumptions",
    "Extrapolation",
    "Finding",
    "JointLaw",
    "Pair",
    "RunCost",
    "advice_table",
    "advise",
    "adviser",
    "checkpoint_interval",
    "compare_with_published",
    "extrapolate",
    "fit_joint_law",
    "goodput",
    "run_cost",
    "sensitivity",
    "verdict",
]
