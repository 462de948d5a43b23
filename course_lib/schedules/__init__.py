"""Schedules: how large the step is, when. Every method of chapter 3, from scratch.

===============================  ====================================================  ================================
name                             what it does                                          source
===============================  ====================================================  ================================
*shapes*                         *the rate as a function of the step*
constant, step_decay, …          steps down, smooth ways down                          as ``torch.optim.lr_scheduler``
cosine, cosine_restarts          half a wave, once or again and again (SGDR)           Loshchilov & Hutter 2016,
                                                                                       arXiv:1608.03983
triangular, exp_range, …         up and down between two rates                         Smith 2015, arXiv:1506.01186
one_cycle, …                     up once, then down to almost nothing                  Smith & Topin 2017,
                                                                                       arXiv:1708.07120
inverse_square_root              a line up, then one over the root of the step         Vaswani et al. 2017,
                                                                                       arXiv:1706.03762
warm_up                          a line up, then any other shape                       Goyal et al. 2017,
                                                                                       arXiv:1706.02677
warm_up_stable_decay             up, stay, down at the end (WSD)                       Hu et al. 2024, arXiv:2404.06395
one_minus_sqrt                   the way down that is steep at first                   Hägele et al. 2024,
                                                                                       arXiv:2405.18392
schedule                         a shape, for ``Recipe(schedule=...)``
*plateau*                        *the rate falls when nothing improves*
reduce_on_plateau                told of each validation by ``fit``                    as ``ReduceLROnPlateau``
*range_test*                     *which rates are worth a try*
range_test                       train a little while the rate grows                   Smith 2015, arXiv:1506.01186
*curvature*                      *which rates a loss survives*
sharpness                        the largest eigenvalue of the Hessian                 Cohen et al. 2021,
                                                                                       arXiv:2103.00065
preconditioned_sharpness         the same as Adam sees it                              Cohen et al. 2022,
                                                                                       arXiv:2207.14484
*by_layer*                       *small near the input, full at the head*
layerwise_rates, …               a power of one factor by depth                        Howard & Ruder 2018,
                                                                                       arXiv:1801.06146
*adaptive*                       *rates that find themselves*
SGDHD, AdamHD                    the rate follows its own gradient                     Baydin et al. 2017,
                                                                                       arXiv:1703.04782
ScheduleFreeSGD, …               an average in place of a rate that falls              Defazio et al. 2024,
                                                                                       arXiv:2405.15682
Prodigy                          the rate is an estimate of the way to go              Mishchenko & Defazio 2023,
                                                                                       arXiv:2306.06101
*width*                          *one rate for narrow and wide (muP)*
mup_mlp, mup_sgd, mup_adam, …    sizes and rates by the kind of layer                  Yang et al. 2022,
                                                                                       arXiv:2203.03466
===============================  ====================================================  ================================

``Recipe(schedule=schedule(warm_up, warmup=0.05, then=cosine))`` is the usual recipe. ``factors(cosine, 100)`` are the
factors of 100 steps, to look at.
"""

from course_lib.schedules.adaptive import (
    SGDHD,
    AdamHD,
    Prodigy,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    adam_update,
    averaged_step,
    distance_terms,
    gradient_point,
    hypergradient,
    prodigy,
)
from course_lib.schedules.by_layer import (
    ULMFIT_DECAY,
    layers_by_depth,
    layerwise_factors,
    layerwise_rates,
    with_layer_rates,
)
from course_lib.schedules.curvature import (
    Product,
    adam_preconditioner,
    adam_stability_limit,
    hessian_vector,
    lanczos,
    power_iteration,
    preconditioned_sharpness,
    sharpness,
    stability_limit,
)
from course_lib.schedules.plateau import (
    Plateau,
    ReduceOnPlateau,
    reduce_on_plateau,
    to_beat,
    watched,
)
from course_lib.schedules.range_test import (
    RangeTest,
    range_test,
    slopes_over_log,
    smooth,
)
from course_lib.schedules.shapes import (
    Curve,
    RateAndMomentum,
    Schedule,
    Shape,
    Steps,
    constant,
    cosine,
    cosine_between,
    cosine_restarts,
    exp_range,
    exponential,
    factors,
    flat,
    inverse_square_root,
    linear,
    linear_between,
    linear_decay,
    multi_step,
    one_cycle,
    one_cycle_momentum,
    one_cycle_three_phase,
    one_minus_sqrt,
    polynomial,
    schedule,
    set_momentum,
    stable_decay,
    step_decay,
    triangle,
    triangular,
    triangular2,
    warm_up,
    warm_up_stable_decay,
)
from course_lib.schedules.width import (
    Readout,
    coordinate_check,
    mup_adam,
    mup_groups,
    mup_mlp,
    mup_sgd,
)

__all__ = [
    "SGDHD",
    "ULMFIT_DECAY",
    "AdamHD",
    "Curve",
    "Plateau",
    "Prodigy",
    "Product",
    "RangeTest",
    "RateAndMomentum",
    "Readout",
    "ReduceOnPlateau",
    "Schedule",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Shape",
    "Steps",
    "adam_preconditioner",
    "adam_stability_limit",
    "adam_update",
    "averaged_step",
    "constant",
    "coordinate_check",
    "cosine",
    "cosine_between",
    "cosine_restarts",
    "distance_terms",
    "exp_range",
    "exponential",
    "factors",
    "flat",
    "gradient_point",
    "hessian_vector",
    "hypergradient",
    "inverse_square_root",
    "lanczos",
    "layers_by_depth",
    "layerwise_factors",
    "layerwise_rates",
    "linear",
    "linear_between",
    "linear_decay",
    "multi_step",
    "mup_adam",
    "mup_groups",
    "mup_mlp",
    "mup_sgd",
    "one_cycle",
    "one_cycle_momentum",
    "one_cycle_three_phase",
    "one_minus_sqrt",
    "polynomial",
    "power_iteration",
    "preconditioned_sharpness",
    "prodigy",
    "range_test",
    "reduce_on_plateau",
    "schedule",
    "set_momentum",
    "sharpness",
    "slopes_over_log",
    "smooth",
    "stability_limit",
    "stable_decay",
    "step_decay",
    "to_beat",
    "triangle",
    "triangular",
    "triangular2",
    "warm_up",
    "warm_up_stable_decay",
    "watched",
    "with_layer_rates",
]
