"""Fusion: several networks or inputs decide together. All of chapter 14, from scratch.

==============================  ========================================  ==============================================
name                            what it does, gives or is                 source
==============================  ========================================  ==============================================
*voting*                        *several answers into one*
plurality, borda, winner        votes, ranks, ties                        Borda 1781
mean_probability                the mean of probabilities                 Lakshminarayanan et al. 2016, arXiv:1612.01474
geometric_mean, mean_logits     the geometric one, twice                  Wood et al. 2023, arXiv:2301.03962
fit_weights                     of the least negative log-likelihood      Cover 1984, IEEE Trans. Inf. Theory 30
greedy_selection                one by one, some more than once           Caruana et al. 2004, ICML
*ensembles*                     *networks that answer together*
deep_ensemble                   other first weights                       Lakshminarayanan et al. 2016
snapshots                       ends of cycles of one run                 Huang et al. 2017, arXiv:1704.00109
fast_geometric                  short cycles around a trained one         Garipov et al. 2018, arXiv:1802.10026
MonteCarloDropout               dropout that goes on                      Gal & Ghahramani 2015, arXiv:1506.02142
*together*                      *many networks trained in one run*
train_together, Stack           weights stacked, one pass for all         –
*shared*                        *several members in one network*
BatchEnsemble                   rank-1 factors                            Wen et al. 2020, arXiv:2002.06715
MIMO, mimo_loss                 several images in, several answers out    Havasi et al. 2020, arXiv:2010.06610
*resampling*                    *shown other things*
bagging, out_of_bag             bootstrap samples                         Breiman 1996, Machine Learning 24
random_subspaces                some of the pixels                        Ho 1998, IEEE TPAMI 20
adaboost, boosted_networks      weights of examples                       Zhu et al. 2009, Stat. Its Interface 2
*stacking*                      *a learner on top*
out_of_fold, stacking           of answers to unseen examples             Wolpert 1992, Neural Networks 5
*cascades*                      *the next only where it is not sure*
Cascade, cascaded               one network after the other               Wang et al. 2020, arXiv:2012.01988
exit_logits, exit_flops         the exits of one network                  Teerapittayanon et al. 2016,
                                                                          arXiv:1709.01686
*calibration*                   *how sure it should be*
tempered_members, fit_vector    temperatures, vectors                     Guo et al. 2017, arXiv:1706.04599
brier_parts                     reliability, resolution, uncertainty      Murphy 1973, J. Applied Meteorology 12
risk_coverage, error_auroc      answers that are held back                Geifman & El-Yaniv 2017, arXiv:1705.08500
*principle*                     *why it helps*
squared_ambiguity, …            members' loss less diversity              Krogh & Vedelsby 1994, NIPS
disagreement, …                 members two by two                        Kuncheva & Whitaker 2003, Machine Learning 51
TWO_HALVES                      calibrated members, a mean that is not    Rahaman & Thiery 2020, arXiv:2007.08792
*inputs*                        *several inputs of one example*
EarlyFusion, LateFusion         where they meet                           –
Gated                           gates that say which to hear              Arevalo et al. 2017, arXiv:1702.01992
Bilinear                        products, low-rank                        Kim et al. 2016, arXiv:1610.04325
modality_dropout, Missing       inputs that are not there                 Neverova et al. 2014, arXiv:1501.00102
*answers*                       *logits of several networks*
==============================  ========================================  ==============================================

*Fusion* lets several networks decide together; *merging* (chapter 12) makes one network's weights out of several. What
an ensemble loses is what its members lose on average less how far they differ, so it is never worse than its average
member; it costs as many passes as it has members.

Five other techniques are built on, each for something that stands there already and would else be written twice:
chapter 13's ``probe``, chapter 9's ``Ensemble`` and ``WithExits``, chapter 5's measures of calibration and its dropout,
chapter 3's cosine with restarts, chapter 1's folds.
"""

from course_lib.fusion.answers import (
    members_logits,
)
from course_lib.fusion.calibration import (
    BrierParts,
    RiskCoverage,
    Vector,
    VectorScaled,
    brier_parts,
    error_auroc,
    fit_vector,
    negative_log_likelihood,
    risk_coverage,
    tempered_members,
    vector_scaled,
)
from course_lib.fusion.cascades import (
    Answered,
    Cascade,
    Chosen,
    agreement,
    cascaded,
    exit_flops,
    exit_logits,
    expected_flops,
    last,
    margin,
    max_probability,
    negative_entropy,
    threshold_for_accuracy,
    thresholds_for_accuracy,
)
from course_lib.fusion.ensembles import (
    SEEDS_APART,
    Members,
    MonteCarloDropout,
    deep_ensemble,
    deep_ensemble_at_once,
    dropouts,
    fast_geometric,
    member_seeds,
    snapshots,
    trained,
    triangle_rate,
)
from course_lib.fusion.inputs import (
    Attended,
    Bilinear,
    Concatenated,
    EarlyFusion,
    Gated,
    IntermediateFusion,
    LateFusion,
    Missing,
    modality_dropout,
)
from course_lib.fusion.principle import (
    TWO_HALVES,
    Ambiguity,
    ThreeParts,
    World,
    arithmetic_ambiguity,
    bias_variance_diversity,
    calibration_gap,
    disagreement,
    double_fault,
    error_correlation,
    geometric_ambiguity,
    majority_accuracy,
    pair_mean,
    q_statistic,
    squared_ambiguity,
    variance_of_mean,
)
from course_lib.fusion.resampling import (
    Bagged,
    Boost,
    Boosting,
    Masked,
    Voices,
    adaboost,
    bagging,
    boosted_networks,
    boosted_votes,
    bootstrap_rows,
    example_weighted,
    out_of_bag,
    out_of_bag_error,
    patch_mask,
    pixel_mask,
    random_subspaces,
    samme,
    weighted_by_example,
)
from course_lib.fusion.shared import (
    MIMO,
    BatchEnsemble,
    RankOne,
    mimo_loss,
)
from course_lib.fusion.stacking import (
    Stacked,
    out_of_fold,
    side_by_side,
    stacking,
)
from course_lib.fusion.together import (
    Stack,
    train_together,
)
from course_lib.fusion.voting import (
    Selection,
    accuracy,
    accuracy_weights,
    borda,
    fit_weights,
    geometric_mean,
    greedy_selection,
    log_likelihood,
    mean_logits,
    mean_probability,
    plurality,
    tied,
    votes,
    winner,
)

__all__ = [
    "MIMO",
    "SEEDS_APART",
    "TWO_HALVES",
    "Ambiguity",
    "Answered",
    "Attended",
    "Bagged",
    "BatchEnsemble",
    "Bilinear",
    "Boost",
    "Boosting",
    "BrierParts",
    "Cascade",
    "Chosen",
    "Concatenated",
    "EarlyFusion",
    "Gated",
    "IntermediateFusion",
    "LateFusion",
    "Masked",
    "Members",
    "Missing",
    "MonteCarloDropout",
    "RankOne",
    "RiskCoverage",
    "Selection",
    "Stack",
    "Stacked",
    "ThreeParts",
    "Vector",
    "VectorScaled",
    "Voices",
    "World",
    "accuracy",
    "accuracy_weights",
    "adaboost",
    "agreement",
    "arithmetic_ambiguity",
    "bagging",
    "bias_variance_diversity",
    "boosted_networks",
    "boosted_votes",
    "bootstrap_rows",
    "borda",
    "brier_parts",
    "calibration_gap",
    "cascaded",
    "deep_ensemble",
    "deep_ensemble_at_once",
    "disagreement",
    "double_fault",
    "dropouts",
    "error_auroc",
    "error_correlation",
    "example_weighted",
    "exit_flops",
    "exit_logits",
    "expected_flops",
    "fast_geometric",
    "fit_vector",
    "fit_weights",
    "geometric_ambiguity",
    "geometric_mean",
    "greedy_selection",
    "last",
    "log_likelihood",
    "majority_accuracy",
    "margin",
    "max_probability",
    "mean_logits",
    "mean_probability",
    "member_seeds",
    "members_logits",
    "mimo_loss",
    "modality_dropout",
    "negative_entropy",
    "negative_log_likelihood",
    "out_of_bag",
    "out_of_bag_error",
    "out_of_fold",
    "pair_mean",
    "patch_mask",
    "pixel_mask",
    "plurality",
    "q_statistic",
    "random_subspaces",
    "risk_coverage",
    "samme",
    "side_by_side",
    "snapshots",
    "squared_ambiguity",
    "stacking",
    "tempered_members",
    "threshold_for_accuracy",
    "thresholds_for_accuracy",
    "tied",
    "train_together",
    "trained",
    "triangle_rate",
    "variance_of_mean",
    "vector_scaled",
    "votes",
    "weighted_by_example",
    "winner",
]
