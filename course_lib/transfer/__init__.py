"""Transfer: what a network has learned on one task, put to use on another. All of chapter 13, from scratch.

=============================  ==========================================  ============================================
name                           what it does, gives or is                   source
=============================  ==========================================  ============================================
*tuning*                       *a trained network for another task*
with_head                      a new last layer                            –
features, probe, with_probe    a straight line on what it knows            –
probe_curve                    layer by layer                              Alain & Bengio 2016, arXiv:1610.01644
fine_tune                      all weights                                 –
linear_probe_then_fine_tune    from a head that fits already               Kumar et al. 2022, arXiv:2202.10054
gradual_unfreezing             the last layer first                        Howard & Ruder 2018, arXiv:1801.06146
discriminative_rates           slower near the input                       Howard & Ruder 2018
l2_sp                          held near the start                         Li et al. 2018, arXiv:1802.01483
bitfit                         biases alone                                Ben Zaken et al. 2021, arXiv:2106.10199
*adapters*                     *a few new numbers*
with_adapters                  detours in a transformer                    Houlsby et al. 2019, arXiv:1902.00751
with_residual_adapters         1x1 convolutions                            Rebuffi et al. 2017, arXiv:1705.08045
lora, merged                   low-rank updates                            Hu et al. 2021, arXiv:2106.09685
rank_stabilised                their scale for large ranks                 Kalajdzievski 2023, arXiv:2312.03732
with_prompts, …                tokens before the image's                   Jia et al. 2022, arXiv:2203.12119
*subspace*                     *how many directions it takes*
in_subspace                    a random subspace                           Li et al. 2018, arXiv:1804.08838
Fastfood                       by fast transforms                          Le et al. 2013, arXiv:1408.3060
intrinsic_dimension            the least that does                         Aghajanyan et al. 2020, arXiv:2012.13255
*adaptation*                   *other images, no labels*
adabn                          the target's statistics                     Li et al. 2016, arXiv:1603.04779
coral_align, coral             its covariance                              Sun et al. 2015, arXiv:1511.05547;
                                                                           2016, arXiv:1607.01719
mmd_biased, …, dan             its distribution                            Gretton et al. 2012, JMLR 13;
                                                                           Long et al. 2015, arXiv:1502.02791
dann                           an adversary's ignorance                    Ganin et al. 2015, arXiv:1505.07818
tent                           sure answers                                Wang et al. 2020, arXiv:2006.10726
proxy_a_distance, …            what limits it                              Ben-David et al. 2010, Machine Learning 79
*pretraining*                  *no labels at all*
rotation                       which way is up                             Gidaris et al. 2018, arXiv:1803.07728
simclr                         two views of one image                      Chen et al. 2020, arXiv:2002.05709
byol                           without others to be told from              Grill et al. 2020, arXiv:2006.07733
masked_patches                 what is hidden                              He et al. 2021, arXiv:2111.06377
*choosing*                     *which network, how alike*
logme                          evidence of the labels                      You et al. 2021, arXiv:2102.11005
leep                           old classes as predictors                   Nguyen et al. 2020, arXiv:2002.12462
h_score                        classes apart                               Bao et al. 2019, arXiv:2212.10082
linear_cka, cka_matrix         likeness of features                        Kornblith et al. 2019, arXiv:1905.00414
*remembering*                  *what becomes of the old task*
ewc                            firmly where it matters                     Kirkpatrick et al. 2016, arXiv:1612.00796
rehearsal                      old examples mixed in                       Chaudhry et al. 2019, arXiv:1902.10486
backward_transfer, …           how much is lost                            Lopez-Paz & Ranzato 2017, arXiv:1706.08840
*published*                    *torchvision's weights, where they lie*
*parts*                        *layers by name, examples to draw from*
=============================  ==========================================  ============================================

A trained network is a better start than a random one where the tasks have something in common. How much of it may
move, by what objective, on whose images: that is what the methods differ in.
"""

from course_lib.transfer.adaptation import (
    AdaptationBound,
    Adapted,
    WithDomains,
    adabn,
    adaptation_bound,
    coral,
    coral_align,
    coral_loss,
    covariance,
    dan,
    dann,
    entropies,
    entropy,
    gaussian_kernels,
    median_bandwidths,
    mmd_biased,
    mmd_unbiased,
    norms_only,
    proxy_a_distance,
    reversal_strength,
    reverse_gradient,
    tent,
    with_progress,
)
from course_lib.transfer.adapters import (
    Bottleneck,
    LowRank,
    Prompted,
    lora,
    merged,
    rank_stabilised,
    with_adapters,
    with_deep_prompts,
    with_prompts,
    with_residual_adapters,
    without_adapters,
)
from course_lib.transfer.choosing import (
    cka_matrix,
    h_score,
    leep,
    linear_cka,
    log_evidence,
    logme,
)
from course_lib.transfer.parts import (
    EMBEDDING,
    Pool,
    Wrapped,
    bare,
    embedding,
    head_of,
    layer_names,
    pooled,
    tapped,
)
from course_lib.transfer.pretraining import (
    MaskedAutoencoder,
    WithProjection,
    WithRotations,
    WithTarget,
    byol,
    following_target,
    masked_patches,
    nt_xent,
    patches,
    rotation,
    rotations,
    simclr,
)
from course_lib.transfer.published import (
    Pretrained,
    WeightsUnavailable,
    available,
    pretrained,
)
from course_lib.transfer.remembering import (
    Consolidated,
    accuracies,
    average_accuracy,
    backward_transfer,
    consolidate,
    ewc,
    forgetting,
    forward_transfer,
    memory,
    rehearsal,
)
from course_lib.transfer.subspace import (
    Dense,
    Fastfood,
    Subspace,
    in_subspace,
    intrinsic_dimension,
    walsh_hadamard,
)
from course_lib.transfer.tuning import (
    FineTuned,
    Probe,
    bitfit,
    discriminative_rates,
    features,
    features_by_layer,
    fine_tune,
    gradual_unfreezing,
    l2_sp,
    layers_training,
    linear_probe_then_fine_tune,
    probe,
    probe_curve,
    starting_point,
    trainable,
    with_head,
    with_probe,
)

__all__ = [
    "EMBEDDING",
    "AdaptationBound",
    "Adapted",
    "Bottleneck",
    "Consolidated",
    "Dense",
    "Fastfood",
    "FineTuned",
    "LowRank",
    "MaskedAutoencoder",
    "Pool",
    "Pretrained",
    "Probe",
    "Prompted",
    "Subspace",
    "WeightsUnavailable",
    "WithDomains",
    "WithProjection",
    "WithRotations",
    "WithTarget",
    "Wrapped",
    "accuracies",
    "adabn",
    "adaptation_bound",
    "available",
    "average_accuracy",
    "backward_transfer",
    "bare",
    "bitfit",
    "byol",
    "cka_matrix",
    "consolidate",
    "coral",
    "coral_align",
    "coral_loss",
    "covariance",
    "dan",
    "dann",
    "discriminative_rates",
    "embedding",
    "entropies",
    "entropy",
    "ewc",
    "features",
    "features_by_layer",
    "fine_tune",
    "following_target",
    "forgetting",
    "forward_transfer",
    "gaussian_kernels",
    "gradual_unfreezing",
    "h_score",
    "head_of",
    "in_subspace",
    "intrinsic_dimension",
    "l2_sp",
    "layer_names",
    "layers_training",
    "leep",
    "linear_cka",
    "linear_probe_then_fine_tune",
    "log_evidence",
    "logme",
    "lora",
    "masked_patches",
    "median_bandwidths",
    "memory",
    "merged",
    "mmd_biased",
    "mmd_unbiased",
    "norms_only",
    "nt_xent",
    "patches",
    "pooled",
    "pretrained",
    "probe",
    "probe_curve",
    "proxy_a_distance",
    "rank_stabilised",
    "rehearsal",
    "reversal_strength",
    "reverse_gradient",
    "rotation",
    "rotations",
    "simclr",
    "starting_point",
    "tapped",
    "tent",
    "trainable",
    "walsh_hadamard",
    "with_adapters",
    "with_deep_prompts",
    "with_head",
    "with_probe",
    "with_progress",
    "with_prompts",
    "with_residual_adapters",
    "without_adapters",
]
