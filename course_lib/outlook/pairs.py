"""How techniques combine: pairs of chapters, and what is known of each pair.

==============  ======================================================================================
``PAIRS``       every pair of which something is known: measured in a chapter, or cited
``pairs_of``    those in which one chapter takes part
``table``       pair, verdict, reason and where it comes from
``listing``     the same, to be read in a notebook
``matrix``      the verdicts, 15 chapters by 15
``draw``        the same as a figure
==============  ======================================================================================

A verdict is about the setting that is named, not a law: the same pair may help in one and conflict in another.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from course_lib.lab.arguments import is_whole, require
from course_lib.lab.chapters import CHAPTERS
from course_lib.lab.plotting import INK, PALETTE, describe
from course_lib.outlook.links import readable, to_page, to_section

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

VERDICTS = ("helps", "neutral", "conflicts")
TECHNIQUES = 15
"""The chapters that teach a technique are 1 to this; chapter 16 combines them."""

_SIGNS = {"helps": "+", "neutral": "0", "conflicts": "−"}
_SIDE = 0.84
_COLOURS = {"helps": PALETTE[0], "neutral": "#6f6f6f", "conflicts": PALETTE[1]}


@dataclass(frozen=True)
class Pair:
    """Two techniques used together.

    Attributes
    ----------
    first, second : chapters, ``first < second``.
    verdict : "helps" (together more than either, or one makes the other cheaper), "neutral" (each can replace the
        other, or no direction was shown) or "conflicts" (one takes from the other).
    why : one sentence.
    section : the heading in chapter ``shown`` under which the notebook ran the two together; "" where it was not.
    shown : the chapter of that section; None where the pair is cited.
    source : authors, year, venue or arXiv number; "" where the pair was measured. ``url`` its address.
    case : where the same pair stands twice, what sets this one apart.
    """

    first: int
    second: int
    verdict: str
    why: str
    section: str = ""
    shown: int | None = None
    source: str = ""
    url: str = ""
    case: str = ""

    @property
    def measured(self) -> bool:
        """Whether the course measured it itself."""
        return self.shown is not None

    @property
    def name(self) -> str:
        """The two techniques and the case, as "pruning × compression, on language models"."""
        both = f"{_short(self.first)} × {_short(self.second)}"
        return f"{both}, {self.case}" if self.case else both

    @property
    def origin(self) -> str:
        """Where it comes from, as a link in HTML: to a section of the course, or to a source outside."""
        if self.shown is None:
            return f"cited: {to_page(self.source, self.url)}"
        return f"measured: {to_section(self.shown, self.section)}"


def _short(chapter: int) -> str:
    return CHAPTERS[chapter].short.replace("\n", " ")


_CALIBRATION: dict[str, Any] = {
    "source": "Williams and Aletras 2024 (ACL), On the Impact of Calibration Data in Post-training Quantization and "
    "Pruning",
    "url": "https://arxiv.org/abs/2311.09755",
}
_MERGING_NOISE: dict[str, Any] = {
    "source": "Zhang et al. 2025 (ICLR 2026), How does the optimizer implicitly bias the model merging loss landscape?",
    "url": "https://arxiv.org/abs/2510.04686",
}

PAIRS: tuple[Pair, ...] = (
    # 1 data preprocessing
    Pair(1, 2, "helps",
         "Scaled columns spare gradient descent most of its steps: unscaled, 20,000 are not enough; whitened, one is.",
         "6.1 Steps of gradient descent", 1),
    Pair(1, 3, "neutral",
         "Images as one tensor and a rate that goes up and down once: whether together they bring more or less than "
         "their product, five searches cannot tell.",
         "5.3 Every combination: alone, left out, on average", 16),
    Pair(1, 4, "helps",
         "Stepping on the hardest half of 40 examples beat plain batches of 40, which cost more; the easiest first "
         "lost. A bet on clean labels.",
         "5.7 Which examples: importance, hardness, curriculum", 4),
    Pair(1, 5, "neutral",
         "Each can replace the other: with every fifth label wrong, max-norm, dropout and a robust loss bring more "
         "than five points each, far more than with clean ones.",
         "5.2 The same with every fifth label wrong", 5),
    Pair(1, 6, "neutral",
         "Each can replace the other: keeping the best epoch gained 2 to 5 points on photographs with wrong labels; "
         "on right ones, chosen by the loss, it cost a point or more.",
         "5.2 Which column, and when it gains", 6),
    Pair(1, 8, "neutral",
         "The few examples by which weights are ranked change what a pruned language model can do, by much and not "
         "predictably.",
         **_CALIBRATION),
    Pair(1, 9, "helps",
         "A teacher's answers computed anew for each augmented image beat answers computed once.",
         "5.5 Once or anew, and for how long", 9),
    Pair(1, 11, "neutral",
         "Quantisation, too, depends more than had been thought on the examples that it is calibrated with.",
         **_CALIBRATION),
    Pair(1, 12, "helps",
         "Augmentation raises the noise of training, and up to an optimum noisier runs merge better.",
         **_MERGING_NOISE),
    Pair(1, 14, "helps",
         "Members that saw differently augmented images made an ensemble more than a point better than members that "
         "differ by seed; a part of it is that they are better themselves.",
         "5.3 Where differences come from", 14, case="members with augmentations of their own"),
    Pair(1, 14, "neutral",
         "Each can replace the other: averaging over shifted views of a test image gains points, and less for a "
         "network that was trained on shifts.",
         "8.6 At test time", 1, case="several views of one image"),
    Pair(1, 15, "helps",
         "A network with cheaper steps shows its worth once images need not be brought one by one: together more than "
         "the product of both, though the interval only just says so.",
         "5.3 Every combination: alone, left out, on average", 16),
    # 2 optimizers
    Pair(2, 3, "helps",
         "Only at a rate of its own can a method be judged: the chosen rates lay more than a factor of 30 apart.",
         "5.2 Which one trains best? First, a fair race", 2),
    Pair(2, 4, "helps",
         "At batches of 1,000 layer-wise rates gained more than three points over SGD (LARS) and more than half a "
         "point over Adam (LAMB), in few steps.",
         "5.6 Large batches: do layer-wise rates help?", 4),
    Pair(2, 5, "conflicts",
         "An L2 penalty inside Adam is divided away where gradients are large; decoupled decay is not.",
         "3.4 AdamW is not Adam with an L2 penalty", 2),
    Pair(2, 7, "conflicts",
         "Momentum of 0.9 cost more than five points where only the largest 1% of the gradients were sent.",
         "5.3 Ablation: error feedback and momentum", 7),
    Pair(2, 11, "neutral",
         "The best optimizer in full precision need not be the best after rounding; in training with it Shampoo lost "
         "least.",
         source="Vlassis et al. 2025 (arXiv), Beyond Outliers: A Study of Optimizers Under Quantization",
         url="https://arxiv.org/abs/2509.23500"),
    Pair(2, 12, "neutral",
         "The noise of the steps decides how well runs merge, with an optimum: neither little nor much.",
         **_MERGING_NOISE),
    Pair(2, 15, "helps",
         "With weights in 16 bits an update that keeps the rounding's remainder was as good as master weights, to a "
         "point; plain rounding lost.",
         "5.6 Weights in 16 bits", 15, case="weights in 16 bits"),
    Pair(2, 15, "helps",
         "A quick network with batch norm brought nothing alone; with SGD at a larger rate both brought more than "
         "twice the product of what each brings.",
         "5.3 Every combination: alone, left out, on average", 16, case="a quick network"),
    # 3 learning rate
    Pair(3, 4, "neutral",
         "Each can replace the other: growing the batch came within two points of letting the rate fall, in half the "
         "steps.",
         "5.5 Growing the batch instead of lowering the rate", 4, case="growing the one or lowering the other"),
    Pair(3, 4, "neutral",
         "A rate that falls gains more than two points at batches of 20 and nothing with all examples at once, where "
         "there is no noise to settle.",
         "6.2 Take the noise away", 3, case="without noise"),
    Pair(3, 5, "neutral",
         "Before a normalisation rate and decay are one knob: a step turns the weight by √(2ηλ), whichever of the two "
         "was raised.",
         "3.5 Weight decay in front of a normalisation", 5),
    Pair(3, 6, "conflicts",
         "A cosine stopped at a third of its way is more than three points behind schedules that need no end.",
         "6.3 Short, long, or nobody knows: CIFAR-10", 3),
    Pair(3, 7, "conflicts",
         "Gradients 16 steps old cost accuracy that no learning rate of the sweep brought back.",
         "5.4 Where it hurts: not waiting for each other", 7),
    Pair(3, 11, "conflicts",
         "As the rate decays the validation loss falls and what rounding costs rises.",
         source="Catalan-Tatjer et al. 2025 (ICLR 2026), Training Dynamics Impact Post-Training Quantization "
         "Robustness",
         url="https://arxiv.org/abs/2510.06213"),
    Pair(3, 12, "helps",
         "The mean along a run at a constant rate was ahead of a cosine to zero.",
         "5.2 Along a run", 12),
    Pair(3, 13, "conflicts",
         "Schedules that had come down were more than three points behind a constant rate when the images changed "
         "late: decay is a bet that nothing new will come.",
         "6.9 A late surprise", 3, case="data that change late"),
    Pair(3, 13, "conflicts",
         "A language model trained without decay was worse before fine-tuning and better after it.",
         source="Yano et al. 2026 (ICLR), Pre-training LLM without Learning Rate Decay Enhances Supervised Fine-Tuning",
         url="https://arxiv.org/abs/2603.16127", case="on language models"),
    Pair(3, 14, "conflicts",
         "Snapshots at the ends of a cyclic rate share one run's epochs; in eight epochs they were worse than one "
         "network.",
         "5.3 Where differences come from", 14),
    Pair(3, 15, "neutral",
         "One cycle and a network with cheaper steps, or bfloat16: whether they bring more or less than their product, "
         "five searches cannot tell.",
         "5.3 Every combination: alone, left out, on average", 16),
    # 4 batch size
    Pair(4, 5, "conflicts",
         "Batch norm in batches of 2 lost more than 15 points.",
         "5.9 The two ends", 4),
    Pair(4, 7, "helps",
         "Workers that speak rarely have a larger best batch, so that more of them can be used.",
         source="Charles et al. 2025 (NeurIPS), Communication-Efficient Language Model Training Scales Reliably and "
         "Robustly: Scaling Laws for DiLoCo",
         url="https://arxiv.org/abs/2503.09799"),
    Pair(4, 12, "neutral",
         "Small batches are noisy training, which merges better up to a point.",
         **_MERGING_NOISE),
    Pair(4, 15, "helps",
         "Asking for 32 images at a time was worth more than half as much again beside all other rungs of the ladder.",
         "5.1 Two ladders", 15),
    # 5 regularization
    Pair(5, 6, "neutral",
         "Each can replace the other: stopped at its best, gradient descent on a linear model was within 10% of the "
         "best weight decay.",
         "3.1 Gradient descent is a filter that opens with time", 6),
    Pair(5, 7, "conflicts",
         "Unless workers add up their batch-norm statistics, two processes end with other weights than one, and no "
         "error is raised.",
         "4.3 Data parallelism", 7),
    Pair(5, 8, "helps",
         "A proximal penalty left more than half of the weights exactly zero; on groups it left whole rows, ready to "
         "be cut.",
         "3.4 Zeros that are zeros", 5),
    Pair(5, 9, "conflicts",
         "A teacher trained on labels smoothed by 0.3 is worse than none, though more often right than a plain one.",
         "5.2 Which teacher", 9),
    Pair(5, 12, "conflicts",
         "With the old batch-norm statistics an aligned mean lost more than five of its points; they have to be "
         "estimated anew.",
         "5.1 Strangers and siblings", 12, case="batch norm"),
    Pair(5, 12, "helps",
         "Stronger weight decay raises the noise of training and, up to an optimum, the success of merging.",
         **_MERGING_NOISE, case="weight decay"),
    Pair(5, 13, "conflicts",
         "A penalty that holds the weights near the source (L2-SP, its strength not tuned) was more than three points "
         "behind tuning all weights with 250 labels a class.",
         "5.2 Photographs, nine ways", 13, case="a penalty towards the source"),
    Pair(5, 13, "helps",
         "Giving batch norm the statistics of the new images gained more than two points without a label or a step.",
         "5.6 Real digits, without a label", 13, case="batch norm"),
    Pair(5, 14, "helps",
         "Modality dropout gave early fusion more than 15 points where one half was missing, and cost it less than two "
         "with both.",
         "5.6 Two views, and one that is missing", 14),
    Pair(5, 15, "helps",
         "In evaluation a batch norm becomes part of its convolution, with the same answers.",
         "4.1 A batch norm becomes part of its convolution", 15),
    # 6 early stopping
    Pair(6, 9, "neutral",
         "Twice the epochs brought a taught student more than two points, and more than they brought the labels alone: "
         "stopping early would give that away.",
         "5.5 Once or anew, and for how long", 9),
    Pair(6, 13, "helps",
         "A language model whose pre-training stops earlier can end higher after fine-tuning.",
         source="Springer et al. 2025 (ICML), Overtrained Language Models Are Harder to Fine-Tune",
         url="https://arxiv.org/abs/2503.19206"),
    # 7 parallel training
    Pair(7, 10, "neutral",
         "They compete: for the narrow job data parallelism beat both cuts; for the wide one with few tokens it sends "
         "most.",
         "5.3 When partitioning loses", 10),
    Pair(7, 11, "helps",
         "Four workers that send the largest 1% with error feedback saved 20 times the bytes for less than five "
         "points.",
         "5.2 Communicating less: accuracy against bytes", 7),
    Pair(7, 12, "helps",
         "Averaging made one network, right on more than 70% of all digits, out of clients that alone were right on "
         "less than 25%.",
         "5.6 Data that stay where they are", 12),
    # 8 pruning
    Pair(8, 9, "helps",
         "A network cut to a quarter of its channels learnt one to four points more from its former self than from the "
         "labels alone.",
         "5.6 Small from the start, or cut down, and with whose word", 9),
    Pair(8, 10, "helps",
         "In a mixture of experts the expert is a unit to place and to cut; half could go with little loss in writing "
         "code.",
         source="Lasby et al. 2025 (ICLR 2026), REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
         url="https://arxiv.org/abs/2510.13999"),
    Pair(8, 11, "helps",
         "Half-pruned, shared and coded, the file was more than nine times smaller for less than half a point; which "
         "of pruning and rounding comes first could not be told.",
         "5.5 Bytes of a real file", 11, case="one file"),
    Pair(8, 11, "conflicts",
         "The two errors do not simply add, and pruning should come first.",
         source="Harma et al. 2024 (ICLR 2025), Effective Interplay between Sparsity and Quantization: From Theory to "
         "Practice",
         url="https://arxiv.org/abs/2405.20935", case="on language models"),
    Pair(8, 12, "neutral",
         "Trimming the differences first (TIES, DARE) was not shown to beat the plain mean by three points.",
         "5.4 Two skills, learnt apart", 12),
    Pair(8, 13, "helps",
         "Sparse ImageNet networks transferred as well as dense ones or better, with large differences between pruning "
         "methods.",
         source="Iofinova et al. 2021 (CVPR 2022), How Well Do Sparse ImageNet Models Transfer?",
         url="https://arxiv.org/abs/2111.13445"),
    Pair(8, 15, "neutral",
         "Three quarters of the weights zero gave no speed, half of the units cut out did: a saving needs a kernel or "
         "a smaller shape.",
         "6.1 What zeros do not save", 8),
    # 9 distillation
    Pair(9, 14, "conflicts",
         "A student taught by the ensemble was worse than a member: runs of eight epochs, with nothing tuned, did not "
         "hand the gain on.",
         "5.2 One large network, or several small ones?", 14, case="in short runs"),
    Pair(9, 14, "helps",
         "An ensemble distilled into a model eight times smaller kept 83% of its gain.",
         source="Kim et al. 2025 (arXiv), Pre-training under infinite compute",
         url="https://arxiv.org/abs/2509.14786", case="with scarce text"),
    Pair(9, 15, "helps",
         "A draft model taught by its target is accepted more often: 10 to 45% faster decoding.",
         source="Zhou et al. 2023 (ICLR 2024), DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
         url="https://arxiv.org/abs/2310.08461"),
    # 10 model partitioning
    Pair(10, 11, "helps",
         "Activations confined to a known subspace cut a pipeline's messages by up to 99%.",
         source="Ramasinghe et al. 2025 (arXiv), Protocol Models: Scaling Decentralized Training with "
         "Communication-Efficient Model Parallelism",
         url="https://arxiv.org/abs/2506.01260"),
    Pair(10, 12, "helps",
         "Experts trained apart, each by an owner of data, are joined behind a router and can be switched off again.",
         source="Shi et al. 2025 (NeurIPS), FlexOlmo: Open Language Models for Flexible Data Use",
         url="https://arxiv.org/abs/2507.07024"),
    Pair(10, 13, "helps",
         "Thousands of low-rank tunings share one base, cut over several GPUs.",
         source="Sheng et al. 2023 (MLSys 2024), S-LoRA: Serving Thousands of Concurrent LoRA Adapters",
         url="https://arxiv.org/abs/2311.03285"),
    Pair(10, 15, "helps",
         "Reading the prompt and writing the answer on different GPUs served up to 7.4 times the requests within the "
         "same limits.",
         source="Zhong et al. 2024 (OSDI), DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large "
         "Language Model Serving",
         url="https://arxiv.org/abs/2401.09670"),
    # 11 compression
    Pair(11, 12, "helps",
         "The differences to a common base span a narrow range: kept at 8% of the memory they merged as well or "
         "better.",
         source="Kim et al. 2025 (ICCV), Task Vector Quantization for Memory-Efficient Model Merging",
         url="https://arxiv.org/abs/2503.06921"),
    Pair(11, 13, "helps",
         "The signs of a tuning's differences, one bit each, kept more than the largest twentieth of them or a rank of "
         "one.",
         "5.9 A difference in one bit", 11),
    Pair(11, 15, "helps",
         "In int8 the engine ran the wide network more than 1.3 times as fast from a file more than three times "
         "smaller; the tiny one gained less.",
         "5.8 What engines make of it", 11),
    # 12 model merging, 13 transfer, 14 fusion
    Pair(12, 13, "helps",
         "Two networks tuned from one base had each forgotten half; their mean was better than either on all ten "
         "classes.",
         "5.4 Two skills, learnt apart", 12),
    Pair(12, 14, "neutral",
         "After two epochs in common the mean of the weights is within a point of the ensemble, at one network's "
         "price; of strangers it is not.",
         "5.1 Strangers and siblings", 12),
    Pair(14, 15, "helps",
         "A cascade kept the accuracy of eight to half a point at less than three quarters of their multiplications; "
         "so did four members.",
         "5.5 Asking the ensemble only where it is needed", 14),
)  # fmt: skip


def pairs_of(chapter: int) -> tuple[Pair, ...]:
    """The pairs in which a chapter takes part; of chapter 16, those that it measured.

    Raises
    ------
    ValueError : ``chapter`` is not 1 to 16.
    """
    allowed = f"a chapter from 1 to {TECHNIQUES + 1}"
    require("chapter", chapter, lambda n: is_whole(n) and 1 <= n <= TECHNIQUES + 1, allowed)
    if chapter > TECHNIQUES:
        return tuple(pair for pair in PAIRS if pair.shown == chapter)
    return tuple(pair for pair in PAIRS if chapter in (pair.first, pair.second))


def table(chapter: int | None = None, verdict: str | None = None) -> pd.DataFrame:
    """All pairs, or those of a chapter or a verdict: pair, verdict, why, and where it comes from as a link in HTML.

    Raises
    ------
    ValueError : as in ``pairs_of``; or a verdict that is not known.
    """
    if verdict is not None:
        require("verdict", verdict, lambda x: x in VERDICTS, "one of " + ", ".join(map(repr, VERDICTS)))
    pairs = PAIRS if chapter is None else pairs_of(chapter)
    rows = [(p.name, p.verdict, p.why, p.origin) for p in pairs if verdict in (None, p.verdict)]
    return pd.DataFrame(rows, columns=["pair", "verdict", "why", "measured or cited"])


def listing(chapter: int | None = None, verdict: str | None = None) -> Styler:
    """``table`` to be read, in a notebook or on the web site."""
    frame = table(chapter, verdict)
    plain = ["pair", "verdict", "why"]
    frame[plain] = frame[plain].map(html.escape)  # what is left is the link
    uuid = f"pairs-{chapter or 'all'}-{verdict or 'all'}"
    return readable(frame.style.hide(axis="index").set_uuid(uuid))


def matrix() -> pd.DataFrame:
    """The verdicts, 15 by 15 and symmetric: H, N or C (the first letter) where measured, h, n or c where cited.

    "" where nothing is known; two letters with "/" between where the verdicts of a pair differ.
    """
    names = [_short(number) for number in range(1, TECHNIQUES + 1)]
    cells = np.full((TECHNIQUES, TECHNIQUES), "", dtype=object)
    for (first, second), marks in _marks().items():
        letters = "/".join(verdict[0].upper() if measured else verdict[0] for verdict, measured in marks.items())
        cells[first - 1, second - 1] = cells[second - 1, first - 1] = letters
    return pd.DataFrame(cells, index=names, columns=names)


def _marks() -> dict[tuple[int, int], dict[str, bool]]:
    """(first, second) -> its verdicts, in the order of ``VERDICTS``, and whether any of each was measured."""
    found: dict[tuple[int, int], dict[str, bool]] = {}
    for pair in sorted(PAIRS, key=lambda pair: VERDICTS.index(pair.verdict)):
        marks = found.setdefault((pair.first, pair.second), {})
        marks[pair.verdict] = marks.get(pair.verdict, False) or pair.measured
    return found


def draw(ax: Axes | None = None) -> Axes:
    """``matrix`` as a figure, one triangle of it: a sign for each verdict, filled where measured, hollow where cited.

    A square with two halves has two verdicts.
    """
    if ax is None:
        figure, ax = plt.subplots(figsize=(8.2, 6.8))
        describe(figure, _in_words())
    for (first, second), marks in _marks().items():
        width = _SIDE / len(marks)
        for k, (verdict, measured) in enumerate(marks.items()):
            _square(ax, (first - _SIDE / 2 + k * width, second - _SIDE / 2), width, verdict, measured)
    numbers = range(1, TECHNIQUES + 1)
    ax.set_xticks(numbers[:-1], [f"{n} {_short(n)}" for n in numbers[:-1]], rotation=40, ha="right")
    ax.set_yticks(numbers[1:], [f"{n} {_short(n)}" for n in numbers[1:]])
    ax.set(xlim=(0.4, TECHNIQUES - 0.4), ylim=(TECHNIQUES + 0.6, 1.4), aspect="equal")
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_title("More than half of the known pairs help one another")
    _key(ax)
    return ax


def _in_words() -> str:
    known = _marks().values()
    counts = ", ".join(f"{verdict} in {sum(verdict in marks for marks in known)}" for verdict in VERDICTS)
    return f"The fifteen techniques as a triangle of pairs, a sign for each of {len(known)} known pairs: {counts}."


def _square(ax: Axes, corner: tuple[float, float], width: float, verdict: str, measured: bool) -> None:
    colour = _COLOURS[verdict]
    face, ink = (colour, "white") if measured else ("white", colour)
    ax.add_patch(Rectangle(corner, width, _SIDE, facecolor=face, edgecolor=colour, linewidth=1.4, zorder=2))
    x, y = corner[0] + width / 2, corner[1] + _SIDE / 2
    ax.text(x, y, _SIGNS[verdict], ha="center", va="center", color=ink, fontsize=12, weight="bold")


def _key(ax: Axes) -> None:
    """What signs and fillings mean, in the empty half of the figure."""
    meanings = ("one helps the other", "substitutes, or no direction shown", "one takes from the other")
    for row, (verdict, meaning) in enumerate(zip(VERDICTS, meanings, strict=True), start=2):
        for x, measured in ((6.0, True), (7.0, False)):
            _square(ax, (x, row - _SIDE / 2), _SIDE, verdict, measured)
        ax.text(8.05, row, f"{verdict}: {meaning}", va="center", fontsize=9, color=INK)
    words = "filled: measured in the course; hollow: cited;\ntwo halves: it depends; empty: nothing known here"
    ax.text(6.0, 5.1, words, va="center", fontsize=9, color=INK, linespacing=1.4)
