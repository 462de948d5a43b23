"""Optimizers: how a gradient becomes a step. Every method of chapter 2, from scratch.

====================  ===============================================  ===============================================
name                  update rule in words                             source
====================  ===============================================  ===============================================
SGD                   a step against the gradient                      Robbins & Monro 1951
SGD(momentum)         a step along a running sum of gradients          Polyak 1964 (the heavy ball)
SGD(nesterov=True)    the same sum, seen one step ahead                Nesterov 1983; Sutskever et al., ICML 2013
Adagrad               divide by the root of all squares summed         Duchi, Hazan & Singer, JMLR 12, 2011
RMSprop               divide by the root of their running mean         Tieleman & Hinton 2012, lecture 6.5
Adam                  momentum over that root, both unbiased           Kingma & Ba 2014, arXiv:1412.6980
Adam(amsgrad=True)    Adam with a divisor that never shrinks           Reddi, Kale & Kumar 2018, arXiv:1904.09237
AdamW                 Adam, weight decay outside the division          Loshchilov & Hutter 2017, arXiv:1711.05101
Lion                  the sign of an interpolated momentum             Chen et al. 2023, arXiv:2302.06675
LAMB                  Adam's step, sized by the norm of the weights    You et al. 2019, arXiv:1904.00962
Muon                  momentum, its singular values all set near 1     Jordan et al. 2024, kellerjordan.github.io;
                                                                       Liu et al. 2025, arXiv:2502.16982
Shampoo               inverse roots of covariance on every side        Gupta, Koren & Singer 2018, arXiv:1802.09568
SAM(optimizer)        the gradient from the worst point nearby         Foret et al. 2020, arXiv:2010.01412
SAM(adaptive=True)    near in units of each weight                     Kwon et al. 2021, arXiv:2102.11600
Lookahead(optimizer)  every k steps, go back part of the way           Zhang et al. 2019, arXiv:1907.08610
Composite(a, b, …)    several optimizers, each on its own parameters   what Muon needs beside it
====================  ===============================================  ===============================================

Each rule is one small function on tensors (``adam``, ``lion``, ``newton_schulz``, …), and the class of the same name
only keeps its state. Rules work in place: ``theta`` (the parameters) and the running averages change, ``g`` (the
gradient) does not. Classes with a namesake in ``torch.optim`` take its arguments with its meaning and defaults.

``state_bytes`` tells how much memory an optimizer keeps beside the parameters.
"""

from course_lib.optimizers._method import Method, Tensors, state_bytes
from course_lib.optimizers.composite import Composite
from course_lib.optimizers.elementwise import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    RMSprop,
    adagrad,
    adam,
    amsgrad,
    decay_weights,
    gradient_descent,
    heavy_ball,
    l2_penalty,
    lion,
    nesterov,
    rmsprop,
    rmsprop_momentum,
    root_mean_square,
    standard_deviation,
)
from course_lib.optimizers.layerwise import (
    LAMB,
    Muon,
    Shampoo,
    adam_direction,
    inverse_root,
    lamb,
    muon,
    newton_schulz,
    precondition,
    trust_ratio,
    unfolded_gram,
)
from course_lib.optimizers.wrappers import (
    SAM,
    Lookahead,
    adaptive_sharpest_direction,
    lookahead,
    sharpest_direction,
)

__all__ = [
    "LAMB",
    "SAM",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Composite",
    "Lion",
    "Lookahead",
    "Method",
    "Muon",
    "RMSprop",
    "Shampoo",
    "Tensors",
    "adagrad",
    "adam",
    "adam_direction",
    "adaptive_sharpest_direction",
    "amsgrad",
    "decay_weights",
    "gradient_descent",
    "heavy_ball",
    "inverse_root",
    "l2_penalty",
    "lamb",
    "lion",
    "lookahead",
    "muon",
    "nesterov",
    "newton_schulz",
    "precondition",
    "rmsprop",
    "rmsprop_momentum",
    "root_mean_square",
    "sharpest_direction",
    "standard_deviation",
    "state_bytes",
    "trust_ratio",
    "unfolded_gram",
]
