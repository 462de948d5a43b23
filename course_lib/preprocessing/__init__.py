"""Data preprocessing: what the network sees. Every method of chapter 1, from scratch.

==========================  ==========================================  ===============================================
name                        what it does                                source
==========================  ==========================================  ===============================================
*cleaning*                  *what should not be there*
exact_duplicates, …         copies, leaks between splits, conflicts     Barz & Denzler 2020, arXiv:1902.00423
impute_mean, …              gaps filled, and marked
iqr_fences, …               outliers, and how to bring them back        Tukey 1977
*wrong_labels*              *labels that examples contradict*
confident_joint, …          wrong labels from honest predictions        Northcutt et al. 2021, arXiv:1911.00068
*scaling*                   *the shape of the cloud of examples*
standardise, robust, …      each column alone
pca_whitening, …            all columns together                        Kessy et al. 2018, arXiv:1512.00809
*imbalance*                 *classes of unequal size*
class_weights, …            weights and resampling                      Cui et al. 2019, arXiv:1901.05555
adjust_logits, …            the prior taken out of the logits           Menon et al. 2020, arXiv:2007.07314
smote                       new rows between neighbours                 Chawla et al., JAIR 16, 2002
*geometry*                  *where the pixels go*
crop, flip, rotate, …       with given parameters, one an image         as ``torchvision.transforms.v2.functional``
random_crop                 a window of the padded image
random_flip, …              mirrored or not
random_rotation, …          turned, moved, scaled, sheared
random_elastic              smooth random displacements                 Simard, Steinkraus & Platt, ICDAR 2003
cutout                      one black square anywhere                   DeVries & Taylor 2017, arXiv:1708.04552
random_erasing              a rectangle of random area and shape        Zhong et al. 2017, arXiv:1708.04896
*colour*                    *what the pixels say*
brightness, equalize, …     with given parameters, one an image         as ``torchvision.transforms.v2.functional``
random_brightness_contrast  factors around 1
random_noise                a normal number for each pixel
*policies*                  *operations drawn from a list*
random_augment              several, all of one magnitude               Cubuk et al. 2019, arXiv:1909.13719
trivial_augment             one, of a random magnitude                  Müller & Hutter 2021, arXiv:2103.10158
augmix                      a mean of several chains of them            Hendrycks et al. 2019, arXiv:1912.02781
*mixing*                    *images made of two images*
mixup                       weighted means of images and labels         Zhang et al. 2017, arXiv:1710.09412
cutmix                      a rectangle of another, labels by area      Yun et al. 2019, arXiv:1905.04899
*pipeline*                  *several, on pixels, in a recipe*
compose, on_pixels          for ``Recipe(augment=...)``
test_time                   mean probabilities over views
==========================  ==========================================  ===============================================

``Recipe(augment=on_pixels(data.train, random_crop, random_flip))`` is the usual recipe for small photographs. Settings
are given by ``functools.partial(random_crop, padding=2)``.
"""

from course_lib.preprocessing.cleaning import (
    Fences,
    Imputer,
    NeighbourImputer,
    Pairs,
    conflicts,
    drop_duplicates,
    drop_rows,
    exact_duplicates,
    impute_constant,
    impute_mean,
    impute_median,
    impute_neighbours,
    iqr_fences,
    iqr_outliers,
    leakage,
    mad_fences,
    mad_outliers,
    mahalanobis,
    mahalanobis_outliers,
    missing_mask,
    near_duplicates,
    outliers,
    quantile_fences,
    winsorise,
    zscore_fences,
    zscore_outliers,
)
from course_lib.preprocessing.colour import (
    add_noise,
    autocontrast,
    brightness,
    contrast,
    equalize,
    grey,
    invert,
    posterize,
    random_brightness_contrast,
    random_noise,
    saturation,
    sharpness,
    solarize,
)
from course_lib.preprocessing.geometry import (
    affine,
    box_mask,
    crop,
    cutout,
    elastic,
    erase,
    flip,
    flip_vertical,
    random_affine,
    random_crop,
    random_elastic,
    random_erasing,
    random_flip,
    random_flip_vertical,
    random_rotation,
    rotate,
    smooth,
)
from course_lib.preprocessing.imbalance import (
    AdjustedLogits,
    adjust_logits,
    balanced_accuracy,
    balanced_batches,
    balanced_sample,
    balanced_weights,
    class_counts,
    class_prior,
    class_weights,
    effective_number_weights,
    logit_adjusted_cross_entropy,
    long_tailed,
    oversample,
    recalls,
    smote,
    undersample,
    weighted_cross_entropy,
)
from course_lib.preprocessing.mixing import cutmix, mix, mixup, paste, soft_labels
from course_lib.preprocessing.pipeline import AveragedViews, View, compose, on_pixels, takes_labels, test_time
from course_lib.preprocessing.policies import (
    AUGMIX,
    OPERATIONS,
    RANDOM_AUGMENT,
    TRIVIAL_AUGMENT,
    Magnitudes,
    apply_operations,
    augmix,
    random_augment,
    trivial_augment,
)
from course_lib.preprocessing.scaling import (
    Affine,
    condition_number,
    identity,
    min_max,
    pca_whitening,
    per_channel,
    per_image,
    robust,
    scaled,
    standardise,
    zca_whitening,
)
from course_lib.preprocessing.wrong_labels import (
    PrecisionRecall,
    by_network,
    class_thresholds,
    confident_joint,
    confident_labels,
    estimated_joint,
    flip_pairwise,
    flip_symmetric,
    fold_numbers,
    loss_ranking,
    off_diagonal,
    out_of_sample_probabilities,
    precision_and_recall,
    prune_by_class,
    prune_by_noise_rate,
)

__all__ = [
    "AUGMIX",
    "OPERATIONS",
    "RANDOM_AUGMENT",
    "TRIVIAL_AUGMENT",
    "AdjustedLogits",
    "Affine",
    "AveragedViews",
    "Fences",
    "Imputer",
    "Magnitudes",
    "NeighbourImputer",
    "Pairs",
    "PrecisionRecall",
    "View",
    "add_noise",
    "adjust_logits",
    "affine",
    "apply_operations",
    "augmix",
    "autocontrast",
    "balanced_accuracy",
    "balanced_batches",
    "balanced_sample",
    "balanced_weights",
    "box_mask",
    "brightness",
    "by_network",
    "class_counts",
    "class_prior",
    "class_thresholds",
    "class_weights",
    "compose",
    "condition_number",
    "confident_joint",
    "confident_labels",
    "conflicts",
    "contrast",
    "crop",
    "cutmix",
    "cutout",
    "drop_duplicates",
    "drop_rows",
    "effective_number_weights",
    "elastic",
    "equalize",
    "erase",
    "estimated_joint",
    "exact_duplicates",
    "flip",
    "flip_pairwise",
    "flip_symmetric",
    "flip_vertical",
    "fold_numbers",
    "grey",
    "identity",
    "impute_constant",
    "impute_mean",
    "impute_median",
    "impute_neighbours",
    "invert",
    "iqr_fences",
    "iqr_outliers",
    "leakage",
    "logit_adjusted_cross_entropy",
    "long_tailed",
    "loss_ranking",
    "mad_fences",
    "mad_outliers",
    "mahalanobis",
    "mahalanobis_outliers",
    "min_max",
    "missing_mask",
    "mix",
    "mixup",
    "near_duplicates",
    "off_diagonal",
    "on_pixels",
    "out_of_sample_probabilities",
    "outliers",
    "oversample",
    "paste",
    "pca_whitening",
    "per_channel",
    "per_image",
    "posterize",
    "precision_and_recall",
    "prune_by_class",
    "prune_by_noise_rate",
    "quantile_fences",
    "random_affine",
    "random_augment",
    "random_brightness_contrast",
    "random_crop",
    "random_elastic",
    "random_erasing",
    "random_flip",
    "random_flip_vertical",
    "random_noise",
    "random_rotation",
    "recalls",
    "robust",
    "rotate",
    "saturation",
    "scaled",
    "sharpness",
    "smooth",
    "smote",
    "soft_labels",
    "solarize",
    "standardise",
    "takes_labels",
    "test_time",
    "trivial_augment",
    "undersample",
    "weighted_cross_entropy",
    "winsorise",
    "zca_whitening",
    "zscore_fences",
    "zscore_outliers",
]
