"""A part of chapter 13's study: digits drawn in one way with labels, in another without.

As "domains" (``chapter_13_domains.py``: the same source, network and recipe), but the targets are drawn, too: 10,000
digits in print and 10,000 in outline, without their labels. Of the strengths that "domains" tries each method has the
middle one; nothing is tuned. Float32.
"""

from functools import lru_cache, partial

from course_lib import transfer
from course_lib.lab.data import Dataset, load
from course_lib.lab.studies import Arm
from course_lib.lab.training import fit, fresh
from course_lib.studies import chapter_13_domains as domains

LOOKS = ("print", "outline")
MIDDLE = {"CORAL": 10.0, "DAN": 1.0, "DANN": 1.0}
BATCH = 256


@lru_cache(maxsize=len(LOOKS))
def target(look: str) -> Dataset:
    """Digits of another look, bright on dark as those in chalk."""
    found = load(
        "glyphs",
        classes="digits",
        size=domains.PIXELS,
        domain=look,
        difficulty=0.4,
        train_size=domains.IMAGES,
        val_size=100,
        test_size=5_000,
    )
    return domains.alike(found.with_inputs(lambda x: 255 - x) if look == "print" else found)


def source_alone(chalk: Dataset, seed: int) -> dict[str, float]:
    """Trained on chalk once; asked as it is, with each look's own statistics, and after test-time entropy."""
    model = fresh(domains.network, domains.recipe(), seed=seed)
    fit(model, chalk, domains.recipe(), seed=seed, progress=False)
    found = dict[str, float]()
    for look in LOOKS:
        on = target(look)
        found |= of(look, domains.told(model, on, seed))
        adapted = transfer.tent(model, on.test, batch_size=BATCH)
        found[f"{look}: tent"] = (adapted.logits.argmax(1).cpu() == on.test.labels.cpu()).double().mean().item()
    return found


def adapted(chalk: Dataset, seed: int, *, method: str) -> dict[str, float]:
    """For each look a network of its own, trained on chalk's labels and the look's images."""
    found = dict[str, float]()
    for look in LOOKS:
        found |= of(look, domains.adapted(target(look), seed, method=method, strength=MIDDLE[method]))
    return found


def with_labels(chalk: Dataset, seed: int) -> dict[str, float]:
    """For each look a network trained on its labels: what adaptation would like to reach."""
    found = dict[str, float]()
    for look in LOOKS:
        found |= of(look, domains.with_labels(target(look), seed, both=False))
    return found


def of(look: str, found: dict[str, float]) -> dict[str, float]:
    """The same numbers, named by the look."""
    return {f"{look}: {name}": value for name, value in found.items()}


def arms() -> dict[str, Arm]:
    """One arm a method."""
    ways: dict[str, Arm] = {method: partial(adapted, method=method) for method in MIDDLE}
    return {"source alone": source_alone} | ways | {"target's labels": with_labels}
