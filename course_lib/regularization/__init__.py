"""Regularization: what keeps a network from learning by heart. Every method of chapter 5, from scratch.

============================  =======================================================  =================================
name                          what it does                                             source
============================  =======================================================  =================================
*penalties*                   *smaller weights, as objectives*
l2, l1, elastic_net           by size                                                  Tibshirani 1996, JRSSB 58(1);
                                                                                       Zou & Hastie 2005, JRSSB 67(2)
group_lasso                   whole units                                              Yuan & Lin 2006, JRSSB 68(1)
soft_orthogonality, srip      no direction stretched or forgotten                      Bansal et al. 2018,
                                                                                       arXiv:1810.09102
spectral_penalty              the largest singular value                               Yoshida & Miyato 2017,
                                                                                       arXiv:1705.10941
decay_only_weights            by the optimizer, biases left alone                      Loshchilov & Hutter 2017,
                                                                                       arXiv:1711.05101
*proximal*                    *after each step, down to exact zeros*
after_step, prox_l1, …        thresholds of numbers and of rows                        Parikh & Boyd 2014
max_norm                      rows back into a ball                                    Srivastava et al. 2014, JMLR 15
*spectral*                    *weights over their spectral norm*
spectral_norm, …              one step of power iteration a pass                       Miyato et al. 2018,
                                                                                       arXiv:1802.05957
*input_gradients*             *smooth in the input*
gradient_penalty              the loss: double backpropagation                         Drucker & Le Cun 1992
jacobian_penalty, …           the logits, exactly or by projections                    Hoffman et al. 2019,
                                                                                       arXiv:1908.02729
*drop, noise, placing*        *noise, and where it goes*
dropout, Dropout, …           numbers, channels, weights, blocks, branches             Srivastava et al. 2014, JMLR 15
input_noise, weight_noise     normal noise, by objectives                              Bishop 1995; Graves 2011, NIPS
with_dropout, …               put into a network; ``without_noise`` takes it out
*consistency*                 *the same answer again*
r_drop                        under another dropout mask                               Liang et al. 2021,
                                                                                       arXiv:2106.14448
virtual_adversarial           at the worst input nearby                                Miyato et al. 2018,
                                                                                       arXiv:1704.03976
*passes*                      *one forward pass for all that are wrapped*
*equivalents*                 *the penalties that noise equals*
input_noise_loss, …           ridge                                                    Bishop 1995
dropout_loss, …               ridge by the size of features                            Wager et al. 2013,
                                                                                       arXiv:1307.1493
input_noise_curvature, …      the Jacobian                                             Bishop 1995
*targets*                     *softer labels, and wrong ones*
label_smoothing               a little of every class                                  Szegedy et al. 2015,
                                                                                       arXiv:1512.00567
confidence_penalty            not to be sure                                           Pereyra et al. 2017,
                                                                                       arXiv:1701.06548
soft_bootstrap, …             the network's own word beside the label                  Reed et al. 2014,
                                                                                       arXiv:1412.6596
generalized_cross_entropy     giving up on the hopeless                                Zhang & Sabuncu 2018,
                                                                                       arXiv:1805.07836
symmetric_cross_entropy       bounded for each example                                 Wang et al. 2019,
                                                                                       arXiv:1908.06112
with_wrong_labels             labels made wrong, by chapter 1
*normalisation*               *of activations and of weights*
batch_norm, layer_norm, …     as pure functions                                        Ioffe & Szegedy 2015,
                                                                                       arXiv:1502.03167
with_norm                     another kind in a network
*scale_invariance*            *what normalisation does to the rate*
equilibrium_rotation, …       where decay and steps balance                            Wan et al. 2020,
                                                                                       arXiv:2006.08419
*ridge, decomposition*        *the principle: bias against variance*
ridge, shrinkage, …           direction by direction                                   Hoerl & Kennard 1970
squared_error_parts, …        by training again and again                              Domingos 2000, ICML; Yang et al.
                                                                                       2020, arXiv:2002.11328
*calibration*                 *how sure, and how right*
calibration_error, …          measured, and mended by a temperature                    Guo et al. 2017, arXiv:1706.04599
*double_descent*              *more features than examples*
errors_over_width             random features, in closed form                          Belkin et al. 2018,
                                                                                       arXiv:1812.11118
============================  =======================================================  =================================

What is minimised is an objective ``(model, x, y) -> loss`` around another, so they combine freely:
``Recipe(objective=partial(l1, strength=1e-5, objective=partial(confidence_penalty, beta=0.1)))``. What acts after a
step wraps the recipe, ``after_step(recipe, partial(max_norm, limit=3.0))``; noise goes into the network,
``with_dropout(network, 0.5)``.
"""

from course_lib.regularization.calibration import (
    Reliability,
    Tempered,
    brier_score,
    calibration_error,
    fit_temperature,
    reliability,
    tempered,
)
from course_lib.regularization.consistency import (
    kl_divergence,
    r_drop,
    virtual_adversarial,
    worst_direction,
)
from course_lib.regularization.decomposition import (
    Parts,
    bootstrap,
    cross_entropy_parts,
    disjoint_parts,
    main_prediction,
    resampled_logits,
    squared_error_parts,
    zero_one_parts,
)
from course_lib.regularization.double_descent import (
    RandomFeatures,
    WidthError,
    errors_over_width,
    minimum_norm,
    one_hot_targets,
)
from course_lib.regularization.drop import (
    DropBlock2d,
    DropConnect,
    Dropout,
    Dropout2d,
    GaussianDropout,
    StochasticDepth,
    drop_block2d,
    drop_connect,
    dropout,
    dropout2d,
    gaussian_dropout,
    kept,
    stochastic_depth,
)
from course_lib.regularization.equivalents import (
    dropout_logistic_penalty,
    dropout_loss,
    dropout_solution,
    input_noise_curvature,
    input_noise_loss,
    input_noise_solution,
    input_noise_tikhonov,
    linear_loss,
    softmax_curvature,
    squared_error,
)
from course_lib.regularization.input_gradients import (
    gradient_penalty,
    jacobian_penalty,
    projected_jacobian_penalty,
    projected_squared_jacobian,
    squared_jacobian,
)
from course_lib.regularization.noise import (
    GaussianNoise,
    gaussian_noise,
    input_noise,
    weight_noise,
)
from course_lib.regularization.normalisation import (
    Kind,
    Shift,
    WeightNorm,
    batch_norm,
    group_norm,
    layer_norm,
    rms_norm,
    weight_norm,
    with_norm,
)
from course_lib.regularization.passes import (
    Perturbed,
    Seen,
    unseen,
    weights_of,
)
from course_lib.regularization.penalties import (
    decay_only_weights,
    elastic_net,
    gram_residual,
    group_lasso,
    group_norm_sum,
    half_squared_norm,
    l1,
    l1_norm,
    l2,
    largest_singular_value,
    soft_orthogonality,
    spectral_penalty,
    srip,
)
from course_lib.regularization.placing import (
    linear_depth,
    with_drop_block,
    with_drop_connect,
    with_dropout,
    with_dropout2d,
    with_noise,
    with_stochastic_depth,
    without_noise,
)
from course_lib.regularization.proximal import (
    Prox,
    after_step,
    clip_row_norms,
    group_soft_threshold,
    max_norm,
    prox_elastic_net,
    prox_group_lasso,
    prox_l1,
    prox_l2,
    soft_threshold,
    zero_share,
)
from course_lib.regularization.ridge import (
    RidgeError,
    degrees_of_freedom,
    eigenvalues,
    ridge,
    ridge_bias_variance,
    shrinkage,
)
from course_lib.regularization.scale_invariance import (
    Rotations,
    adam_equilibrium_rotation,
    angle,
    effective_rate,
    equilibrium_norm,
    equilibrium_rotation,
    norm_over_steps,
    radial_share,
    turned,
)
from course_lib.regularization.spectral import (
    SpectralNorm,
    power_step,
    spectral_norm,
    with_spectral_norm,
)
from course_lib.regularization.targets import (
    confidence_penalty,
    entropy,
    generalized_cross_entropy,
    hard_bootstrap,
    label_smoothing,
    smoothed,
    soft_bootstrap,
    symmetric_cross_entropy,
    with_wrong_labels,
)

__all__ = [
    "DropBlock2d",
    "DropConnect",
    "Dropout",
    "Dropout2d",
    "GaussianDropout",
    "GaussianNoise",
    "Kind",
    "Parts",
    "Perturbed",
    "Prox",
    "RandomFeatures",
    "Reliability",
    "RidgeError",
    "Rotations",
    "Seen",
    "Shift",
    "SpectralNorm",
    "StochasticDepth",
    "Tempered",
    "WeightNorm",
    "WidthError",
    "adam_equilibrium_rotation",
    "after_step",
    "angle",
    "batch_norm",
    "bootstrap",
    "brier_score",
    "calibration_error",
    "clip_row_norms",
    "confidence_penalty",
    "cross_entropy_parts",
    "decay_only_weights",
    "degrees_of_freedom",
    "disjoint_parts",
    "drop_block2d",
    "drop_connect",
    "dropout",
    "dropout2d",
    "dropout_logistic_penalty",
    "dropout_loss",
    "dropout_solution",
    "effective_rate",
    "eigenvalues",
    "elastic_net",
    "entropy",
    "equilibrium_norm",
    "equilibrium_rotation",
    "errors_over_width",
    "fit_temperature",
    "gaussian_dropout",
    "gaussian_noise",
    "generalized_cross_entropy",
    "gradient_penalty",
    "gram_residual",
    "group_lasso",
    "group_norm",
    "group_norm_sum",
    "group_soft_threshold",
    "half_squared_norm",
    "hard_bootstrap",
    "input_noise",
    "input_noise_curvature",
    "input_noise_loss",
    "input_noise_solution",
    "input_noise_tikhonov",
    "jacobian_penalty",
    "kept",
    "kl_divergence",
    "l1",
    "l1_norm",
    "l2",
    "label_smoothing",
    "largest_singular_value",
    "layer_norm",
    "linear_depth",
    "linear_loss",
    "main_prediction",
    "max_norm",
    "minimum_norm",
    "norm_over_steps",
    "one_hot_targets",
    "power_step",
    "projected_jacobian_penalty",
    "projected_squared_jacobian",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "prox_l2",
    "r_drop",
    "radial_share",
    "reliability",
    "resampled_logits",
    "ridge",
    "ridge_bias_variance",
    "rms_norm",
    "shrinkage",
    "smoothed",
    "soft_bootstrap",
    "soft_orthogonality",
    "soft_threshold",
    "softmax_curvature",
    "spectral_norm",
    "spectral_penalty",
    "squared_error",
    "squared_error_parts",
    "squared_jacobian",
    "srip",
    "stochastic_depth",
    "symmetric_cross_entropy",
    "tempered",
    "turned",
    "unseen",
    "virtual_adversarial",
    "weight_noise",
    "weight_norm",
    "weights_of",
    "with_drop_block",
    "with_drop_connect",
    "with_dropout",
    "with_dropout2d",
    "with_noise",
    "with_norm",
    "with_spectral_norm",
    "with_stochastic_depth",
    "with_wrong_labels",
    "without_noise",
    "worst_direction",
    "zero_one_parts",
    "zero_share",
]
