r"""Expert parallelism: a layer's experts live on different ranks, and tokens travel to those that they are sent to.

======================  =====================================================  =======================================
name                    what it does                                           source
======================  =====================================================  =======================================
``route``               each token to its k experts, as far as these have      Shazeer et al. 2017, arXiv:1701.06538;
                        room                                                   Lepikhin et al. 2020 (GShard),
                                                                               arXiv:2006.16668
``route_by_experts``    each expert to the tokens that it prefers              Zhou et al. 2022, arXiv:2202.09368
``capacity_of``         how many slots an expert has                           Fedus, Zoph & Shazeer 2021 (Switch),
                                                                               arXiv:2101.03961
``dispatch, combine``   tokens to the experts' slots, and back by the gates    Lepikhin et al. 2020
``balance_loss``        1 where all experts are asked alike, more elsewhere    Fedus et al. 2021
``MixtureOfExperts``    a layer of experts with slots, in one process          Lepikhin et al. 2020
``exchange_slots``      all-to-all that gradients go through                   the same
``ExpertParallel``      the layer, its experts shared out among the ranks      the same
======================  =====================================================  =======================================

Messages and matrices have fixed shapes, so an expert has a fixed number of slots; a token that finds none is dropped,
and only the residual connection around the layer carries it on. A *group* of tokens is routed by itself, with slots of
its own, so that no rank need know what another routes: the share of each rank is one group.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import load
from course_lib.lab.models import ViT
from course_lib.lab.training import evaluate
from course_lib.parallel.data_parallel import average_gradients, local_loss, shard
from course_lib.parallel.data_parallel_runs import Run, endless_batches
from course_lib.parallel.launching import World, process_group
from course_lib.partitioning.collectives import (
    Adjoint,
    Group,
    communication,
    count_collective,
    equal_part,
)
from course_lib.partitioning.restarting import Restart
from course_lib.partitioning.tensor_parallel_runs import (
    digit_vit,
)

# --- Who is sent where ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routes:
    """Which tokens found a slot: P pairs of token and expert, in the order in which they were served.

    Attributes
    ----------
    token, expert, slot : ``[P]``, whole numbers.
    gate : ``[P]``, by how much the expert's answer counts for the token; gradients reach the router through it.
    asked : ``[E]``, how often each expert was chosen, before any token was dropped.
    capacity : slots of an expert.
    """

    token: Tensor
    expert: Tensor
    slot: Tensor
    gate: Tensor
    asked: Tensor
    capacity: int

    @property
    def dropped(self) -> float:
        """The share of choices that found no slot; 0 where there were none."""
        choices = int(self.asked.sum())
        return (choices - len(self.token)) / max(1, choices)

    @property
    def places(self) -> Tensor:
        """``[P]``, the rows of all experts' slots, one expert after the other."""
        return self.expert * self.capacity + self.slot


def capacity_of(tokens: int, experts: int, top_k: int = 1, factor: float = 1.25) -> int:
    r"""Return the slots of an expert for a group of tokens: :math:`\lceil f\,kT/E\rceil`, f times an even share.

    Raises
    ------
    ValueError : ``factor`` is not above 0, or another argument is below its least.
    """
    at_least(0, tokens=tokens)
    at_least(1, experts=experts, top_k=top_k)
    require("factor", factor, lambda f: is_number(f) and f > 0, "a number above 0")
    # 1.1 * 50 / 5 is above 11 in floating point: rounded first, lest it become 12
    return math.ceil(round(factor * top_k * tokens / experts, 9))


def route(logits: Tensor, top_k: int, capacity: int) -> Routes:
    """Send each token to the ``top_k`` experts that it prefers, first come, first served.

    All first choices come before all second ones, each in the order of tokens (GShard).
    The gate is the expert's probability among all E (Switch): among the chosen alone it
    would be 1 for ``top_k=1``, and the router could not learn.

    Parameters
    ----------
    logits : the router's, ``[T, E]``, of one group.
    capacity : slots of an expert; who comes later is dropped.
    """
    _check_routing(logits, top_k, capacity)
    gates, chosen = logits.softmax(1).topk(top_k, dim=1)  # [T, k]
    gate, expert = gates.T.flatten(), chosen.T.flatten()  # [k T], first choices first
    turn = F.one_hot(expert, logits.shape[1])  # [k T, E]
    slot = (turn.cumsum(0) * turn).sum(1) - 1  # how many asked the same expert before
    token = torch.arange(len(logits), device=logits.device).repeat(top_k)
    kept, asked = slot < capacity, turn.sum(0)
    return Routes(token[kept], expert[kept], slot[kept], gate[kept], asked, capacity)


def route_by_experts(logits: Tensor, capacity: int) -> Routes:
    """Send to each expert the ``capacity`` tokens that prefer it most: expert choice.

    All slots are taken and no expert is overloaded, but a token may be chosen by several
    experts or by none; and whether it is depends on the tokens after it.

    Parameters
    ----------
    logits : the router's, ``[T, E]``, of one group.
    capacity : slots of an expert, of which no more than T are used.
    """
    _check_routing(logits, 1, capacity)
    experts, served = logits.shape[1], min(capacity, len(logits))
    gates, token = logits.softmax(1).topk(served, dim=0)  # [C, E]
    slot, expert = torch.meshgrid(
        torch.arange(served, device=logits.device),
        torch.arange(experts, device=logits.device),
        indexing="ij",
    )
    asked = torch.full((experts,), served, device=logits.device)
    token, expert, slot, gate = (t.flatten() for t in (token, expert, slot, gates))
    return Routes(token, expert, slot, gate, asked, capacity)


def _check_routing(logits: Tensor, top_k: int, capacity: int) -> None:
    require("logits", list(logits.shape), lambda s: len(s) == 2 and s[1] > 0, "of shape [tokens, experts]")
    require("top_k", top_k, lambda k: k in range(1, logits.shape[1] + 1), f"from 1 to {logits.shape[1]}, the experts")
    at_least(0, capacity=capacity)


def balance_loss(logits: Tensor, top_k: int = 1) -> Tensor:
    r"""Return :math:`E\sum_ef_eP_e`: 1 where all E experts are asked alike, up to E / k.

    :math:`f_e` is the share of the ``top_k`` choices that fall on expert e, :math:`P_e` the
    mean of its probability; the gradient comes through P. With ``top_k=1`` it is that of
    Fedus et al. 2021. No tokens: 0.
    """
    _check_routing(logits, top_k, 0)
    experts, probabilities = logits.shape[1], logits.softmax(1)
    chosen = probabilities.topk(top_k, dim=1).indices
    asked = F.one_hot(chosen, experts).sum((0, 1)).to(logits.dtype)  # [T, k, E] -> [E]
    tokens = max(1, len(logits))
    return experts * (asked / (tokens * top_k) * (probabilities.sum(0) / tokens)).sum()


def imbalance(load: Tensor) -> float:
    """How many times the mean the largest load is, 1 or more.

    Where every expert computes what it was asked, all wait for the fullest: the step takes so many times as long.
    """
    return float(load.max() / load.double().mean().clamp(min=1e-300))


# --- To the slots, and back -------------------------------------------------------------------------------------------


def dispatch(x: Tensor, routes: Routes) -> Tensor:
    """Put each token into its slots: ``[T, D]`` to ``[E, C, D]``. Empty slots are zero."""
    experts, capacity = len(routes.asked), routes.capacity
    slots = x.new_zeros(experts * capacity, x.shape[1])
    slots = slots.index_copy(0, routes.places, x[routes.token])
    return slots.unflatten(0, (experts, capacity))


def combine(slots: Tensor, routes: Routes, tokens: int) -> Tensor:
    """Add up what a token's experts said, times the gates: ``[E, C, D]`` to ``[T, D]``.

    A token that was dropped gets zero.
    """
    said = slots.flatten(0, 1)[routes.places]
    said = said * routes.gate[:, None].to(slots.dtype)
    return said.new_zeros(tokens, said.shape[1]).index_add(0, routes.token, said)


# --- The layer in one process -----------------------------------------------------------------------------------------


class RoutedLayer(nn.Module):
    """What a layer of experts does wherever these are: route, dispatch, `ask`, combine.

    Attributes
    ----------
    logits, routes : the router's logits ``[T, E]`` and the routes of each group in the last forward pass.
    """

    def __init__(self, router: nn.Linear, top_k: int, capacity_factor: float, groups: int) -> None:
        super().__init__()
        self.router, self.top_k, self.capacity_factor, self.groups = router, top_k, capacity_factor, groups
        self.logits: list[Tensor] = []
        self.routes: list[Routes] = []

    def __getstate__(self) -> dict[str, Any]:
        # of the last pass nothing is copied or pickled: its tensors belong to a graph
        return self.__dict__ | {"logits": [], "routes": []}

    def ask(self, slots: Tensor) -> Tensor:
        """The experts' answers to their slots: ``[E, C, D]`` to ``[E, C, D]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …, D]`` to what the experts make of it, of the same shape; each group of examples by itself."""
        self.logits, self.routes = [], []
        return torch.cat([self.group(part) for part in x.tensor_split(self.groups)])

    def group(self, x: Tensor) -> Tensor:
        """Route one group's tokens ``[n, …, D]``, and put together what experts say."""
        rows = x.flatten(0, -2)  # [n, ..., D] -> [T, D]
        logits = self.router(rows)
        tokens, experts = logits.shape
        slots = capacity_of(tokens, experts, self.top_k, self.capacity_factor)
        routes = route(logits, self.top_k, slots)
        self.logits.append(logits)
        self.routes.append(routes)
        said = self.ask(dispatch(rows, routes))
        return combine(said, routes, tokens).view(x.shape)

    def balance(self) -> Tensor:
        """The mean of `balance_loss` over the last batch's groups, each as much as it has tokens."""
        losses = [len(logits) * balance_loss(logits, self.top_k) for logits in self.logits]
        return torch.stack(losses).sum() / max(1, sum(len(logits) for logits in self.logits))


class MixtureOfExperts(RoutedLayer):
    """Experts of one shape, each with slots for the tokens that ask it, in one process.

    A mixture without slots runs every expert on as many rows as chose it; this one's shapes depend on no token, nor do
    those of the messages of `ExpertParallel`.

    Parameters
    ----------
    router : gives each token's logits, ``[…, D]`` to ``[…, E]``.
    experts : E networks that map ``[rows, D]`` to ``[rows, D]``, each row by itself.
    top_k : experts that a token asks.
    capacity_factor : see `capacity_of`.
    groups : into how many parts a batch is cut, each routed by itself, as even as its examples allow.

    Raises
    ------
    ValueError : an argument is out of range, or the router has other outputs than one for each expert.
    """

    def __init__(
        self,
        router: nn.Linear,
        experts: Sequence[nn.Module],
        *,
        top_k: int = 1,
        capacity_factor: float = 1.25,
        groups: int = 1,
    ) -> None:
        require("experts", experts, bool, "at least one network")
        require("top_k", top_k, lambda k: k in range(1, len(experts) + 1), f"from 1 to {len(experts)}, the experts")
        fits = router.out_features == len(experts)
        require("router", router, lambda _: fits, f"a layer with {len(experts)} outputs, one an expert")
        at_least(1, groups=groups)
        capacity_of(0, len(experts), top_k, capacity_factor)
        super().__init__(router, top_k, capacity_factor, groups)
        self.experts = nn.ModuleList(experts)

    def ask(self, slots: Tensor) -> Tensor:
        """The experts' answers to their slots: ``[E, C, D]`` to ``[E, C, D]``."""
        return torch.stack([expert(rows) for expert, rows in zip(self.experts, slots, strict=True)])


# --- The layer on several ranks ---------------------------------------------------------------------------------------


def exchange_slots(
    x: Tensor,
    outgoing: Sequence[int],
    incoming: Sequence[int],
    group: Group = None,
) -> Tensor:
    """Send ``outgoing[r]`` rows of ``x [rows, D]`` to each rank r, receive ``incoming[r]``.

    Backward sends the gradients home: the same with the two exchanged.
    """
    return Adjoint.apply(
        x,
        lambda x: all_to_all(x, outgoing, incoming, group),
        lambda grad: all_to_all(grad, incoming, outgoing, group),
    )


def all_to_all(x: Tensor, outgoing: Sequence[int], incoming: Sequence[int], group: Group) -> Tensor:
    """Exchange rows as `exchange_slots` does, out of autograd's sight."""
    received = x.new_empty(sum(incoming), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), [*incoming], [*outgoing], group=group)
    abroad = sum(outgoing) - outgoing[dist.get_rank(group)]
    count_collective("all_to_all", abroad * math.prod(x.shape[1:]) * x.element_size())
    return received


class ExpertParallel(RoutedLayer):
    """A mixture whose experts are shared out: this rank keeps E / N of them, and a copy of the router.

    Each rank routes its own tokens, one group; some may have none. What comes out is what the mixture in one process
    gives with N groups. The gradients of a rank's experts are whole, those of the router are its tokens' alone:
    `add_up_gradients`.

    Parameters
    ----------
    mixture : the layer in one piece, the same on all ranks. It is not changed.

    Raises
    ------
    ValueError : the ranks cannot have equally many experts.
    """

    def __init__(self, mixture: MixtureOfExperts, group: Group = None) -> None:
        super().__init__(copy.deepcopy(mixture.router), mixture.top_k, mixture.capacity_factor, groups=1)
        self.process_group = group
        own = equal_part("experts", len(mixture.experts), group)
        # by their numbers in the mixture, so that a state dict has the same names
        self.experts = nn.ModuleDict(
            {str(number): copy.deepcopy(mixture.experts[number]) for number in range(own.start, own.stop)}
        )

    def ask(self, slots: Tensor) -> Tensor:
        """All ranks' experts' answers to this rank's slots, ``[E, C, D]``."""
        each, capacities = len(self.experts), self.capacities(slots)
        outgoing = [each * slots.shape[1]] * len(capacities)
        incoming = [each * capacity for capacity in capacities]

        rows = slots.flatten(0, 1)  # sorted by expert, and so by rank
        came = exchange_slots(rows, outgoing, incoming, self.process_group)
        by_rank = zip(came.split(incoming), capacities, strict=True)
        asked = [rows.unflatten(0, (each, capacity)) for rows, capacity in by_rank]

        experts = zip(self.experts.values(), torch.cat(asked, 1), strict=True)
        said = torch.stack([expert(rows) for expert, rows in experts])  # [E / N, sum C, D]

        back = torch.cat([part.flatten(0, 1) for part in said.split(capacities, 1)])
        home = exchange_slots(back, incoming, outgoing, self.process_group)
        return home.view(slots.shape)

    def capacities(self, slots: Tensor) -> list[int]:
        """Each rank's slots of an expert: they differ where the ranks' shares do."""
        own = torch.tensor([slots.shape[1]], device=slots.device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(every, own, group=self.process_group)
        return [int(capacity) for capacity in every]


def expert_parallel(model: nn.Module, group: Group = None) -> nn.Module:
    """Return a copy of the network in which each `MixtureOfExperts` is `ExpertParallel`; the rest is whole.

    Raises
    ------
    ValueError : there is no mixture, or the ranks cannot have equally many of its experts.
    """
    made = copy.deepcopy(model)
    mixtures = {name: part for name, part in made.named_modules() if isinstance(part, MixtureOfExperts)}
    require("model", type(model).__name__, lambda _: bool(mixtures), "a network with a MixtureOfExperts")
    for name, mixture in mixtures.items():
        if name == "":
            return ExpertParallel(mixture, group)
        made.set_submodule(name, ExpertParallel(mixture, group))
    return made


def add_up_gradients(model: nn.Module) -> None:
    """Add up over ranks the gradients of what every rank has: of all but the experts.

    An expert's gradient is whole on its owner, who saw the tokens of all ranks. Each
    rank's loss must be its part of the batch's, as that of ``parallel.local_loss``.
    """
    layers = [part for part in model.modules() if isinstance(part, ExpertParallel)]
    owned = {p for layer in layers for p in layer.experts.parameters()}
    everywhere = [p for p in model.parameters() if p not in owned]
    average_gradients(nn.ParameterList(everywhere), share=1.0)


def whole_expert_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the network in one piece, on the CPU: every rank's experts. All ranks call it."""
    own = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if not dist.is_initialized():
        return own
    parts: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return {name: tensor for part in parts for name, tensor in part.items()}


def exchange_bytes(
    tokens: int,
    width: int,
    experts: int,
    ranks: int,
    *,
    top_k: int = 1,
    factor: float = 1.25,
    itemsize: int = 4,
) -> float:
    r"""Bytes that a rank sends to others for one layer and step: :math:`4\tfrac{N-1}{N}\,E\,C\,h\,w`.

    Four times all slots go out, tokens and answers in forward, their gradients in backward: about :math:`4fk` times
    the tokens' own bytes, whoever asks whom, empty slots and all.

    Parameters
    ----------
    tokens : of each rank, all having as many.
    width, itemsize : h numbers a token, of w bytes each.
    """
    at_least(1, width=width, ranks=ranks, itemsize=itemsize)
    slots = experts * capacity_of(tokens, experts, top_k, factor)
    return 4 * (ranks - 1) / ranks * slots * width * itemsize


# --- Training runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertRun(Run):
    """What a run leaves behind, with how the experts were used.

    Attributes
    ----------
    asked : ``[steps, E]``, how many choices fell on each expert.
    dropped : ``[steps]``, the share of choices that found no slot.
    started_at : the step at which it began: not 0 where it went on from a checkpoint.
    """

    asked: Tensor
    dropped: list[float]
    started_at: int


def sparse_vit(
    model: ViT,
    *,
    generator: torch.Generator,
    block: int = 1,
    experts: int = 4,
    top_k: int = 1,
    capacity_factor: float = 1.25,
    groups: int = 1,
) -> ViT:
    """Return a copy of the ``vit`` in which the MLP of one block is a mixture of as large ones, newly drawn.

    Raises
    ------
    ValueError : there is no such block, or an argument is out of range.
    """
    made = copy.deepcopy(model)
    require("block", block, lambda b: b in range(len(made.blocks)), f"from 0 to {len(made.blocks) - 1}, a block")
    at_least(1, experts=experts)
    part: Any = made.blocks[block]
    blank = nn.utils.skip_init(nn.Linear, made.position.shape[1], experts, bias=False).to(made.position)
    router = cast(nn.Linear, _drawn(blank, generator))
    drawn = [_drawn(part.mlp, generator) for _ in range(experts)]
    part.mlp = MixtureOfExperts(router, drawn, top_k=top_k, capacity_factor=capacity_factor, groups=groups)
    return made


@torch.no_grad()
def _drawn(part: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with weights of variance 1 / inputs and biases of zero."""
    made = copy.deepcopy(part)
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            weight = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.copy_(weight / layer.in_features**0.5)
            if layer.bias is not None:
                layer.bias.zero_()
    return made


def train_groups_alone(groups: int, **settings: Any) -> ExpertRun:
    """Train with all experts in this process, every batch in so many groups. Settings: `train_expert_parallel`."""
    return _train(lambda model: model, World(0, 1, torch.device("cpu")), groups, Restart(), **settings)


def train_expert_parallel(
    *,
    restart: Restart = Restart(),  # noqa: B008  # frozen
    **settings: Any,
) -> ExpertRun:
    """Train a ``vit`` with a layer of experts on the digits in float64; to be run by ``launch``.

    Every rank has a share of the batch and of the experts; all return the same.

    Parameters
    ----------
    restart : a folder of checkpoints, each rank's experts by themselves.
    settings : ``steps`` (10), ``batch_size`` of all ranks together (61, so that shares are uneven), ``examples`` of the
        training split that are used (249, so that the last batch of an epoch has 5), ``strength`` of the balance loss
        (0.01), ``lr``, ``momentum``, ``seed``; ``experts`` (4), ``top_k``, ``capacity_factor``, ``block``; and the
        network's ``width``, ``depth``, ``heads``.
    """
    with process_group() as world:
        return _train(expert_parallel, world, world.size, restart, **settings)


def _train(
    share_out: Callable[[nn.Module], nn.Module],
    world: World,
    groups: int,
    restart: Restart,
    *,
    steps: int = 10,
    batch_size: int = 61,
    examples: int = 249,
    strength: float = 0.01,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
    width: int = 32,
    depth: int = 2,
    heads: int = 4,
    **mixture: Any,
) -> ExpertRun:
    at_least(1, steps=steps)
    require("strength", strength, lambda s: is_number(s) and s >= 0, "a number of 0 or more")
    data = load("digits").to(world.device)
    dense = digit_vit(width=width, depth=depth, heads=heads, seed=seed).to(world.device)
    whole = sparse_vit(dense, groups=groups, generator=torch.Generator().manual_seed(seed), **mixture)
    model = share_out(whole)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    some, own = data.train.subset(torch.arange(examples)), dict(model.state_dict(keep_vars=True))
    counts: list[Tensor] = restart.history(world, own, optimizer)
    started_at = len(counts)
    coming = itertools.islice(endless_batches(some, batch_size, seed), started_at, steps)
    for step, (x, y) in enumerate(coming, started_at):
        restart.before(step, world)
        optimizer.zero_grad()
        share = shard(x, y, world.rank, world.size)
        counts.append(_gradient(model, *share, len(y), strength))
        optimizer.step()
        restart.after(world, own, optimizer, counts)
    # Evaluated in one piece and in as many groups: in others, other tokens would be dropped.
    whole.load_state_dict(whole_expert_state(model))
    weights = {name: tensor.detach().cpu().clone() for name, tensor in whole.state_dict().items()}
    losses, kept, asked = _over_ranks(torch.stack(counts)).cpu().tensor_split([1, 2], dim=1)
    dropped = 1 - kept[:, 0] / asked.sum(1)
    accuracy = evaluate(whole, data.val).accuracy
    return ExpertRun(weights, losses[:, 0].tolist(), accuracy, asked.long(), dropped.tolist(), started_at)


def _gradient(model: nn.Module, x: Tensor, y: Tensor, total: int, strength: float) -> Tensor:
    """Leave the batch's gradient; return this rank's part of the loss, its choices kept, and those asked, [2 + E]."""
    (layer,) = [part for part in model.modules() if isinstance(part, RoutedLayer)]
    loss = local_loss(model, x, y, total)
    (loss + strength * len(y) / total * layer.balance()).backward()
    if dist.is_initialized():
        add_up_gradients(model)
    asked = torch.stack([routes.asked for routes in layer.routes]).sum(0)
    kept = sum(len(routes.token) for routes in layer.routes)
    return torch.cat([loss.detach()[None], loss.new_tensor([kept]), asked.to(loss.dtype)])


def _over_ranks(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def measure_expert_parallel(
    *,
    strengths: Sequence[float] = (0.0, 0.1),
    factors: Sequence[float] = (1.0, 2.0),
    steps: int = 30,
    batch_size: int = 64,
    width: int = 32,
    experts: int = 4,
    top_k: int = 1,
    **settings: Any,
) -> list[dict[str, float]]:
    """Train with each strength of the balance loss and each capacity factor; to be run by ``launch``.

    Returns a row for each: ``strength`` and ``capacity_factor``; ``bytes`` that this rank sent to others in all-to-alls
    in a step, and ``expected_bytes`` by `exchange_bytes`; ``dropped``, the share of choices without a slot, and
    ``imbalance`` of the experts' loads, both over the second half of the steps; the last ``loss``, and
    ``val_accuracy``.

    Parameters
    ----------
    batch_size : of all ranks; they divide it.
    settings : as in `train_expert_parallel`.

    Raises
    ------
    ValueError : an argument is out of range, or ``batch_size`` not a multiple of the ranks.
    """
    at_least(1, steps=steps, batch_size=batch_size)
    rows = []
    with process_group() as world:
        equal_part("batch_size", batch_size)
        tokens = batch_size // world.size * len(digit_vit(width=width).position)
        for strength, factor in itertools.product(strengths, factors):
            mixture = {"experts": experts, "top_k": top_k, "capacity_factor": factor, "strength": strength}
            usual = {"steps": steps, "batch_size": batch_size, "examples": 4 * batch_size, "width": width}
            with communication() as count:
                run = _train(expert_parallel, world, world.size, Restart(), **(usual | mixture | settings))
            expected = exchange_bytes(tokens, width, experts, world.size, top_k=top_k, factor=factor, itemsize=8)
            late = slice(steps // 2, None)
            rows.append(
                {
                    "strength": strength,
                    "capacity_factor": factor,
                    "bytes": count.sent["all_to_all"] / steps,
                    "expected_bytes": expected,
                    "dropped": sum(run.dropped[late]) / len(run.dropped[late]),
                    "imbalance": imbalance(run.asked[late].sum(0)),
                    "loss": run.losses[-1],
                    "val_accuracy": run.val_accuracy,
                }
            )
    return rows
