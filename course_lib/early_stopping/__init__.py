"""Early stopping: when it is over. Every method of chapter 6, from scratch.

===============================  ====================================================  =================================
name                             what it does                                          source
===============================  ====================================================  =================================
*criteria*                       *stops a run, by its history*
Patience                         no improvement for a while                            as Keras and Lightning
TargetReached, BudgetSpent       good enough; long enough
all_of, any_of                   several at once
*prechelt*                       *by how much the error has risen*
GeneralizationLoss               above its lowest, in percent (GL)                     Prechelt 1998, in Neural
ProgressQuotient                 over what training still gains (PQ)                   Networks: Tricks of the Trade,
SuccessiveIncreases              several times in a row (UP)                           LNCS 1524
LittleProgress                   where training itself has settled
*evidence*                       *without a validation split*
Evidence, EvidenceColumn         the gradient is no more than its noise                Mahsereci et al. 2017,
evidence, evidence_by_layer, …                                                         arXiv:1703.09580
*replaying*                      *recorded curves, asked afterwards*
as_history, replay, regret       where it stops, what is kept, what that costs
*filtering*                      *the principle: a filter that opens with time*
gd_filter, momentum_filter, …    what t steps have learnt of each direction            Hastie, Tibshirani & Friedman
ridge_filter, equivalent_ridge   the weight decay that this amounts to                 2009, 3.4.1
flow_filter                      steps without length                                  Ali, Kolter & Tibshirani 2018,
                                                                                       arXiv:1810.10082
*filter_error*                   *bias falls, variance rises*
bias_variance, weight_error      of any filter, in closed form
best_steps, oracle_filter, …     when to stop, if the truth were known
*optimism*                       *how lucky the best epoch was*
expected_maximum, …              of n numbers, of a walk, of a chain                   Spitzer 1956, Transactions of the
                                                                                       AMS 82(2)
accuracy_standard_error, …       the noise, and what epochs share of it
best_epoch_optimism              measured over runs
bootstrap_optimism               estimated from one                                    Efron 1983, JASA 78(382)
*runs*                           *ends whole runs, by those before*
median_rule                      worse than the others' average                        Golovin et al. 2017, KDD
percentile_rule                  worse than the others here                            as Optuna's MedianPruner
stopping_rule                    not among the best that came to this rung             Li et al. 2018, arXiv:1810.05934
patient_rule, threshold_rule     worse than itself; out of bounds                      as Optuna's
prune                            what a rule saves
*halving*                        *many briefly, few for long*
SuccessiveHalving                the best of each rung go on                           Jamieson & Talwalkar 2015,
                                                                                       arXiv:1502.07943
Hyperband                        from several starts                                   Li et al. 2016, arXiv:1603.06560
Asha                             without waiting                                       Li et al. 2018, arXiv:1810.05934
replay_runs                      with recorded curves
*search*                         *the same on real runs*
search, Trial                    in processes, with checkpoints that go on
*families, extrapolation*        *where a curve is going*
fit_family                       seven families, by least squares                      Domhan et al. 2015, IJCAI
extrapolate, will_it_beat        a forecast with an interval
Unpromising, coverage            stops what will not win; whether the interval held
===============================  ====================================================  =================================

A criterion is what ``Recipe.stop`` takes: ``Recipe(stop=Patience(5), keep="val_loss")``. It sees nothing but the
history, so that any number of them can be compared on one recorded run: ``replay(Patience(5), history)``.
"""

from course_lib.early_stopping.criteria import (
    AllOf,
    AnyOf,
    BudgetSpent,
    Criterion,
    Patience,
    TargetReached,
    all_of,
    any_of,
    lower_is_better,
    smoothed,
    waited,
)
from course_lib.early_stopping.evidence import (
    Evidence,
    EvidenceColumn,
    GradientMoments,
    evidence,
    evidence_by_layer,
    evidence_of,
    gradient_moments,
    mean_layer_evidence,
    signal_to_noise,
    silent_share,
)
from course_lib.early_stopping.extrapolation import (
    Coverage,
    Forecast,
    Unpromising,
    coverage,
    extrapolate,
    will_it_beat,
)
from course_lib.early_stopping.families import (
    FAMILIES,
    FittedCurve,
    fit_family,
)
from course_lib.early_stopping.filter_error import (
    BestStop,
    FilterError,
    best_steps,
    best_steps_by_direction,
    bias_variance,
    gd_bias_variance,
    oracle_filter,
    weight_error,
)
from course_lib.early_stopping.filtering import (
    equivalent_ridge,
    equivalent_ridge_by_direction,
    filtered_solution,
    flow_filter,
    gd_filter,
    gd_solution,
    momentum_filter,
    ridge_filter,
)
from course_lib.early_stopping.halving import (
    Asha,
    Bracket,
    HalvingRule,
    Hyperband,
    Job,
    Rung,
    SuccessiveHalving,
    formula_size,
    hyperband_brackets,
    promotable,
    rung_epochs,
    table_size,
)
from course_lib.early_stopping.optimism import (
    Drawn,
    Optimism,
    accuracy_covariance,
    accuracy_standard_error,
    best_epoch_optimism,
    bootstrap_optimism,
    difference_standard_error,
    expected_ar1_maximum,
    expected_maximum,
    expected_walk_maximum,
)
from course_lib.early_stopping.outcomes import (
    Done,
    Outcome,
    replay_runs,
)
from course_lib.early_stopping.prechelt import (
    GeneralizationLoss,
    LittleProgress,
    ProgressQuotient,
    SuccessiveIncreases,
    generalization_loss,
    training_progress,
)
from course_lib.early_stopping.replaying import (
    Regret,
    Stop,
    as_history,
    best_row,
    regret,
    replay,
)
from course_lib.early_stopping.runs import (
    Curve,
    Mode,
    Pruned,
    Rule,
    median_rule,
    patient_rule,
    percentile_rule,
    prune,
    stopping_rule,
    threshold_rule,
)
from course_lib.early_stopping.search import (
    Found,
    Trial,
    search,
)
from course_lib.early_stopping.spectral import (
    spectrum,
)

__all__ = [
    "FAMILIES",
    "AllOf",
    "AnyOf",
    "Asha",
    "BestStop",
    "Bracket",
    "BudgetSpent",
    "Coverage",
    "Criterion",
    "Curve",
    "Done",
    "Drawn",
    "Evidence",
    "EvidenceColumn",
    "FilterError",
    "FittedCurve",
    "Forecast",
    "Found",
    "GeneralizationLoss",
    "GradientMoments",
    "HalvingRule",
    "Hyperband",
    "Job",
    "LittleProgress",
    "Mode",
    "Optimism",
    "Outcome",
    "Patience",
    "ProgressQuotient",
    "Pruned",
    "Regret",
    "Rule",
    "Rung",
    "Stop",
    "SuccessiveHalving",
    "SuccessiveIncreases",
    "TargetReached",
    "Trial",
    "Unpromising",
    "accuracy_covariance",
    "accuracy_standard_error",
    "all_of",
    "any_of",
    "as_history",
    "best_epoch_optimism",
    "best_row",
    "best_steps",
    "best_steps_by_direction",
    "bias_variance",
    "bootstrap_optimism",
    "coverage",
    "difference_standard_error",
    "equivalent_ridge",
    "equivalent_ridge_by_direction",
    "evidence",
    "evidence_by_layer",
    "evidence_of",
    "expected_ar1_maximum",
    "expected_maximum",
    "expected_walk_maximum",
    "extrapolate",
    "filtered_solution",
    "fit_family",
    "flow_filter",
    "formula_size",
    "gd_bias_variance",
    "gd_filter",
    "gd_solution",
    "generalization_loss",
    "gradient_moments",
    "hyperband_brackets",
    "lower_is_better",
    "mean_layer_evidence",
    "median_rule",
    "momentum_filter",
    "oracle_filter",
    "patient_rule",
    "percentile_rule",
    "promotable",
    "prune",
    "regret",
    "replay",
    "replay_runs",
    "ridge_filter",
    "rung_epochs",
    "search",
    "signal_to_noise",
    "silent_share",
    "smoothed",
    "spectrum",
    "stopping_rule",
    "table_size",
    "threshold_rule",
    "training_progress",
    "waited",
    "weight_error",
    "will_it_beat",
]
