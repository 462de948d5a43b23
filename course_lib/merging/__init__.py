r"""Merging: one network's weights out of several, or a large one out of small ones. All of chapter 12, from scratch.

=========================  ==========================================  ==========================================
name                       what it does, gives or is                   source
=========================  ==========================================  ==========================================
*averaging*                *several into one*
average, interpolate       the mean of weights                         –
slerp, slerp_by_tensor     an arc in place of the line                 Shoemake 1985, SIGGRAPH
uniform_soup, greedy_soup  of networks tuned differently               Wortsman et al. 2022, arXiv:2203.05482
SWA, EMA                   along a run                                 Izmailov et al. 2018, arXiv:1803.05407
refresh_batch_norm         statistics for the new weights              Izmailov et al. 2018
*weighted*                 *each weight as much as it is sure*
fisher_merge               by Fisher information                       Matena & Raffel 2021, arXiv:2111.09832
regmean                    by what the layers see                      Jin et al. 2022, arXiv:2212.09849
*task_vectors*             *what tuning taught, as a direction*
task_vector, add, negate   learned, added, forgotten                   Ilharco et al. 2022, arXiv:2212.04089
ties                       without quarrels between them               Yadav et al. 2023, arXiv:2306.01708
dare                       with most of it dropped                     Yu et al. 2023, arXiv:2311.03099
*alignment, repairing*     *units in another order*
permute                    the same function                           –
match_weights              near another network's weights              Ainsworth et al. 2022, arXiv:2209.04836
match_activations          like another network's answers              Li et al. 2015, arXiv:1511.07543
repair                     the spread that the mean has lost           Jordan et al. 2022, arXiv:2211.08403
*barriers*                 *what lies between*
loss_along, barrier        on a line                                   Entezari et al. 2021, arXiv:2110.06296
instability                the same of the error                       Frankle et al. 2019, arXiv:1912.05671
plane                      on a plane                                  Garipov et al. 2018, arXiv:1802.10026
swapped_units              why there is something                      –
*growing, joining*         *small into large*
wider, deeper              the same function                           Chen et al. 2015, arXiv:1511.05641
expand                     of transformers                             Chen et al. 2021, arXiv:2110.07143
stack                      layers twice                                Gong et al. 2019, ICML
join                       several networks side by side               –
*experts*                  *several that stay apart*
upcycle                    a layer into a mixture of experts           Komatsuzaki et al. 2022, arXiv:2212.05055
branch_train_merge         networks behind a router                    Li et al. 2022, arXiv:2208.03306
*federated*                *data that stay where they are*
split_evenly, …            clients with like or with other data        Hsu et al. 2019, arXiv:1909.06335
federated_averaging        train there, average here                   McMahan et al. 2016, arXiv:1602.05629
proximal                   without running far apart                   Li et al. 2018, arXiv:1812.06127
=========================  ==========================================  ==========================================

*Merging* makes weights: at the end there is one network. *Fusion* (chapter 14) lets several networks decide together.
Weights can be averaged where the networks lie in one valley of the loss: with a common start, or once their units
stand in the same order.
"""

from course_lib.merging.alignment import (
    Orders,
    match_activations,
    match_weights,
    permutation_groups,
    permute,
    unit_correlations,
    weight_similarity,
)
from course_lib.merging.averaging import (
    EMA,
    SWA,
    RunningAverage,
    Soup,
    average,
    ema_update,
    following,
    greedy_soup,
    interpolate,
    refresh_batch_norm,
    slerp,
    slerp_by_tensor,
    slerp_vectors,
    swa_update,
    uniform_soup,
)
from course_lib.merging.barriers import (
    Path,
    Plane,
    barrier,
    instability,
    loss_along,
    plane,
    swapped_units,
)
from course_lib.merging.experts import (
    SEEDS_APART,
    MixtureOfExperts,
    Routed,
    balance_loss,
    balanced,
    branch_train_merge,
    united,
    upcycle,
)
from course_lib.merging.federated import (
    Federation,
    federated_averaging,
    proximal,
    split_by_dirichlet,
    split_evenly,
)
from course_lib.merging.growing import (
    deeper,
    expand,
    stack,
    wider,
)
from course_lib.merging.joining import (
    join,
)
from course_lib.merging.repairing import (
    repair,
    unit_statistics,
)
from course_lib.merging.states import (
    State,
    parameters_of,
    state_of,
    with_state,
)
from course_lib.merging.task_vectors import (
    add,
    dare,
    disjoint_mean,
    elect,
    negate,
    similarities,
    task_vector,
    ties,
    trim,
)
from course_lib.merging.weighted import (
    empirical_fisher,
    exact_fisher,
    fisher,
    fisher_merge,
    inner_products,
    regmean,
    regression_mean,
)

__all__ = [
    "EMA",
    "SEEDS_APART",
    "SWA",
    "Federation",
    "MixtureOfExperts",
    "Orders",
    "Path",
    "Plane",
    "Routed",
    "RunningAverage",
    "Soup",
    "State",
    "add",
    "average",
    "balance_loss",
    "balanced",
    "barrier",
    "branch_train_merge",
    "dare",
    "deeper",
    "disjoint_mean",
    "elect",
    "ema_update",
    "empirical_fisher",
    "exact_fisher",
    "expand",
    "federated_averaging",
    "fisher",
    "fisher_merge",
    "following",
    "greedy_soup",
    "inner_products",
    "instability",
    "interpolate",
    "join",
    "loss_along",
    "match_activations",
    "match_weights",
    "negate",
    "parameters_of",
    "permutation_groups",
    "permute",
    "plane",
    "proximal",
    "refresh_batch_norm",
    "regmean",
    "regression_mean",
    "repair",
    "similarities",
    "slerp",
    "slerp_by_tensor",
    "slerp_vectors",
    "split_by_dirichlet",
    "split_evenly",
    "stack",
    "state_of",
    "swa_update",
    "swapped_units",
    "task_vector",
    "ties",
    "trim",
    "uniform_soup",
    "unit_correlations",
    "unit_statistics",
    "united",
    "upcycle",
    "weight_similarity",
    "wider",
    "with_state",
]
