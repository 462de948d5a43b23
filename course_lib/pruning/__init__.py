"""Pruning: a network with fewer weights. Every method of chapter 8, from scratch.

======================  =============================================  ===============================================
name                    what it does                                   source
======================  =============================================  ===============================================
*masks*                 *which weights are there*
apply_masks, …          zeros that survive training and saving         ``torch.nn.utils.parametrize``
*criteria*              *how much a weight matters*
magnitude               its size                                       Han et al. 2015, arXiv:1506.02626
random_scores           chance: what the others must beat              Blalock et al. 2020, arXiv:2003.03033
snip                    gradient times weight, before training         Lee et al. 2018, arXiv:1810.02340
taylor                  its square, averaged over batches              Molchanov et al. 2019, arXiv:1906.10771
movement                is it on its way to zero or from it            Sanh et al. 2020, arXiv:2005.07683
obd                     curvature times the squared weight             LeCun, Denker & Solla, NIPS 1989
obs, obs_prune          the same, the others making up for it          Hassibi & Stork, NIPS 1992;
                                                                       Frantar & Alistarh 2022, arXiv:2208.11580
wanda                   weight times the norm of its input             Sun et al. 2023, arXiv:2306.11695
*patterns*              *which weights may go together*
global_unstructured     any, compared across the network               Lee et al. 2018, arXiv:1810.02340
layer_unstructured      any, compared within a layer                   Han et al. 2015, arXiv:1506.02626
per_row                 any, compared within an output                 Sun et al. 2023, arXiv:2306.11695
n_of_m                  2 of every 4 stay                              Mishra et al. 2021, arXiv:2104.08378
blocks                  rectangles                                     Narang et al. 2017, arXiv:1711.02782
filters                 whole outputs                                  Li et al. 2016, arXiv:1608.08710
channels                whole inputs                                   He et al. 2017, arXiv:1707.06168
layers                  whole layers and blocks of layers              Men et al. 2024, arXiv:2403.03853
collapsed, …            layers through which nothing gets              Tanaka et al. 2020, arXiv:2006.05467
*schedules*             *when, and from which weights on*
one_shot                at once
iterative               a little, train on, again                      Han et al. 2015, arXiv:1506.02626
gradual                 during training, along a cube                  Zhu & Gupta 2017, arXiv:1710.01878
lottery_ticket          train, prune, go back to the first weights     Frankle & Carbin 2018, arXiv:1803.03635;
                        or to early ones (rewinding)                   Frankle et al. 2019, arXiv:1912.05671
shuffled                the control: other weights, as many            Su et al. 2020, arXiv:2009.11094
rigl                    sparse from the start, weights move            Evci et al. 2019, arXiv:1911.11134
erdos_renyi_kernel      how sparse each layer is, for it               Mocanu et al. 2018, Nature Communications 9
*networks*              *from zeros to a smaller network*
channel_groups          units that can only go together                Fang et al. 2023, arXiv:2301.12900
group_scores            how important each unit is                     Fang et al. 2023, arXiv:2301.12900
prune_channels          prune whole units, wherever they occur         Li et al. 2016, arXiv:1608.08710
silence, drop_blocks    masked filters made silent; idle blocks out
shrink                  an ordinary network without the dead units
semi_structured         2:4 layers for the GPU's sparse tensor cores   Mishra et al. 2021, arXiv:2104.08378
======================  =============================================  ===============================================

They combine freely: a criterion gives scores, a pattern turns scores into masks, ``apply_masks`` puts masks in force, a
schedule says when. ``apply_masks(model, global_unstructured(magnitude(model), 0.9))`` is all of the simplest method.
"""

from course_lib.lab.tracing import CannotShrink, ChannelGroup
from course_lib.pruning.criteria import (
    Criterion,
    gauss_newton_diagonal,
    magnitude,
    movement,
    obd,
    obs,
    obs_prune,
    obs_prune_model,
    random_scores,
    snip,
    taylor,
    wanda,
)
from course_lib.pruning.graph import channel_groups, group_scores, prune_channels
from course_lib.pruning.masks import (
    Masked,
    Masks,
    apply_masks,
    get_masks,
    load_masked,
    make_permanent,
    prunable_layers,
    sparsity,
)
from course_lib.pruning.patterns import (
    Scores,
    blocks,
    bottleneck,
    channels,
    collapsed,
    euclidean,
    filters,
    global_unstructured,
    layer_density,
    layer_unstructured,
    layers,
    n_of_m,
    per_row,
    total,
    without_smallest,
)
from course_lib.pruning.savings import semi_structured
from course_lib.pruning.schedules import (
    Pattern,
    Ticket,
    cubic_sparsity,
    drop_and_grow,
    drop_fraction,
    erdos_renyi_kernel,
    geometric_sparsity,
    gradual,
    iterative,
    lottery_ticket,
    one_shot,
    rigl,
    shuffled,
    uniform,
)
from course_lib.pruning.shrinking import shrink
from course_lib.pruning.silencing import drop_blocks, silence

__all__ = [
    "CannotShrink",
    "ChannelGroup",
    "Criterion",
    "Masked",
    "Masks",
    "Pattern",
    "Scores",
    "Ticket",
    "apply_masks",
    "blocks",
    "bottleneck",
    "channel_groups",
    "channels",
    "collapsed",
    "cubic_sparsity",
    "drop_and_grow",
    "drop_blocks",
    "drop_fraction",
    "erdos_renyi_kernel",
    "euclidean",
    "filters",
    "gauss_newton_diagonal",
    "geometric_sparsity",
    "get_masks",
    "global_unstructured",
    "gradual",
    "group_scores",
    "iterative",
    "layer_density",
    "layer_unstructured",
    "layers",
    "load_masked",
    "lottery_ticket",
    "magnitude",
    "make_permanent",
    "movement",
    "n_of_m",
    "obd",
    "obs",
    "obs_prune",
    "obs_prune_model",
    "one_shot",
    "per_row",
    "prunable_layers",
    "prune_channels",
    "random_scores",
    "rigl",
    "semi_structured",
    "shrink",
    "shuffled",
    "silence",
    "snip",
    "sparsity",
    "taylor",
    "total",
    "uniform",
    "wanda",
    "without_smallest",
]
