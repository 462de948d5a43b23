"""Chapter 14's study: several residual networks against one large one, and where their differences come from.

CIFAR-10 at 16×16 pixels, 5,000 training images, ResNets of three blocks; SGD with momentum and weight decay, eight
epochs, a cosine to zero, on flipped and shifted images, as in chapter 12's study. Every ensemble answers by the mean
of probabilities; a temperature is fitted on 1,000 validation images. Answers are judged on 5,000 test images, as they
are and after Gaussian noise, blur and loss of contrast. Float32.

"budget": one network of 32 channels, four of 16, sixteen of 8, which multiply about equally often; networks do not
share anything but the images. "sources": four networks of 16 channels and what makes them differ. "cheap": members
that cost less than networks of their own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import distillation, fusion
from course_lib import preprocessing as pre
from course_lib import regularization as reg
from course_lib.lab.costs import flops
from course_lib.lab.data import Augment, Dataset, Split
from course_lib.lab.models import convnet, mlp, resnet
from course_lib.lab.studies import Arm, Part, Study
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.studies.chapter_12 import PIXELS, flipped_and_shifted, network, sgd, some

SEEDS = (0, 1, 2, 3, 4)
EPOCHS, MEMBERS, WIDTH = 8, 4, 16
BUDGETS = {"one of 32": (32, 1), "four of 16": (16, 4), "sixteen of 8": (8, 16)}
SHAPE = (3, PIXELS, PIXELS)


# --- Images that are not what they were -------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    """Gaussian noise of 25 of 255 levels, the same for every network."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x.float() + 25 * noise).clamp(0, 255).round().to(torch.uint8)


def blurred(x: Tensor) -> Tensor:
    """Each pixel the mean of the nine around it."""
    return F.avg_pool2d(F.pad(x.float(), (1, 1, 1, 1), mode="replicate"), 3, 1).round().to(torch.uint8)


def pale(x: Tensor) -> Tensor:
    """A third of the contrast."""
    return (127.5 + (x.float() - 127.5) / 3).round().to(torch.uint8)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {"": lambda x: x, "noise": noisy, "blur": blurred, "pale": pale}


def shifted(split: Split, how: Callable[[Tensor], Tensor]) -> Split:
    """The split's images after a shift; they are standardised as the network expects."""
    assert isinstance(split.inputs, Tensor)
    return replace(split, inputs=how(split.inputs))


# --- What is measured -------------------------------------------------------------------------------------------------


def judged(log_q: Tensor, labels: Tensor, end: str = "") -> dict[str, float]:
    """Accuracy, negative log-likelihood, Brier score and calibration error."""
    return {
        f"accuracy{end}": fusion.accuracy(log_q, labels),
        f"nll{end}": fusion.negative_log_likelihood(log_q, labels),
        f"brier{end}": fusion.brier_parts(log_q, labels).score,
        f"ece{end}": reg.calibration_error(log_q, labels),
    }


def told(networks: list[nn.Module], data: Dataset) -> dict[str, float]:
    """The ensemble of these networks, its members on average, and how they differ."""
    held = fusion.members_logits(networks, data.val).cpu()
    known = data.val.labels.cpu()
    temperature = reg.fit_temperature(fusion.mean_probability(held), known)
    found: dict[str, float] = {"temperature": temperature, "flops": float(sum(_flops(net) for net in networks))}
    for name, how in SHIFTS.items():
        split = shifted(data.test, how)
        logits, labels = fusion.members_logits(networks, split).cpu(), split.labels.cpu()
        end = f", {name}" if name else ""
        log_q = fusion.mean_probability(logits)
        found |= judged(log_q, labels, end)
        found |= judged(log_q / temperature, labels, f", one temperature{end}")
        alone = [judged(own, labels) for own in logits]
        found |= {f"members' {key}{end}": sum(own[key] for own in alone) / len(alone) for key in alone[0]}
        if name == "" and len(networks) > 1:
            right = logits.argmax(2) == labels
            found["disagreement"] = fusion.pair_mean(fusion.disagreement(logits.argmax(2)))
            found["correlation"] = fusion.pair_mean(fusion.error_correlation(right))
            found["diversity"] = fusion.arithmetic_ambiguity(logits, labels).diversity
            sure = fusion.risk_coverage(fusion.max_probability(log_q), log_q.argmax(1) == labels)
            found["area"] = sure.area
    return found


def _flops(model: nn.Module) -> int:
    weight = next(model.parameters())
    return flops(model.eval(), torch.zeros(1, *SHAPE, dtype=weight.dtype, device=weight.device))


def of_first(networks: list[nn.Module], data: Dataset) -> dict[str, float]:
    """The ensembles of the first 1, 2, 4, … networks."""
    found = dict[str, float]()
    logits, labels = fusion.members_logits(networks, data.test).cpu(), data.test.labels.cpu()
    count = 1
    while count <= len(networks):
        found |= judged(fusion.mean_probability(logits[:count]), labels, f" of {count}")
        count *= 2
    return found


# --- Arms -------------------------------------------------------------------------------------------------------------


def trained(plans: list[tuple[Callable[[], nn.Module], Dataset, Recipe]], seed: int) -> list[nn.Module]:
    """One network a plan, each with a seed of its own."""
    seeds = fusion.member_seeds(len(plans), seed)
    return [*fusion.trained([(*plan, own) for plan, own in zip(plans, seeds, strict=True)]).networks]


def budget(data: Dataset, seed: int, *, width: int, members: int) -> dict[str, float]:
    """So many networks of so many channels; and one of that size that is taught by them."""
    networks = trained([(partial(network, width), data, sgd(EPOCHS))] * members, seed)
    found = told(networks, data) | of_first(networks, data)
    if members == MEMBERS:
        teacher = distillation.Ensemble(networks)
        recipe = replace(sgd(EPOCHS), objective=partial(distillation.soft_targets, teacher=teacher, temperature=2.0))
        student = fresh(partial(network, width), recipe, seed=seed)
        fit(student, data, recipe, seed=seed, progress=False)
        found |= {f"student's {key}": value for key, value in told([student], data).items()}
    return found


def by_data(data: Dataset, seed: int) -> dict[str, float]:
    """Each network sees a bootstrap sample."""
    generator = torch.Generator().manual_seed(seed)
    bagged = fusion.bagging(partial(network, WIDTH), data, sgd(EPOCHS), members=MEMBERS, seed=seed, generator=generator)
    return told([*bagged.members.networks], data)


def by_architecture(data: Dataset, seed: int) -> dict[str, float]:
    """A residual network, one without short cuts, one deeper and narrower, and a perceptron."""
    kinds: list[Callable[[], nn.Module]] = [
        partial(network, WIDTH),
        partial(convnet, SHAPE, 10, width=WIDTH),
        partial(resnet, SHAPE, 10, width=12, blocks=(2, 2, 2)),
        partial(mlp, SHAPE, 10, width=256),
    ]
    return told(trained([(kind, data, sgd(EPOCHS)) for kind in kinds], seed), data)


def by_augmentation(data: Dataset, seed: int) -> dict[str, float]:
    """Each network sees images changed in a way of its own."""
    ways: list[Augment | None] = [flipped_and_shifted, None, pre.random_flip, pre.cutout]
    return told(trained([(partial(network, WIDTH), data, sgd(EPOCHS, augment=way)) for way in ways], seed), data)


def by_order(data: Dataset, seed: int) -> dict[str, float]:
    """The same first weights; other orders of the batches, and other flips and shifts."""
    recipe = sgd(EPOCHS)
    seeds, networks = fusion.member_seeds(MEMBERS, seed), list[nn.Module]()
    for own in seeds:
        model = fresh(partial(network, WIDTH), recipe, seed=seed)
        fit(model, data, recipe, seed=own, progress=False)
        networks.append(model)
    return told(networks, data)


def by_snapshots(data: Dataset, seed: int) -> dict[str, float]:
    """One run as long as one network's, its rate starting anew four times."""
    recipe = replace(sgd(2 * MEMBERS), schedule=None)
    members = fusion.snapshots(partial(network, WIDTH), data, recipe, cycles=MEMBERS, seed=seed)
    return told([*members.networks], data)


def by_geometry(data: Dataset, seed: int) -> dict[str, float]:
    """Short cycles around a trained network: nine epochs in all."""
    recipe = sgd(EPOCHS - MEMBERS + 1)
    model = fresh(partial(network, WIDTH), recipe, seed=seed)
    fit(model, data, recipe, seed=seed, progress=False)
    steps = len(data.train) // 50
    again = replace(sgd(MEMBERS, 0.02), schedule=None)
    members = fusion.fast_geometric(model, data, again, cycle=steps, seed=seed)
    return told([*members.networks], data)


def by_rank_one(data: Dataset, seed: int) -> dict[str, float]:
    """BatchEnsemble: one network's weights, times signs of each member's own."""
    recipe = sgd(EPOCHS)
    plain = fresh(partial(network, WIDTH), recipe, seed=seed)
    model = fusion.BatchEnsemble(plain, MEMBERS, generator=torch.Generator().manual_seed(seed))
    fit(model, data, recipe, seed=seed, progress=False)
    return told([model], data)


def by_several_inputs(data: Dataset, seed: int) -> dict[str, float]:
    """MIMO: one network that answers for two images at once."""
    recipe = replace(sgd(EPOCHS), objective=partial(fusion.mimo_loss, repetition=0.5))
    make = partial(resnet, width=WIDTH)
    model = fresh(partial(fusion.MIMO, make, SHAPE, 10, members=2), recipe, seed=seed)
    fit(model, data, recipe, seed=seed, progress=False)
    return told([model], data)


def plain_one(data: Dataset, seed: int) -> dict[str, float]:
    """One network."""
    return told(trained([(partial(network, WIDTH), data, sgd(EPOCHS))], seed), data)


def budgets() -> dict[str, Arm]:
    """One arm a way to spend the same number of multiplications."""
    return {name: partial(budget, width=width, members=members) for name, (width, members) in BUDGETS.items()}


STUDY = Study(
    "14",
    "Several networks, or one large one?",
    {
        "budget": Part("CIFAR-10 at equal multiplications", some, budgets(), SEEDS),
        "sources": Part(
            "What makes four networks differ",
            some,
            {
                "order of batches": by_order,
                "bootstrap samples": by_data,
                "augmentations": by_augmentation,
                "architectures": by_architecture,
            },
            SEEDS,
        ),
        "cheap": Part(
            "Members for less",
            some,
            {
                "one network": plain_one,
                "snapshots": by_snapshots,
                "fast geometric": by_geometry,
                "BatchEnsemble": by_rank_one,
                "MIMO": by_several_inputs,
            },
            SEEDS,
        ),
    },
)
