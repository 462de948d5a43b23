"""Distillation: a small network learns from a large one. Every method of chapter 9, from scratch.

======================  ========================================  ========================================
name                    what it asks for, gives or does           source
======================  ========================================  ========================================
*targets*               *the teacher's logits*
soft_targets            its probabilities, at a temperature       Hinton, Vinyals & Dean 2015,
                                                                  arXiv:1503.02531
match_logits            the squared error of logits               Ba & Caruana 2013, arXiv:1312.6184
decoupled               the label's class and the others apart    Zhao et al. 2022, arXiv:2203.08679
standardized            logits without their size                 Sun et al. 2024, arXiv:2403.01427
labelled_only           the labels that there are
*layerwise, relations*  *its features*
hints                   themselves, behind a regressor            Romero et al. 2014, arXiv:1412.6550
attention_transfer      where they are large                      Zagoruyko & Komodakis 2016,
                                                                  arXiv:1612.03928
similarity_preserving   which examples look alike                 Tung & Mori 2019, arXiv:1907.09682
relational              distances and angles between examples     Park et al. 2019, arXiv:1904.05068
contrastive             one example told from the others          Tian et al. 2019, arXiv:1910.10699
*taps, connecting*      *layers by name; regressors, on and off*
*lessons*               *student and teacher run once a batch*
*teachers*              *who teaches*
frozen, Ensemble        one network, or several as one            Hinton, Vinyals & Dean 2015
cached                  what it said once of each image           Beyer et al. 2021, arXiv:2106.05237
transfer_set            more images, without labels               Bucila, Caruana & Niculescu-Mizil 2006,
                                                                  KDD
*passing_on*            *who teaches whom*
born_again              the like of itself                        Furlanello et al. 2018, arXiv:1805.04770
assistants              from large to small in steps              Mirzadeh et al. 2019, arXiv:1902.03393
mutual                  students one another                      Zhang et al. 2017, arXiv:1706.00384
self_distillation       the last layer the earlier ones           Zhang et al. 2019, arXiv:1905.08094
mean_teacher            the average of its own steps              Tarvainen & Valpola 2017,
                                                                  arXiv:1703.01780
*data_free*             *images out of the teacher*
invert                  by what batch norm remembers              Yin et al. 2019, arXiv:1912.08795
*principle*             *why it helps*
soft_gradient, …        the gradient and its limit                Hinton, Vinyals & Dean 2015
dark_knowledge          what it thinks of the other classes       Hinton, Vinyals & Dean 2015
risk_variance, …        the noise of labels that it spares        Menon et al. 2020, arXiv:2005.10419
*fidelity*              *how much of it is in the student*
agreement, …            equal answers, where wrong, by how much   Stanton et al. 2021, arXiv:2106.05945
======================  ========================================  ========================================

Distillation is an objective ``(model, x, y) -> loss`` around another, as penalties are:
``Recipe(objective=partial(soft_targets, teacher=frozen(teacher)))``. They combine freely, with one another and with
those of chapter 5, and student and teacher run once a batch however many of them look.
"""

from course_lib.distillation.connecting import (
    Connected,
    Projection,
    connector,
    connectors,
    pooled,
    with_connectors,
    with_projections,
    without_connectors,
)
from course_lib.distillation.data_free import (
    batch_norms,
    black_and_white,
    invert,
    inverted,
    statistics_distance,
    total_variation,
)
from course_lib.distillation.fidelity import (
    Answers,
    agreement,
    agreement_where_wrong,
    answers,
    divergence_from,
)
from course_lib.distillation.layerwise import (
    attention_loss,
    attention_map,
    attention_transfer,
    hint_loss,
    hints,
)
from course_lib.distillation.lessons import (
    Lesson,
    Teacher,
    lesson,
)
from course_lib.distillation.passing_on import (
    SEEDS_APART,
    Cohort,
    WithAverage,
    WithExits,
    assistants,
    born_again,
    distilled,
    following,
    mean_teacher,
    mutual,
    self_distillation,
)
from course_lib.distillation.principle import (
    DarkKnowledge,
    TeacherRisk,
    dark_knowledge,
    distance_to_limit,
    gradient_weights,
    hot_gradient,
    risk,
    risk_variance,
    sampled_risks,
    soft_gradient,
    teacher_risk,
)
from course_lib.distillation.relations import (
    angle_loss,
    angles,
    contrastive,
    contrastive_loss,
    distance_loss,
    distances,
    relational,
    similarities,
    similarity_loss,
    similarity_preserving,
)
from course_lib.distillation.taps import (
    features,
)
from course_lib.distillation.targets import (
    UNLABELLED,
    centred,
    decoupled,
    labelled_only,
    logit_loss,
    match_logits,
    other_classes_losses,
    soft_loss,
    soft_targets,
    standardized,
    standardized_logits,
    target_class_losses,
    unlabelled,
)
from course_lib.distillation.teachers import (
    Cached,
    Ensemble,
    cached,
    frozen,
    transfer_set,
)

__all__ = [
    "SEEDS_APART",
    "UNLABELLED",
    "Answers",
    "Cached",
    "Cohort",
    "Connected",
    "DarkKnowledge",
    "Ensemble",
    "Lesson",
    "Projection",
    "Teacher",
    "TeacherRisk",
    "WithAverage",
    "WithExits",
    "agreement",
    "agreement_where_wrong",
    "angle_loss",
    "angles",
    "answers",
    "assistants",
    "attention_loss",
    "attention_map",
    "attention_transfer",
    "batch_norms",
    "black_and_white",
    "born_again",
    "cached",
    "centred",
    "connector",
    "connectors",
    "contrastive",
    "contrastive_loss",
    "dark_knowledge",
    "decoupled",
    "distance_loss",
    "distance_to_limit",
    "distances",
    "distilled",
    "divergence_from",
    "features",
    "following",
    "frozen",
    "gradient_weights",
    "hint_loss",
    "hints",
    "hot_gradient",
    "invert",
    "inverted",
    "labelled_only",
    "lesson",
    "logit_loss",
    "match_logits",
    "mean_teacher",
    "mutual",
    "other_classes_losses",
    "pooled",
    "relational",
    "risk",
    "risk_variance",
    "sampled_risks",
    "self_distillation",
    "similarities",
    "similarity_loss",
    "similarity_preserving",
    "soft_gradient",
    "soft_loss",
    "soft_targets",
    "standardized",
    "standardized_logits",
    "statistics_distance",
    "target_class_losses",
    "teacher_risk",
    "total_variation",
    "transfer_set",
    "unlabelled",
    "with_connectors",
    "with_projections",
    "without_connectors",
]
