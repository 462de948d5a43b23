"""Batch size: how many examples make a gradient. Every method of chapter 4, from scratch.

===============================  ====================================================  =================================
name                             what it does                                          source
===============================  ====================================================  =================================
*noise*                          *how much a batch's gradient is off*
per_example_gradients            one gradient an example, many at once
gradient_statistics              their mean and spread; ``variance_with_replacement``,
                                 ``variance_without_replacement`` of a batch of them
simple_noise_scale,              the batch at which noise equals gradient              McCandlish et al. 2018,
noise_scale_from_two_sizes                                                             arXiv:1812.06162
hessian_noise_scale              the same, weighted by the curvature
*tracking*                       *the noise scale of a run, for next to nothing*
tracked, NoiseScale              from the parts of an accumulated batch                McCandlish et al. 2018
*critical*                       *where more examples a step stop saving steps*
fit_critical, CriticalBatch      the hyperbola of steps and examples                   McCandlish et al. 2018
expected_gain, best_step_length  what a batch's step gains, and its best rate
*scaling*                        *the rate when the batch changes*
linear                           times kappa                                           Goyal et al. 2017,
                                                                                       arXiv:1706.02677
square_root                      times its root                                        Krizhevsky 2014, arXiv:1404.5997
saturating                       linear below the noise scale, then constant           McCandlish et al. 2018
adam_beta, adam_eps              decays and eps of Adam beside it                      Malladi et al. 2022,
                                                                                       arXiv:2205.10287
ema_decay                        the decay of an average of weights                    Busbridge et al. 2023,
                                                                                       arXiv:2307.13813
rescaled, rescaled_adam          a recipe for another batch size
*accumulation*                   *a batch that does not fit*
accumulated_gradient             part by part, each by its share
ghost, GhostBatchNorm2d, …       batch norm by small groups of a batch                 Hoffer et al. 2017,
                                                                                       arXiv:1705.08741
*growing*                        *batches that grow where rates would fall*
grow, grow_then_decay            by milestones                                         Smith et al. 2017,
                                                                                       arXiv:1711.00489
from_noise_scale                 by a measured noise scale                             McCandlish et al. 2018
noise_temperature                what both keep                                        Smith & Le 2017, arXiv:1710.06451
*layerwise*                      *rates for large batches*
LARS                             each layer's step in proportion to its weights        You et al. 2017, arXiv:1708.03888
*sampling, drawing*              *which examples*
reshuffled, shuffled_once, …     orders of epochs
importance, probabilities,       more often what matters more, without bias            Katharopoulos & Fleuret 2018,
sampling_variance                                                                      arXiv:1803.00942
loss_scores, gradient_norms, …   what matters
hard_examples                    only the hardest of a batch, with bias                Shrivastava et al. 2016,
                                                                                       arXiv:1604.03540
exponential_pacing, easiest      the easy ones first                                   Hacohen & Weinshall 2019,
                                                                                       arXiv:1904.03626
sampled, drawn_from              how a choice gets into ``fit``
*memory, throughput*             *what fits, and what it brings*
predicted_memory                 bytes of a step at any batch size
largest_batch, …                 the largest that fits
throughput                       examples a second at each batch size
*bucketing*                      *sequences of like length*
length_buckets, by_tokens        batches with little padding                           Vaswani et al. 2017,
pad_batch, padding                                                                     arXiv:1706.03762
===============================  ====================================================  =================================

LAMB, layer-wise rates for Adam, is chapter 2's (``optimizers.LAMB``); batches with equally many of each class are
chapter 1's (``preprocessing.balanced_batches``).
"""

from course_lib.batching.accumulation import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    accumulated_gradient,
    ghost,
)
from course_lib.batching.bucketing import (
    by_tokens,
    length_buckets,
    pad_batch,
    padding,
)
from course_lib.batching.critical import (
    CriticalBatch,
    best_step_length,
    expected_gain,
    fit_critical,
)
from course_lib.batching.drawing import (
    Choice,
    Choose,
    Chooser,
    Curriculum,
    Importance,
    Uniform,
    drawn_from,
    hard_examples,
    sampled,
    weighted_labels,
)
from course_lib.batching.growing import (
    Size,
    from_noise_scale,
    grow,
    grow_then_decay,
    noise_temperature,
)
from course_lib.batching.layerwise import (
    LARS,
    lars,
    local_rate,
)
from course_lib.batching.memory import (
    MemoryModel,
    fits_on_device,
    largest_batch,
    largest_batch_under,
    predicted_memory,
    saved_bytes,
)
from course_lib.batching.noise import (
    Estimates,
    GradientStatistics,
    gradient_statistics,
    hessian_noise_scale,
    noise_scale_from_two_sizes,
    per_example_gradients,
    simple_noise_scale,
    variance_with_replacement,
    variance_without_replacement,
)
from course_lib.batching.sampling import (
    easiest,
    exponential_pacing,
    gradient_norms,
    importance,
    last_layer_scores,
    loss_scores,
    probabilities,
    reshuffled,
    sampling_variance,
    shuffled_once,
    with_replacement,
)
from course_lib.batching.scaling import (
    Rule,
    adam_beta,
    adam_eps,
    ema_decay,
    linear,
    rescaled,
    rescaled_adam,
    saturating,
    square_root,
)
from course_lib.batching.speed import (
    throughput,
)
from course_lib.batching.tracking import (
    NoiseScale,
    tracked,
)

__all__ = [
    "LARS",
    "Choice",
    "Choose",
    "Chooser",
    "CriticalBatch",
    "Curriculum",
    "Estimates",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GradientStatistics",
    "Importance",
    "MemoryModel",
    "NoiseScale",
    "Rule",
    "Size",
    "Uniform",
    "accumulated_gradient",
    "adam_beta",
    "adam_eps",
    "best_step_length",
    "by_tokens",
    "drawn_from",
    "easiest",
    "ema_decay",
    "expected_gain",
    "exponential_pacing",
    "fit_critical",
    "fits_on_device",
    "from_noise_scale",
    "ghost",
    "gradient_norms",
    "gradient_statistics",
    "grow",
    "grow_then_decay",
    "hard_examples",
    "hessian_noise_scale",
    "importance",
    "largest_batch",
    "largest_batch_under",
    "lars",
    "last_layer_scores",
    "length_buckets",
    "linear",
    "local_rate",
    "loss_scores",
    "noise_scale_from_two_sizes",
    "noise_temperature",
    "pad_batch",
    "padding",
    "per_example_gradients",
    "predicted_memory",
    "probabilities",
    "rescaled",
    "rescaled_adam",
    "reshuffled",
    "sampled",
    "sampling_variance",
    "saturating",
    "saved_bytes",
    "shuffled_once",
    "simple_noise_scale",
    "square_root",
    "throughput",
    "tracked",
    "variance_with_replacement",
    "variance_without_replacement",
    "weighted_labels",
    "with_replacement",
]
