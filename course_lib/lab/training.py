"""The training loop that every chapter shares.

``fit(model, data, recipe, seed=0)`` is the whole of training; a ``Recipe`` names the slots of the loop, and each
technique of the course fills one of them. Read this file from top to bottom: the recipe, then what a run leaves
behind, then the loop and its few helpers. How a run survives being killed stands in ``checkpoints.py``, and what is
said of arguments that do not fit together in ``doors.py``.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from course_lib.lab import doors
from course_lib.lab.arguments import at_least, is_whole, require
from course_lib.lab.checkpoints import Checkpoint
from course_lib.lab.data import Augment, Dataset, Split, batches
from course_lib.lab.runtime import device, interactive, seed_everything

Inputs = Tensor | tuple[Tensor, ...]
"""A batch of what the network sees: one tensor ``[B, …]``, or several of the same examples."""

Objective = Callable[[nn.Module, Any, Tensor], Tensor]
"""``(model, x, y) -> loss``: a scalar to minimise. Penalties, soft targets and distillation wrap another objective."""


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of the model's logits ``[B, K]`` against the labels ``[B]``."""
    return F.cross_entropy(model(x), y)


COLUMNS = (
    "epoch", "train_loss", "val_loss", "val_accuracy", "lr", "seconds", "examples_per_second", "examples",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One way to train: every slot of the loop, filled. ``dataclasses.replace`` makes a variant of it.

    Parameters
    ----------
    epochs : passes over the training split.
    batch_size : examples that make one gradient; or ``epoch -> examples`` (epochs count from 1), to let it grow.
    optimizer : ``model.named_parameters()`` -> ``torch.optim.Optimizer``, for instance ``partial(Adam, lr=1e-3)``.
    schedule : ``(optimizer, total_steps)`` -> a scheduler of ``torch.optim.lr_scheduler``, advanced once a step. One
        that has a method ``listen(history)`` is told of each validation; ``ReduceLROnPlateau`` is told ``val_loss``.
    augment : ``(x, generator) -> x`` on a whole normalised batch ``[B, C, H, W]``, or ``(x, y, generator) -> (x, y)``.
    objective : ``(model, x, y) -> loss``.
    clip_norm : the largest gradient norm let through.
    accumulate : parts into which a batch is cut; the gradient stays that of the whole batch, the memory shrinks.
    precision : ``"float32"``; ``"bfloat16"`` for the forward pass alone (the weights stay in float32); or ``"float64"``
        for weights and all, where a result has to be the same on another machine: processors round differently, and in
        float32 an unstable run (a large learning rate) blows those differences up until they show.
    compile : run the model through ``torch.compile``.
    ema : decay of an exponential moving average of the weights, which is then what is evaluated and kept.
    stop : ``History -> bool``, asked after each validation.
    keep : a column of the history, such as ``"val_loss"``: the weights with its best value (the lowest loss, the
        highest of anything else) are what remains, not the last ones.
    validate_every : epochs between two validations, each of which makes a row of the history: 1, 5, or a fraction such
        as 1/4 for four of them an epoch. The last epoch always ends with one.
    watch : further columns of the history, by name: ``(model, data) -> number``, measured at each validation. The loss
        without its penalty, say: ``{"plain_loss": lambda model, data: evaluate(model, data.train).loss}``.
    """

    epochs: int = 10
    batch_size: int | Callable[[int], int] = 64
    optimizer: Callable[[Iterator[tuple[str, nn.Parameter]]], Optimizer] = partial(
        torch.optim.SGD, lr=0.05, momentum=0.9
    )
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None
    augment: Augment | None = None
    objective: Objective = cross_entropy
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    compile: bool = False
    ema: float | None = None
    stop: "Callable[[History], bool] | None" = None
    keep: str | None = None
    validate_every: float = 1
    watch: Mapping[str, Callable[[nn.Module, Dataset], float]] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            if not (name == "batch_size" and callable(value)):
                at_least(1, **{name: value})
                object.__setattr__(self, name, int(value))  # NumPy's integers, too, are Python's from here on
        if isinstance(self.batch_size, int) and self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate}: must be at most batch_size={self.batch_size}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm!r}: must be a positive number or None")
        if self.precision not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"precision={self.precision!r}: must be 'float32', 'bfloat16' or 'float64'")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema!r}: must lie strictly between 0 and 1, or be None")
        every = self.validate_every
        whole = every if every >= 1 else 1 / every if every > 0 else math.nan
        if not abs(whole - round(whole)) < 1e-6 if math.isfinite(whole) else True:
            raise ValueError(f"validate_every={every!r}: must be a whole number of epochs, or 1 divided by one")
        columns = [*COLUMNS, *(self.watch or {})]
        if self.keep is not None and self.keep not in columns:
            raise ValueError(f"keep={self.keep!r}: must be a column of the history ({', '.join(columns)}) or None")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def size_of_batch(self, epoch: int) -> int:
        """The examples of each of an epoch's batches but perhaps the last; epochs count from 1."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        size = self.batch_size(epoch)
        if not is_whole(size) or size < self.accumulate:
            raise ValueError(f"batch_size({epoch}) = {size!r}: must be a whole number of at least {self.accumulate}")
        return int(size)

    def steps(self, examples: int) -> list[int]:
        """The number of steps of each epoch on a training split of so many examples."""
        return [math.ceil(examples / self.size_of_batch(epoch)) for epoch in range(1, self.epochs + 1)]

    def validates_after(self, epoch: int, steps: int) -> set[int]:
        """After which of an epoch's steps a validation follows."""
        if self.validate_every >= 1:
            return {steps} if epoch % round(self.validate_every) == 0 or epoch == self.epochs else set()
        times = round(1 / self.validate_every)
        return {max(1, round(steps * k / times)) for k in range(1, times + 1)}


def fresh(model: Callable[[], nn.Module], recipe: Recipe, *, seed: int) -> nn.Module:
    """A new network with the first weights of ``seed``, drawn in the type in which the recipe trains them.

    Drawn in float32 they would differ in the last bit from processor to processor, whatever happens to them later.
    """
    seed_everything(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(recipe.dtype)
    try:
        return model()
    finally:
        torch.set_default_dtype(usual)


@dataclass
class History:
    """What a run leaves behind: one row a validation (one an epoch, unless the recipe says otherwise).

    The columns are ``epoch`` (from 1; a fraction between two epochs), ``train_loss`` (the mean since the row before),
    ``val_loss``, ``val_accuracy``, ``lr`` (of the last step), ``seconds`` (of training alone since the row before),
    ``examples_per_second``, ``examples`` (seen since the start), and those of the recipe's ``watch``.

    Attributes
    ----------
    epochs : how many were finished.
    stopped : whether the recipe's ``stop`` ended the run.
    losses : the training loss of each step.
    rates : the learning rates of each step, one a parameter group.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    epochs: int = 0
    stopped: bool = False
    losses: list[float] = field(default_factory=list)
    rates: list[tuple[float, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[float]:
        if self.rows and column not in self.rows[0]:
            raise KeyError(f"{column!r}: a history has the columns {', '.join(self.rows[0])}")
        return [row[column] for row in self.rows]

    def frame(self) -> pd.DataFrame:
        """The history as a table, indexed by epoch."""
        return pd.DataFrame(self.rows).set_index("epoch") if self.rows else pd.DataFrame()


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (a fraction) on one split."""

    loss: float
    accuracy: float


class Diverged(RuntimeError):
    """The loss became NaN or infinite.

    ``epoch`` and ``step`` count from 1; ``lr`` is that step's learning rate; ``history`` is what came before, with the
    losses and rates of all steps up to this one.
    """

    def __init__(self, loss: float, epoch: int, step: int, lr: float, history: History | None = None) -> None:
        super().__init__(
            f"the loss became {loss} in epoch {epoch}, step {step}, at learning rate {lr:g}. Try a smaller learning "
            "rate, a warm-up (schedule=), clip_norm=1.0, or look for bad values in the data"
        )
        self.loss, self.epoch, self.step, self.lr, self.history = loss, epoch, step, lr, history or History()

    def __reduce__(self) -> tuple[Any, ...]:  # so that it survives the way back from a worker process
        return Diverged, (self.loss, self.epoch, self.step, self.lr, self.history)


def logits_of(model: nn.Module, split: Split, *, batch_size: int = 1024) -> Tensor:
    """The model's outputs ``[N, K]`` on a split, in evaluation mode and without gradients, where the labels lie.

    The network may be anything that is called like one; without a weight of its own it computes in float32, where the
    split lies.

    Raises
    ------
    ValueError : the split is empty.
    """
    require("split", split, lambda s: len(s) > 0, "of at least one example")
    with _evaluating(model), torch.no_grad():
        where, dtype = _home(model, split)
        found = torch.cat([model(x) for x, _ in batches(split.to(where), batch_size, dtype=dtype)])
    return found.to(split.labels.device)


def evaluate(
    model: nn.Module, split: Split, *, objective: Objective = cross_entropy, batch_size: int = 1024
) -> Evaluation:
    """Loss and accuracy of the model on a split, in evaluation mode and without gradients.

    The loss is that of ``objective``; the accuracy that of the model's logits.

    Raises
    ------
    ValueError : the split is empty.
    """
    require("split", split, lambda s: len(s) > 0, "of at least one example")
    losses, right = [], []
    with _evaluating(model), torch.no_grad():
        where, dtype = _home(model, split)
        for x, y in batches(split.to(where), batch_size, dtype=dtype):
            logits = model(x)
            # The usual objective needs no second forward pass.
            loss = F.cross_entropy(logits, y) if objective is cross_entropy else objective(model, x, y)
            losses.append(loss * len(y))
            right.append((logits.argmax(1) == y).sum())
    return Evaluation(torch.stack(losses).sum().item() / len(split), torch.stack(right).sum().item() / len(split))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that was, of each part."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _home(model: nn.Module, split: Split) -> tuple[torch.device, torch.dtype]:
    """Where the model computes, and in which type."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return split.device, torch.float32


def trains_on(recipe: Recipe) -> torch.device:
    """The device on which ``fit`` trains by this recipe: ``device()``, but Apple's GPUs have no float64."""
    where = device()
    return torch.device("cpu") if recipe.precision == "float64" and where.type == "mps" else where


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> History:
    """Train ``model`` in place by ``recipe``, on ``device()``, and return the history of the run.

    Networks that the objective holds in its settings, such as a teacher, come along. Afterwards all lie where they lay
    before: on the processor, unless you moved them to the GPU yourself.
    The same arguments give the same weights on the same machine with the same number of threads. With ``checkpoint``
    the state of the run is written there after each validation that ends an epoch; a run that was killed goes on from
    it and ends as if nothing had happened (weights and history are bit-identical but for the times). So does one that
    is called again with more ``epochs``, unless its schedule depends on their number. ``progress`` shows a bar; by
    default it is shown to a person and hidden in tests.

    Raises
    ------
    Diverged : the loss became NaN or infinite.
    ValueError : ``seed`` is no whole number from 0 to 2**32 - 1; a slot of the recipe, the model and the data do not
        fit together; or the checkpoint belongs to another recipe, seed, network or data set, or cannot be read.
    Unfingerprintable : with ``checkpoint``, for a slot of which it cannot be told whether it is the same another time.
    """
    require("seed", seed, lambda s: is_whole(s) and 0 <= s < 2**32, "a whole number from 0 to 2**32 - 1")
    where, company = trains_on(recipe), [model, *networks_of(recipe.objective)]
    homes = [(network, _home(network, data.train)[0]) for network in company]
    model, data = model.to(where, recipe.dtype), data.to(where)
    doors.check_network(model, data)
    network: nn.Module = torch.compile(model) if recipe.compile else model  # type: ignore[assignment]
    optimizer = doors.checked_optimizer(recipe.optimizer(model.named_parameters()))
    steps = recipe.steps(len(data.train))
    schedule = doors.checked_schedule(recipe.schedule(optimizer, sum(steps))) if recipe.schedule else None
    average = Average(model, recipe.ema) if recipe.ema else None
    best = Best(recipe.keep) if recipe.keep else None
    history = History()
    run = None
    if checkpoint:
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "best": best}
        parts["average"] = average and average.model
        run = Checkpoint(checkpoint, recipe, seed, model, data, parts)
        run.restore(history)

    autocast = partial(torch.autocast, where.type, torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext

    def backward(x: Inputs, y: Tensor, share: float = 1.0) -> Tensor:
        """Add ``share`` of the examples' gradient to ``.grad``; return that share of their loss."""
        with autocast():
            loss = recipe.objective(network, x, y)
        try:
            loss = loss if share == 1.0 else loss * share
            loss.backward()
        except (AttributeError, RuntimeError) as error:
            raise doors.why_no_gradient(loss, error) from error
        return loss.detach()

    def gradient(x: Inputs, y: Tensor) -> Tensor:
        """Leave the batch's gradient in ``.grad``; return its loss. The optimizer calls it once (SAM: twice) a step."""
        optimizer.zero_grad(set_to_none=True)
        if recipe.accumulate == 1:
            loss = backward(x, y)
        else:
            parts = zip(chunks(x, recipe.accumulate), y.chunk(recipe.accumulate), strict=True)
            loss = torch.stack([backward(part_x, part_y, len(part_y) / len(y)) for part_x, part_y in parts]).sum()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        return loss

    def validate(since: Stretch, epoch: float) -> None:
        """Close a stretch of steps with a row of the history, and tell everybody who wants to know."""
        trained = since.close(history)
        evaluated = average.model if average else model
        found = evaluate(evaluated, data.val)
        row = {"epoch": epoch, "val_loss": found.loss, "val_accuracy": found.accuracy} | trained
        row |= {name: float(measure(evaluated, data)) for name, measure in (recipe.watch or {}).items()}
        history.rows.append({name: row[name] for name in (*COLUMNS, *(recipe.watch or {}))})
        bar.set_postfix(val_accuracy=f"{found.accuracy:.3f}", refresh=False)
        if best:
            best.consider(history, evaluated)
        tell(schedule, history)
        history.stopped = recipe.stop is not None and recipe.stop(history)

    show = interactive() if progress is None else progress
    shown = tqdm(total=sum(steps), initial=sum(steps[: history.epochs]), disable=not show, leave=False)
    with _brought_along(homes, where), shown as bar:
        since = Stretch()
        while history.epochs < recipe.epochs and not history.stopped:
            epoch = history.epochs + 1
            validates = recipe.validates_after(epoch, steps[epoch - 1])
            # Each epoch draws from a seed of its own, so a resumed run needs no stored generator states.
            own = (seed * 1_000_003 + epoch) % 2**32
            seed_everything(own)
            order = torch.Generator().manual_seed(own)
            size = recipe.size_of_batch(epoch)
            model.train()
            passes = batches(data.train, size, generator=order, augment=recipe.augment, dtype=recipe.dtype)
            for step, (x, y) in enumerate(passes, start=1):
                rates = tuple(group["lr"] for group in optimizer.param_groups)
                loss: Any = optimizer.step(partial(gradient, x, y))  # type: ignore[arg-type]  # torch says float
                since.add(epoch, step, loss, len(y), rates)
                if schedule and not isinstance(schedule, ReduceLROnPlateau):
                    schedule.step()
                if average:
                    average.update(model)
                bar.update()
                if step in validates:
                    validate(since, epoch if step == steps[epoch - 1] else epoch - 1 + step / steps[epoch - 1])
                    since = Stretch()
                    if history.stopped:
                        break
            else:
                history.epochs = epoch
            if run and (history.stopped or steps[epoch - 1] in validates):
                run.save(history)
    if best:
        model.load_state_dict(best.state_dict()["weights"])
    elif average:
        model.load_state_dict(average.model.state_dict())
    return history


def networks_of(objective: Any) -> list[nn.Module]:
    """The networks among the settings of an objective, also of those within, each a ``functools.partial``."""
    if isinstance(objective, nn.Module):
        return [objective]
    if isinstance(objective, partial):
        return networks_of([objective.func, *objective.args, *objective.keywords.values()])
    parts = objective if isinstance(objective, list | tuple) else ()
    return [network for part in parts for network in networks_of(part)]


@contextmanager
def _brought_along(homes: Sequence[tuple[nn.Module, torch.device]], where: torch.device) -> Iterator[None]:
    """Within it the networks are on the device; afterwards, also after an error, they lie where they lay."""
    try:
        for network, _ in homes:
            network.to(where)
        yield
    finally:
        for network, home in homes:
            network.to(home)


class Stretch:
    """What happened since the last row of the history."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps: list[tuple[int, int]] = []
        self.losses: list[Tensor] = []
        self.sizes: list[int] = []
        self.rates: list[tuple[float, ...]] = []

    def add(self, epoch: int, step: int, loss: Tensor, size: int, rates: tuple[float, ...]) -> None:
        self.steps.append((epoch, step))
        self.losses.append(loss)
        self.sizes.append(size)
        self.rates.append(rates)

    def close(self, history: History) -> dict[str, float]:
        """Enter the steps into the history; return what a row says of them.

        The losses stay on the device until here: looking at each one would make a GPU wait at every step.
        """
        per_step, examples = torch.stack(self.losses).tolist(), sum(self.sizes)
        seconds = time.perf_counter() - self.started
        history.rates += [tuple(map(float, rates)) for rates in self.rates]
        history.losses += per_step
        for (epoch, step), loss, rates in zip(self.steps, per_step, self.rates, strict=True):
            if not math.isfinite(loss):
                raise Diverged(loss, epoch, step, float(rates[0]), history)
        return {
            "train_loss": sum(loss * size for loss, size in zip(per_step, self.sizes, strict=True)) / examples,
            "lr": history.rates[-1][0],
            "seconds": seconds,
            "examples_per_second": examples / seconds,
            "examples": examples + (history.rows[-1]["examples"] if history.rows else 0),
        }


def tell(schedule: Any, history: History) -> None:
    """Tell a schedule that listens of a validation."""
    if isinstance(schedule, ReduceLROnPlateau):
        schedule.step(history["val_loss"][-1])
    elif hasattr(schedule, "listen"):
        schedule.listen(history)


def chunks(x: Inputs, count: int) -> Iterable[Inputs]:
    """A batch's inputs cut into parts; each input of several is cut alike."""
    return x.chunk(count) if isinstance(x, Tensor) else zip(*(part.chunk(count) for part in x), strict=True)


class Average:
    """An exponential moving average of a model's weights; the buffers (BatchNorm's statistics) are the newest."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


class Best:
    """The weights with the best value of a column so far."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.lower = column.endswith("loss")
        self.value = math.inf if self.lower else -math.inf
        self.weights: dict[str, Any] = {}

    def consider(self, history: History, model: nn.Module) -> None:
        value = history[self.column][-1]
        if not self.weights or (value < self.value if self.lower else value > self.value):
            self.value, self.weights = value, copy.deepcopy(model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.weights = state["value"], state["weights"]
