"""The training loop that every chapter shares.

``fit(model, data, recipe, seed=0)`` is the whole of training; a ``Recipe`` names the slots of the loop, and each
technique of the course fills one of them. Read this file from top to bottom: the recipe, then what a run leaves
behind, then the loop, then how a run survives being killed.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from course_lib.lab.data import Augment, Dataset, Split, batches
from course_lib.lab.runtime import device, interactive, seed_everything

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, x, y) -> loss``: a scalar to minimise. Penalties, soft targets and distillation wrap another objective."""


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of the model's logits ``[B, K]`` against the labels ``[B]``."""
    return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class Recipe:
    """One way to train: every slot of the loop, filled. ``dataclasses.replace`` makes a variant of it.

    Parameters
    ----------
    epochs : passes over the training split.
    batch_size : examples that make one gradient.
    optimizer : ``model.named_parameters()`` -> ``torch.optim.Optimizer``, for instance ``partial(Adam, lr=1e-3)``.
    schedule : ``(optimizer, total_steps)`` -> a scheduler of ``torch.optim.lr_scheduler``, advanced once a step.
    augment : ``(x, generator) -> x`` on a whole normalised batch ``[B, C, H, W]``.
    objective : ``(model, x, y) -> loss``.
    clip_norm : the largest gradient norm let through.
    accumulate : parts into which a batch is cut; the gradient stays that of the whole batch, the memory shrinks.
    precision : ``"float32"``; ``"bfloat16"`` for the forward pass alone (the weights stay in float32); or ``"float64"``
        for weights and all, where a result has to be the same on another machine: processors round differently, and in
        float32 an unstable run (a large learning rate) blows those differences up until they show.
    compile : run the model through ``torch.compile``.
    ema : decay of an exponential moving average of the weights, which is then what is evaluated and kept.
    stop : ``History -> bool``, asked after each epoch.
    """

    epochs: int = 10
    batch_size: int = 64
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

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate}: must be at most batch_size={self.batch_size}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm!r}: must be a positive number or None")
        if self.precision not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"precision={self.precision!r}: must be 'float32', 'bfloat16' or 'float64'")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema!r}: must lie strictly between 0 and 1, or be None")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return torch.float64 if self.precision == "float64" else torch.float32


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
    """What a run leaves behind: one row an epoch, and whether the recipe's ``stop`` ended it.

    The columns are ``epoch`` (from 1), ``train_loss``, ``val_loss``, ``val_accuracy``, ``lr`` (of the epoch's last
    step), ``seconds`` (training alone, without the evaluation) and ``examples_per_second``.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False

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
    """The loss became NaN or infinite. ``epoch`` and ``step`` count from 1; ``lr`` is that step's learning rate."""

    def __init__(self, loss: float, epoch: int, step: int, lr: float) -> None:
        super().__init__(
            f"the loss became {loss} in epoch {epoch}, step {step}, at learning rate {lr:g}. Try a smaller learning "
            "rate, a warm-up (schedule=), clip_norm=1.0, or look for bad values in the data"
        )
        self.loss, self.epoch, self.step, self.lr = loss, epoch, step, lr

    def __reduce__(self) -> tuple[Any, ...]:  # so that it survives the way back from a worker process
        return Diverged, (self.loss, self.epoch, self.step, self.lr)


def evaluate(
    model: nn.Module, split: Split, *, objective: Objective = cross_entropy, batch_size: int = 1024
) -> Evaluation:
    """Loss and accuracy of the model on a split, in evaluation mode and without gradients.

    The loss is that of ``objective``; the accuracy that of the model's logits.
    """
    was_training = model.training
    model.eval()
    some_weight = next(model.parameters())
    losses, right = [], []
    with torch.no_grad():
        for x, y in batches(split.to(some_weight.device), batch_size, dtype=some_weight.dtype):
            logits = model(x)
            # The usual objective needs no second forward pass.
            loss = F.cross_entropy(logits, y) if objective is cross_entropy else objective(model, x, y)
            losses.append(loss * len(y))
            right.append((logits.argmax(1) == y).sum())
    model.train(was_training)
    return Evaluation(torch.stack(losses).sum().item() / len(split), torch.stack(right).sum().item() / len(split))


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> History:
    """Train ``model`` in place by ``recipe`` and return the history of the run.

    The same arguments give the same weights on the same machine with the same number of threads. With ``checkpoint``
    the state of the run is written there after each epoch; a run that was killed goes on from it and ends as if
    nothing had happened (weights and history are bit-identical but for the times). ``progress`` shows a bar; by
    default it is shown to a person and hidden in tests.

    Raises
    ------
    Diverged : the loss became NaN or infinite.
    ValueError : the checkpoint belongs to another recipe, seed or model, or cannot be read.
    """
    where = device()
    if recipe.precision == "float64" and where.type == "mps":
        where = torch.device("cpu")  # Apple's GPUs have no float64
    model, data = model.to(where, recipe.dtype), data.to(where)
    network: nn.Module = torch.compile(model) if recipe.compile else model  # type: ignore[assignment]
    optimizer = recipe.optimizer(model.named_parameters())
    steps = math.ceil(len(data.train) / recipe.batch_size)
    schedule = recipe.schedule(optimizer, recipe.epochs * steps) if recipe.schedule else None
    average = Average(model, recipe.ema) if recipe.ema else None
    history = History()
    run = Checkpoint(checkpoint, recipe, seed, model, optimizer, schedule, average, history) if checkpoint else None
    if run:
        run.restore()

    autocast = partial(torch.autocast, where.type, torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext

    def backward(x: Tensor, y: Tensor, share: float = 1.0) -> Tensor:
        """Add ``share`` of the examples' gradient to ``.grad``; return that share of their loss."""
        with autocast():
            loss = recipe.objective(network, x, y)
        loss = loss if share == 1.0 else loss * share
        loss.backward()
        return loss.detach()

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        """Leave the batch's gradient in ``.grad``; return its loss. The optimizer calls it once (SAM: twice) a step."""
        optimizer.zero_grad(set_to_none=True)
        if recipe.accumulate == 1:
            loss = backward(x, y)
        else:
            parts = zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate), strict=True)
            loss = torch.stack([backward(part_x, part_y, len(part_y) / len(y)) for part_x, part_y in parts]).sum()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        return loss

    show = interactive() if progress is None else progress
    with tqdm(total=recipe.epochs * steps, initial=len(history) * steps, disable=not show, leave=False) as bar:
        while len(history) < recipe.epochs and not history.stopped:
            epoch = len(history) + 1
            # Each epoch draws from a seed of its own, so a resumed run needs no stored generator states.
            seed_everything(seed * 1_000_003 + epoch)
            order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            model.train()
            losses: list[Tensor] = []
            sizes: list[int] = []
            rates: list[float] = []
            started = time.perf_counter()
            for x, y in batches(
                data.train, recipe.batch_size, generator=order, augment=recipe.augment, dtype=recipe.dtype
            ):
                sizes.append(len(y))
                rates.append(optimizer.param_groups[0]["lr"])
                losses.append(optimizer.step(partial(gradient, x, y)))  # type: ignore[arg-type]  # torch says float
                if schedule:
                    schedule.step()
                if average:
                    average.update(model)
                bar.update()
            # The losses stay on the device until here: looking at each one would make a GPU wait at every step.
            per_step = torch.stack(losses).tolist()
            seconds = time.perf_counter() - started
            for step, loss in enumerate(per_step):
                if not math.isfinite(loss):
                    raise Diverged(loss, epoch, step + 1, rates[step])
            found = evaluate(average.model if average else model, data.val)
            history.rows.append(
                {
                    "epoch": epoch,
                    "train_loss": sum(loss * size for loss, size in zip(per_step, sizes, strict=True)) / sum(sizes),
                    "val_loss": found.loss,
                    "val_accuracy": found.accuracy,
                    "lr": rates[-1],
                    "seconds": seconds,
                    "examples_per_second": sum(sizes) / seconds,
                }
            )
            bar.set_postfix(val_accuracy=f"{found.accuracy:.3f}", refresh=False)
            history.stopped = recipe.stop is not None and recipe.stop(history)
            if run:
                run.save()
    if average:
        model.load_state_dict(average.model.state_dict())
    return history


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


class Checkpoint:
    """The state of a run in one file, replaced in one step, so that a kill at any moment leaves a whole one."""

    def __init__(
        self,
        path: str | Path,
        recipe: Recipe,
        seed: int,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        average: Average | None,
        history: History,
    ) -> None:
        self.path = Path(path)
        self.identity = {"seed": str(seed)} | {f.name: _describe(getattr(recipe, f.name)) for f in fields(recipe)}
        self.history = history
        # Whatever has a state of its own: a resumed run needs all of it and nothing else.
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if schedule:
            self.parts["schedule"] = schedule
        if average:
            self.parts["average"] = average.model

    def save(self) -> None:
        """Write the state beside the file, force it to disk, then put it in place."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"identity": self.identity, "rows": self.history.rows, "stopped": self.history.stopped}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.path.with_name(self.path.name + ".partial")
        with open(partial_file, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_file, self.path)

    def restore(self) -> None:
        """Take up the state of the file if there is one.

        Raises
        ------
        ValueError : the file cannot be read, or belongs to another recipe, seed or model.
        """
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location=device(), weights_only=True)
            identity = state.pop("identity")
        except Exception as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} cannot be read as a checkpoint ({error}); "
                "move it away to start anew, nothing was changed"
            ) from error
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise ValueError(
                    f"checkpoint={str(self.path)!r} was written with {name}={identity.get(name)}, this run has "
                    f"{name}={value}: use another file, or the same settings"
                )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint={str(self.path)!r} was written for another model: {error}") from error
        self.history.rows, self.history.stopped = state["rows"], state["stopped"]


def _describe(value: Any) -> str:
    """A slot's setting in words that are the same in every process (a function's ``repr`` holds its address)."""
    if isinstance(value, partial):
        settings = [_describe(a) for a in value.args] + [f"{k}={_describe(v)}" for k, v in value.keywords.items()]
        return f"{_describe(value.func)}({', '.join(settings)})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
