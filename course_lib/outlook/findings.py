"""What the course measured, sorted by what it relieves: the adviser's rows.

Every figure is read from a recorded study; the words beside it hold none but the names of settings (so many labels, so
many bits). Gains that cannot be told from nothing, and losses, stand here as well: that a well-known thing did not
help is worth as much to somebody who is about to try it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from course_lib import early_stopping as stopping
from course_lib.capstone.rungs import NAMES
from course_lib.lab.training import History
from course_lib.outlook.measured import Best, FromCurve, Measured, Points, Times
from course_lib.studies import chapter_03, chapter_04, chapter_05, chapter_05_digits

HURTS = {
    "time": "Training takes too long.",
    "memory": "Training does not fit into memory.",
    "size": "The trained network is too large to ship.",
    "latency": "Answers come too slowly.",
    "labels": "There are few labels, or many of them are wrong.",
    "robustness": "It fails on inputs unlike those it was trained on, or is too sure of itself.",
    "accuracy": "It trains, but does not get good enough.",
}
"""What may hurt, in the order in which it is asked for, and how somebody would say it."""

TAKES = {
    "settings": "Nothing but other settings or a few lines of code.",
    "accuracy": "Some accuracy.",
    "training": "More training: longer or more runs, or another network first.",
    "inference": "More memory and time for each answer.",
    "data": "More data: images without labels, or what was learnt on another task.",
}
"""What a technique takes, in the order in which one would give it."""


@dataclass(frozen=True)
class Finding:
    """One thing that can be done, and what it brought where the course did it.

    Attributes
    ----------
    technique : what is done, in a few words ("a teacher's soft labels").
    chapter : where it is taught; ``section`` the heading there under which it was measured, as it stands.
    relieves : keys of ``HURTS``, the first one first.
    takes : the key of ``TAKES`` that says what it costs above all.
    gain : what it brought, read from a recorded study.
    setting : on what, and against what.
    price : what it cost, where the same runs measured that: accuracy lost, seconds more. None where nothing was.
    effort : what one has to have or do for it.
    risk : when it fails or does harm.
    """

    technique: str
    chapter: int
    section: str
    relieves: tuple[str, ...]
    takes: str
    gain: Measured
    setting: str
    price: Measured | None
    effort: str
    risk: str


def _stopped_after(history: History, rule: stopping.Criterion) -> float:
    """The epochs that a run takes if the rule may end it."""
    return stopping.replay(rule, history).epochs


def _epochs(history: History) -> float:
    return float(history.rows[-1]["epoch"])


def _kept_by(history: History, rule: stopping.Criterion, keep: str) -> float:
    """Test accuracy of the weights that were best by ``keep`` when the rule ended the run."""
    return stopping.regret(history, stopping.replay(rule, history, keep=keep)).value


def _at_the_end(history: History) -> float:
    return float(history["test_accuracy"][-1])


def _of_the_whole(history: History) -> float:
    """What an image needs that leaves at no exit, in % of that: 100, and measured."""
    return float(history["multiplications at each threshold, %"][-1])


def _strongest(method: str) -> Best:
    """A regularizer of chapter 5's photographs, at the strength that is best on the validation split."""
    options = tuple(f"{method} {strength:g}" for strength in chapter_05.STRENGTHS[method])
    return Best(options, chapter_05.CHOOSING, by="val")


def _normalised(kind: str) -> Best:
    """A normalisation of chapter 5's digits, at the rate that is best on the validation split."""
    return Best(tuple(f"{kind} {lr:g}" for lr in chapter_05_digits.RATES), chapter_05.CHOOSING, by="val")


def _at_best_rate(loss: float) -> Best:
    """The steps to a loss at the rate that takes the fewest."""
    options = tuple(f"{loss:g} at {lr:g}" for lr in chapter_04.LADDERS["momentum"])
    return Best(options, chapter_04.CHOOSING, lowest=True)


_LAST = FromCurve(_at_the_end, beside="test")
_RATE_OF_NARROW = Best(tuple(f"{lr:g}" for lr in chapter_03.WIDTH_RATES), chapter_03.SEEDS, on="usual, 64")
_ALL_SIX = " + ".join(NAMES)

FINDINGS: tuple[Finding, ...] = (
    # --- What the network sees, and how it is stepped -----------------------------------------------------------------
    Finding(
        "Turn, shift and stretch the images a little",
        1,
        "8.1 What an augmentation is worth, in points and in labels",
        ("labels", "accuracy"),
        "settings",
        Points("01", "convnet", "affine", "none", of="300"),
        "Drawn digits, 300 labels, a small convolutional network; against no augmentation, in as many steps",
        None,
        "Maps under which a person would still name the image alike, applied to whole batches.",
        "With thousands of labels and no more steps the same maps cost this network accuracy.",
    ),
    Finding(
        "Crop and flip photographs in a short run",
        1,
        "8.7 At a larger scale: photographs",
        ("accuracy",),
        "settings",
        Points("01", "cifar10", "crop and flip", "none"),
        "CIFAR-10, 10,000 labels, a small convolutional network, 12 epochs; against no augmentation, in as many steps",
        None,
        "Two lines in the recipe.",
        "A network that does not overfit yet only gets a harder task: a run three times as long caught up, no more.",
    ),
    Finding(
        "Adam in place of SGD with momentum",
        2,
        "5.6 At a larger scale",
        ("accuracy",),
        "settings",
        Points("02", "cifar10", "Adam", "momentum"),
        "CIFAR-10, 10,000 labels, a small convolutional network, 10 epochs; both at the best of five rates",
        None,
        "Another optimizer, whose rate has to be tuned anew.",
        "On MNIST in the same study it is behind momentum.",
    ),
    Finding(
        "Let the rate fall to zero along a cosine",
        3,
        "6.3 Short, long, or nobody knows: CIFAR-10",
        ("accuracy",),
        "settings",
        Points("03", "epochs_5", "cosine", "constant"),
        "CIFAR-10, 10,000 labels, a small convolutional network, 5 epochs; against a constant rate, each at its best",
        None,
        "The length of the run must be known beforehand.",
        "Stopped on its way it is no better than a constant rate; single runs at a constant rate differ widely.",
    ),
    Finding(
        "Average without a schedule where nobody knows the end",
        3,
        "6.3 Short, long, or nobody knows: CIFAR-10",
        ("time",),
        "accuracy",
        Points("03", "stopped", "schedule-free", "cosine for 15", of="5"),
        "CIFAR-10, 10,000 labels, a small convolutional network, stopped after 5 of 15 epochs; against a cosine for 15 "
        "(the price: at the 15th), rates set once for each",
        Points("03", "stopped", "schedule-free", "cosine for 15", of="15"),
        "Another optimizer, and a copy of the weights.",
        "At the end that was planned the cosine is ahead of it.",
    ),
    Finding(
        "Tune the rate on a narrow network, in muP",
        3,
        "6.6 One rate for narrow and wide: muP",
        ("time",),
        "settings",
        Points("03", "width", "muP, 1024", "usual, 1024", of=_RATE_OF_NARROW),
        "Adam, a perceptron of width 1,024 on drawn digits, at the rate that is best for width 64; against the usual "
        "parametrisation at the same rate",
        None,
        "Initial sizes and rates that are scaled by the width of each layer; check it at two widths.",
        "A wide network of the usual kind that is tuned by itself is not behind: what is saved is the tuning.",
    ),
    Finding(
        "A falling rate with large batches",
        3,
        "6.2 Take the noise away",
        ("accuracy",),
        "settings",
        Points("03", "noise", "line to zero", "constant", of="600"),
        "Drawn digits, a perceptron, 300 steps of 600 examples; against a constant rate, both tuned",
        None,
        "None: every library has it.",
        "A falling rate helps against the noise of small batches; where there is little it only slows the run down.",
    ),
    Finding(
        "Larger batches, on devices that share them",
        4,
        "5.1 Steps against examples: MNIST",
        ("time",),
        "training",
        Times("04", "momentum", "momentum, 256", "momentum, 32", of=_at_best_rate(0.2), what="times fewer steps"),
        "MNIST, 20,000 labels, a perceptron, batches of 256 to a loss of 0.2 on unseen images; against batches of 32, "
        "each at its best rate",
        Times(
            "04",
            "momentum",
            "momentum, 32",
            "momentum, 256",
            of=_at_best_rate(0.2),
            unit=32,
            other_unit=256,
            what="times as many examples",
        ),
        "Devices that compute the parts of a batch side by side, and a rate that is tuned anew.",
        "Fewer steps are less time only if a step takes no longer; above the critical batch they hardly become fewer.",
    ),
    Finding(
        "Smaller batches",
        4,
        "5.3 Equal epochs, equal steps, and the generalisation gap",
        ("memory", "accuracy"),
        "settings",
        Points("04", "equal_epochs", "64", "1024"),
        "MNIST, 5,000 labels, a perceptron, batches of 64, 16 epochs; against batches of 1,024, each at the best of "
        "five rates",
        None,
        "A rate that is tuned anew.",
        "It takes more steps for the same examples, and so more seconds where a device is not filled; batch norm "
        "wants some examples.",
    ),
    # --- What is minimised, and when it is over -----------------------------------------------------------------------
    Finding(
        "Weight decay",
        5,
        "5.1 Photographs: 5,000 labels",
        ("labels", "accuracy"),
        "settings",
        Points("05", "clean", _strongest("weight decay"), "nothing", of="test"),
        "CIFAR-10, 5,000 right labels, a network that learns them by heart; the best of three strengths, against none",
        None,
        "One number, tuned together with the rate.",
        "In a single pass over plenty of right labels it costs accuracy.",
    ),
    Finding(
        "Hold the length of each row of weights (max-norm)",
        5,
        "5.2 The same with every fifth label wrong",
        ("labels",),
        "settings",
        Points("05", "noisy", _strongest("max-norm"), "nothing", of="test"),
        "CIFAR-10, 5,000 labels of which every fifth is wrong, a network that learns them by heart; the best of three "
        "limits, against none",
        None,
        "A projection after each step; validation images whose labels are right, to choose the limit by.",
        "The gain hangs on the limit: the loosest of the three brings a small part of it.",
    ),
    Finding(
        "Smoothed labels",
        5,
        "5.7 How sure, and how right",
        ("robustness",),
        "settings",
        Points(
            "05",
            "clean",
            _strongest("label smoothing"),
            "nothing",
            of="calibration_error",
            lower=True,
            what="points less calibration error",
        ),
        "CIFAR-10, 5,000 right labels, a network that learns them by heart; the strength of three that is most "
        "accurate, against none (the price: accuracy)",
        Points("05", "clean", _strongest("label smoothing"), "nothing", of="test"),
        "One number in the loss.",
        "Too much of it makes a network too unsure, and a teacher that is trained with much of it teaches badly.",
    ),
    Finding(
        "Flip and shift photographs that are learnt by heart",
        5,
        "5.1 Photographs: 5,000 labels",
        ("labels", "accuracy"),
        "settings",
        Points("05", "clean", "flips and shifts", "nothing", of="test", leave_out=chapter_05.CHOOSING),
        "CIFAR-10, 5,000 right labels, a network that learns them by heart in 20 epochs; against none",
        None,
        "Two lines in the recipe.",
        "Where a network does not overfit the same maps cost accuracy (chapter 1).",
    ),
    Finding(
        "Batch norm as a regularizer",
        5,
        "5.4 Normalisation",
        ("labels",),
        "settings",
        Points("05", "norms_noisy", _normalised("batch"), _normalised("none"), of="test"),
        "600 drawn digits, three in ten labels wrong, a perceptron; against no normalisation, each at the best of four "
        "rates",
        None,
        "A layer behind each layer.",
        "It learns wrong labels by heart at every rate that was tried, where the plain network at a small rate does "
        "not.",
    ),
    Finding(
        "Stop when validation loss has not fallen for three epochs",
        6,
        "5.1 Fifty runs, every criterion",
        ("time",),
        "settings",
        Times(
            "06",
            "cifar10",
            "plain",
            "plain",
            of=FromCurve(partial(_stopped_after, rule=stopping.Patience(3)), "test"),
            other_of=FromCurve(_epochs, "test"),
            what="times fewer epochs",
        ),
        "CIFAR-10, 2,000 labels, a small convolutional network, plain SGD with momentum; against all 40 epochs (the "
        "price: accuracy of the weights kept, over the last ones)",
        Points(
            "06",
            "cifar10",
            "plain",
            "plain",
            other_of=_LAST,
            of=FromCurve(partial(_kept_by, rule=stopping.Patience(3), keep="val_loss"), "test"),
        ),
        "Validation images, and a copy of the best weights.",
        "What is saved is what the budget was too generous by; a schedule that falls to zero should be made shorter "
        "instead.",
    ),
    Finding(
        "Stop by validation accuracy where labels are wrong",
        6,
        "5.2 Which column, and when it gains",
        ("labels", "time"),
        "settings",
        Points(
            "06",
            "cifar10",
            "20% wrong labels",
            "20% wrong labels",
            other_of=_LAST,
            of=FromCurve(
                partial(_kept_by, rule=stopping.Patience(5, column="val_accuracy"), keep="val_accuracy"), "test"
            ),
        ),
        "CIFAR-10, 2,000 labels of which every fifth is wrong, a small convolutional network, patience 5; against the "
        "weights after 40 epochs",
        None,
        "Validation images whose labels are right.",
        "With more wrong labels accuracy fell and rose again: who stops in between loses.",
    ),
    Finding(
        "Stop by validation loss where labels are right",
        6,
        "5.2 Which column, and when it gains",
        ("time",),
        "accuracy",
        Points(
            "06",
            "mnist",
            "plain",
            "plain",
            other_of=_LAST,
            of=FromCurve(partial(_kept_by, rule=stopping.Patience(5), keep="val_loss"), "test"),
        ),
        "MNIST, 500 right labels, a perceptron, patience 5; against the weights after 40 epochs",
        None,
        "Validation images.",
        "The loss turns up while the network is still learning: watch the column that will be reported.",
    ),
    # --- A smaller network --------------------------------------------------------------------------------------------
    Finding(
        "Say the largest hundredth of each gradient, with feedback",
        7,
        "5.2 Communicating less: accuracy against bytes",
        ("time",),
        "settings",
        Times(
            "07",
            "messages",
            "top 1%, feedback",
            "every step",
            of="kB sent a worker",
            what="times fewer bytes sent",
        ),
        "MNIST, 10,000 images, eight workers, a perceptron, 3 epochs; against sending the whole gradient, each at the "
        "best of three rates (the price: accuracy)",
        Points("07", "messages", "top 1%, feedback", "every step", of="test accuracy"),
        "A second copy of the gradient in each worker, for what was not said.",
        "Momentum spoils it; with many workers the messages add up, and less is saved.",
    ),
    Finding(
        "Step alone, and average the weights now and then (local SGD)",
        7,
        "5.2 Communicating less: accuracy against bytes",
        ("time",),
        "settings",
        Times(
            "07",
            "messages",
            "local SGD, 64 steps",
            "every step",
            of="kB sent a worker",
            what="times fewer bytes sent",
        ),
        "MNIST, 10,000 images, eight workers, a perceptron, 3 epochs, 64 steps between two means; against a mean of "
        "gradients at every step, each at the best of three rates (the price: accuracy)",
        Points("07", "messages", "local SGD, 64 steps", "every step", of="test accuracy"),
        "None: fewer messages.",
        "The more the workers' data differ, the less the steps between may be many (chapter 12).",
    ),
    Finding(
        "Accumulate gradients instead of sending them",
        7,
        "5.2 Communicating less: accuracy against bytes",
        ("time",),
        "accuracy",
        Points("07", "messages", "accumulate 16 steps", "local SGD, 16 steps", of="test accuracy"),
        "MNIST, 10,000 images, eight workers, a perceptron, 3 epochs, 16 batches between two messages; against local "
        "SGD, for as many bytes",
        None,
        "None.",
        "Fewer messages are bought with fewer steps: it is a larger batch, no more.",
    ),
    Finding(
        "Share out the weights, gradients and optimizer's state (ZeRO)",
        7,
        "4.4 Sharded optimizer and sharded everything",
        ("memory",),
        "settings",
        Times(
            "07",
            "perceptron",
            "two processes, ZeRO stage 3",
            "two processes, buckets during backward",
            of="MB of weights, gradients and state",
            what="times less held by a worker",
        ),
        "MNIST, a wide perceptron, Adam, two processes; against a whole copy in each (the price: time of a step)",
        Times(
            "07",
            "perceptron",
            "two processes, buckets during backward",
            "two processes, ZeRO stage 3",
            of="ms a step",
            what="times as long a step",
        ),
        "Several workers, and a library that does it.",
        "What is shared out has to be fetched: on a slow link steps get longer.",
    ),
    Finding(
        "Cut half of the channels out of a trained network",
        8,
        "5.5 At a larger scale",
        ("size", "latency"),
        "training",
        Points("08", "sizes", "cut down", "small from the start"),
        "CIFAR-10, 10,000 labels, a ResNet, 8 epochs before and 2 after; against half of the channels from the start "
        "in as many epochs",
        None,
        "Surgery through the graph of the network, and training afterwards.",
        "With so short a training afterwards a network that was small from the start is better.",
    ),
    Finding(
        "Prune single weights by magnitude, not by chance",
        8,
        "5.5 At a larger scale",
        ("size",),
        "accuracy",
        Points("08", "criteria", "magnitude", "by chance", of="0.9"),
        "CIFAR-10, 10,000 labels, a ResNet, 90% of the weights gone at once, 2 epochs after; against as many gone by "
        "chance (the price: against none gone, trained on alike)",
        Points("08", "criteria", "magnitude", "large", of="0.9", other_part="sizes", other_of=None),
        "A mask in the forward pass while it trains on, and a file format that stores zeros cheaply.",
        "Zeros make a file smaller, not an answer faster.",
    ),
    Finding(
        "A teacher's soft labels",
        9,
        "5.5 Once or anew, and for how long",
        ("size", "labels"),
        "training",
        Points("09", "images", "250 labels, taught", "250 labels, alone", of="test"),
        "CIFAR-10, 250 labels, a small convolutional network, taught by a ResNet that had 10,000 labels; against the "
        "250 labels alone, in as many steps",
        None,
        "A teacher that knows more than your labels say, run in every step.",
        "With a teacher that had no more labels than its student much of it is gone; with plenty of labels nothing "
        "was shown for a tiny student.",
    ),
    Finding(
        "Cut a network down and let its former self teach it",
        9,
        "5.6 Small from the start, or cut down, and with whose word",
        ("size", "latency"),
        "training",
        Points("09", "sizes", "cut down, taught", "cut down, labels", of="test"),
        "CIFAR-10, 1,000 labels, a ResNet that learnt 10,000 cut to a quarter of its channels; against training on "
        "with the labels, for as many epochs (the price: against the whole network)",
        Points("09", "sizes", "cut down, taught", "teacher itself", of="test", other_part="methods"),
        "Surgery, the dense network as a teacher, and training afterwards.",
        "Much of the large network's lead is lost all the same.",
    ),
    Finding(
        "A larger and better teacher",
        9,
        "5.2 Which teacher",
        ("size",),
        "training",
        Points("09", "teachers", "width 1024", "width 16", of="test"),
        "Drawn digits, 500 labels, a student of width 8, a teacher of width 1,024; against a teacher of width 16, "
        "which is less often right",
        None,
        "A large network, trained first.",
        "The gap is too wide for the student: choose a teacher by its student, or put an assistant between.",
    ),
    Finding(
        "Let easy images leave early",
        10,
        "5.6 Early exits: cut by depth",
        ("latency",),
        "accuracy",
        Times(
            "10",
            "exits_digits",
            "together, all alike",
            "together, all alike",
            of="multiplications, %",
            other_of=FromCurve(_of_the_whole, "multiplications, %"),
            what="times fewer multiplications",
        ),
        "MNIST, a small convolutional network with two exits before the end; against its whole depth (the price: "
        "accuracy)",
        Points(
            "10",
            "exits_digits",
            "together, all alike",
            "together, all alike",
            of="accuracy, leaving early",
            other_of="accuracy, whole network",
        ),
        "A head at each exit, trained with the network, and a threshold chosen on validation images.",
        "On photographs fewer images are sure early; in a batch the last to leave decides how long it takes.",
    ),
    Finding(
        "Cut the network by layers (1F1B)",
        10,
        "5.3 When partitioning loses",
        ("memory",),
        "settings",
        Times("10", "cuts", "two: layers, 1F1B", "two: data", of="MB of weights", what="times fewer bytes of weights"),
        "MNIST, a small transformer, two processes, eight micro-batches; against data parallelism, where each process "
        "holds all of it (the price: time of a step)",
        Times("10", "cuts", "two: data", "two: layers, 1F1B", of="ms a step", what="times as long a step"),
        "Stages of equal cost, and enough micro-batches.",
        "Where the network fits into one worker data parallelism is faster.",
    ),
    Finding(
        "8 bits for weights and activations, calibrated",
        11,
        "5.3 Activations, and training for it",
        ("latency", "size"),
        "settings",
        Points("11", "bits", "everything", "everything", of="calibrated by range, 8", other_of="float"),
        "CIFAR-10 at 16×16 pixels, a ResNet; against the same network in 32 bits: no loss is what one hopes for, in a "
        "quarter of the bits",
        None,
        "Some hundred images to calibrate with, and an engine whose kernels multiply integers.",
        "Rounding alone saves no time; wrong images in calibration, or outliers, do harm.",
    ),
    Finding(
        "Round with foresight (GPTQ)",
        11,
        "5.1 How few bits: a residual network on photographs",
        ("size",),
        "accuracy",
        Points("11", "bits", "everything", "everything", of="GPTQ, 3", other_of="channel, 3"),
        "CIFAR-10 at 16×16 pixels, a ResNet, weights in 3 bits, a range for each channel; against rounding to nearest "
        "(the price: against 32 bits)",
        Points("11", "bits", "everything", "everything", of="GPTQ, 3", other_of="float"),
        "Some hundred images without labels; no training.",
        "At 2 bits it loses many points as well, if far fewer than rounding to nearest.",
    ),
    Finding(
        "Train with the rounding, steps learnt",
        11,
        "5.3 Activations, and training for it",
        ("size", "latency"),
        "training",
        Points(
            "11", "bits", "everything", "everything", of="learnt steps, 3", other_of="calibrated by least squares, 3"
        ),
        "CIFAR-10 at 16×16 pixels, a ResNet, weights and activations in 3 bits, 3 epochs more; against calibration "
        "without training (the price: against 32 bits, trained on as long)",
        Points("11", "bits", "everything", "everything", of="learnt steps, 3", other_of="float, tuned on"),
        "The training images, and some epochs more.",
        "At 2 bits it still loses points; only kernels for so few bits make answers faster.",
    ),
    Finding(
        "Prune, share values, code (Deep Compression)",
        11,
        "5.5 Bytes of a real file",
        ("size",),
        "training",
        Times(
            "11",
            "chain",
            "everything",
            "everything",
            of="bytes of 50% pruned, 16 values",
            other_of="bytes of float",
            what="times fewer bytes",
        ),
        "CIFAR-10 at 16×16 pixels, a ResNet, half of the weights pruned, 16 values shared, 6 epochs more; against the "
        "float32 file (the price: against the network trained on for 3)",
        Points(
            "11",
            "chain",
            "everything",
            "everything",
            of="50% pruned, 16 values",
            other_part="bits",
            other_of="float, tuned on",
        ),
        "Two more rounds of training, and a decoder.",
        "The file is smaller, not the network in memory; a tiny network has less to spare.",
    ),
    Finding(
        "Low rank from the start",
        11,
        "5.7 Low rank: before or after training?",
        ("memory", "size"),
        "accuracy",
        Times(
            "11",
            "chain",
            "everything",
            "everything",
            of="numbers of low rank 0.9",
            other_of="numbers",
            what="times fewer numbers",
        ),
        "CIFAR-10 at 16×16 pixels, a ResNet, ranks that keep 90% of each layer's energy; against full rank in as many "
        "epochs",
        Points(
            "11",
            "chain",
            "everything",
            "everything",
            of="low rank 0.9, before training",
            other_part="bits",
            other_of="float, tuned on",
        ),
        "The ranks, here taken from a network that was trained before.",
        "A small network has little to spare in this direction: look at the singular values first.",
    ),
    # --- Several networks ---------------------------------------------------------------------------------------------
    Finding(
        "Average the weights along a run (SWA)",
        12,
        "5.2 Along a run",
        ("accuracy",),
        "settings",
        Points("12", "run", "plain mean", "cosine", of="mean", other_of="last"),
        "CIFAR-10 at 16×16 pixels, 5,000 labels, a ResNet, the mean of a constant run's second half; against a cosine "
        "to zero in as many epochs",
        None,
        "A second copy of the weights, and fresh batch-norm statistics before it is used.",
        "With stale batch-norm statistics a mean of weights can lose far more than it gains.",
    ),
    Finding(
        "A greedy soup of fine-tunings",
        12,
        "5.3 Soups, ensembles and the best single network",
        ("accuracy",),
        "training",
        Points("12", "soups", "one start", "one start", of="greedy", other_of="best"),
        "CIFAR-10 at 16×16 pixels, eight fine-tunings of one ResNet on 1,000 labels; against the best of the eight on "
        "validation",
        None,
        "Several fine-tunings from one start, as a search leaves behind, and validation images.",
        "From different starts there is nothing to average: the soup keeps the best network alone.",
    ),
    Finding(
        "Stay small at an equal budget",
        12,
        "5.5 Growing, or large from the start",
        ("time", "memory", "size", "accuracy"),
        "settings",
        Points("12", "growing", "small only", "large from the start", of="test"),
        "CIFAR-10 at 16×16 pixels, 5,000 labels, a ResNet of 8 channels; against one of 16 channels for as many "
        "multiplications, which are fewer epochs",
        None,
        "None: fewer channels, more epochs.",
        "Found at a small budget: with a longer one the larger network may win (not measured).",
    ),
    Finding(
        "Fine-tune a network from another task",
        13,
        "5.2 Photographs, nine ways",
        ("labels",),
        "data",
        Points("13", "labels", "all weights", "from scratch", of="10"),
        "CIFAR-10 at 16×16 pixels, five classes with 10 labels each, a ResNet that learnt the other five; against "
        "random weights in as many steps, each at the best of four rates",
        None,
        "A network that learnt a related task, and a rate that is tuned anew, with more validation labels than one "
        "often has.",
        "On easy digits a convolutional network gained nothing that could be shown, and a network that had learnt by "
        "heart did harm.",
    ),
    Finding(
        "LoRA of rank 4",
        13,
        "5.3 How few numbers have to train",
        ("memory",),
        "settings",
        Times(
            "13",
            "numbers",
            "10 labels",
            "10 labels",
            of="LoRA, rank 4, numbers",
            other_of="all weights, numbers",
            what="times fewer numbers to train",
        ),
        "MNIST at 16×16 pixels, 10 labels a class, a small transformer that learnt letters; against training all "
        "weights in as many steps, each at the best of three rates",
        Points("13", "numbers", "10 labels", "10 labels", of="LoRA, rank 4", other_of="all weights"),
        "A trained network; a rate that is tuned for it.",
        "With more labels a small rank falls behind; the passes through the network stay, so little time is saved.",
    ),
    Finding(
        "Train biases and the head alone",
        13,
        "5.2 Photographs, nine ways",
        ("memory",),
        "accuracy",
        Times("13", "labels", "biases", "all weights", of="numbers", what="times fewer numbers to train"),
        "CIFAR-10 at 16×16 pixels, five classes with 250 labels each, a ResNet that learnt the other five; against "
        "training all weights in as many steps, each at the best of four rates",
        Points("13", "labels", "biases", "all weights", of="250"),
        "A trained network; a larger rate than for all weights.",
        "Only with very few labels is it not shown to be worse.",
    ),
    Finding(
        "Batch-norm statistics of the new images (AdaBN)",
        13,
        "5.6 Real digits, without a label",
        ("robustness", "labels"),
        "data",
        Points(
            "13",
            "domains",
            "source alone",
            "source alone",
            of="target, own statistics",
            other_of="target",
        ),
        "A convolutional network that learnt drawn digits reads MNIST; against the statistics it was trained with",
        None,
        "Images of the new kind without labels; no training.",
        "Only for networks with batch norm; labels of the new kind would bring far more.",
    ),
    Finding(
        "Train for features that are alike (DANN)",
        13,
        "5.6 Real digits, without a label",
        ("robustness",),
        "data",
        Points("13", "domains", "DANN, 1", "source alone", of="target, own statistics"),
        "A convolutional network that learns drawn digits beside MNIST without labels, the middle of three strengths; "
        "against AdaBN alone, both with the statistics of MNIST (the price: on drawn digits)",
        Points("13", "domains", "DANN, 1", "source alone", of="source"),
        "Images of the new kind during training, and a strength that cannot be tuned without their labels.",
        "It costs accuracy on the old kind of images.",
    ),
    Finding(
        "A source without labels (contrast)",
        13,
        "5.4 Sources with labels and without",
        ("labels",),
        "data",
        Points("13", "sources", "contrast", "none", of="tuned, 10"),
        "CIFAR-10 at 16×16 pixels, five classes with 10 labels each, a ResNet pretrained by SimCLR on the other five; "
        "against random weights, both with the probe first",
        None,
        "Many images, large batches and long pretraining; here it was short.",
        "After short pretraining with small batches it did harm, though as a probe it beat random weights.",
    ),
    Finding(
        "Several networks that answer together",
        14,
        "5.2 One large network, or several small ones?",
        ("accuracy",),
        "inference",
        Points("14", "budget", "four of 16", "one network", of="accuracy", other_part="cheap"),
        "CIFAR-10 at 16×16 pixels, 5,000 labels, four ResNets of 16 channels; against one of them",
        Times(
            "14",
            "cheap",
            "one network",
            "four of 16",
            of="flops",
            other_part="budget",
            what="times as many multiplications",
        ),
        "Training and answering several times.",
        "At an equal number of multiplications one larger network was ahead, on clean images and on noisy ones.",
    ),
    Finding(
        "Several small networks against noise",
        14,
        "5.4 Images that are not what they were",
        ("robustness",),
        "settings",
        Points("14", "budget", "four of 16", "one of 32", of="accuracy, noise"),
        "CIFAR-10 at 16×16 pixels with Gaussian noise, four ResNets of 16 channels; against one of 32 channels for as "
        "many multiplications",
        None,
        "None: as much arithmetic in other portions.",
        "With blur it could not be told; longer runs were not tried.",
    ),
    Finding(
        "One temperature for an ensemble",
        14,
        "5.2 One large network, or several small ones?",
        ("robustness",),
        "settings",
        Points(
            "14",
            "budget",
            "sixteen of 8",
            "sixteen of 8",
            of="ece, one temperature",
            other_of="ece",
            lower=True,
            what="points less calibration error",
        ),
        "CIFAR-10 at 16×16 pixels, sixteen ResNets of 8 channels, one temperature fitted on 1,000 validation images; "
        "against their mean as it is",
        Points("14", "budget", "sixteen of 8", "sixteen of 8", of="accuracy, one temperature", other_of="accuracy"),
        "Validation images and a minute; no answer changes.",
        "Fitted on clean images it may make pale or blurred ones worse calibrated than before.",
    ),
    # --- The same network, executed faster ----------------------------------------------------------------------------
    Finding(
        "More branches in training, merged for answering",
        15,
        "5.4 Cheaper blocks, at equal multiplications",
        ("accuracy", "latency"),
        "training",
        Points("15", "branches", "asymmetric", "plain", of="merged"),
        "CIFAR-10 at 16×16 pixels, 5,000 labels, 6 epochs, branches of 1×3 and 3×1 beside 3×3; against the plain "
        "network, which is what the merged one becomes (the price: numbers while it trains)",
        Times("15", "branches", "plain", "asymmetric", of="parameters", what="times as many numbers in training"),
        "Another block, and a merge that is tested to answer alike.",
        "Not every kind of branch helps: of RepVGG's it could not be told, and 1×1 expansions did harm.",
    ),
    Finding(
        "Shuffle units in place of full convolutions",
        15,
        "5.4 Cheaper blocks, at equal multiplications",
        ("size",),
        "inference",
        Times("15", "blocks", "shuffle_unit", "full", of="parameters", what="times fewer numbers"),
        "CIFAR-10 at 16×16 pixels, 5,000 labels, 6 epochs, one recipe for all; against full convolutions at an equal "
        "number of multiplications (the price: accuracy)",
        Points("15", "blocks", "shuffle_unit", "full", of="accuracy"),
        "Another block; wider layers for the same arithmetic.",
        "Equal multiplications are not equal time: on a processor such blocks answer more slowly.",
    ),
    Finding(
        "Depthwise-separable convolutions",
        15,
        "5.4 Cheaper blocks, at equal multiplications",
        ("latency",),
        "inference",
        Points("15", "blocks", "depthwise_separable", "full", of="accuracy"),
        "CIFAR-10 at 16×16 pixels, 5,000 labels, 6 epochs, one recipe for all; against full convolutions at an equal "
        "number of multiplications",
        None,
        "Another block; wider layers for the same arithmetic.",
        "They answer more slowly than full convolutions of as many multiplications: measure on your machine.",
    ),
    # --- All together -------------------------------------------------------------------------------------------------
    Finding(
        "Six techniques together",
        16,
        "5.3 Every combination: alone, left out, on average",
        ("time",),
        "settings",
        Times("16", "combinations", _ALL_SIX, "first script", of="seconds", what="times as fast"),
        "Drawn digits, the shortest run to 93% and a point more, two cores: whole batches, momentum, one cycle, a "
        "quick network, small batches, bfloat16; against the script that everybody writes first",
        None,
        "A target and a clock, and runs whose length is found on validation images.",
        "Not each of them is worth its place beside the others, and one that brings much here brings nothing alone.",
    ),
    Finding(
        "Attention in one call",
        16,
        "5.6 What carries over: a text",
        ("time",),
        "settings",
        Times("16", "text", "one call for attention", "Muon", of="seconds", what="times as fast"),
        "A small transformer on a text, as many epochs to the same quality, two cores; against attention step by step",
        None,
        "One line: the library's fused attention.",
        "The gain hangs on the machine, and on how long the sequences are.",
    ),
    Finding(
        "bfloat16 on a processor",
        16,
        "5.6 What carries over: a text",
        ("time",),
        "settings",
        Times("16", "text", "bfloat16", "one call for attention", of="seconds", what="times as fast"),
        "A small transformer on a text, as many epochs to the same quality, two cores; against float32",
        None,
        "One setting.",
        "On these cores it is slower for the text, while with channels last it made the digits' network faster.",
    ),
)
"""In the order of the chapters."""
