r"""Which degrees to choose: the plan for a job on a cluster, from the formulas for memory, compute and messages.

=========================  ==================================================  ======================================
name                       what it computes                                    source
=========================  ==================================================  ======================================
``Transformer``            a job: parameters and operations of a step          Narayanan et al. 2021, arXiv:2104.04473
``activation_bytes``       what one layer keeps for the backward pass          Korthikanti et al. 2022,
                                                                               arXiv:2205.05198, table 2
``memory_of``              bytes of the fullest worker                         both, and ZeRO: Rajbhandari et al.
                                                                               2019, arXiv:1910.02054
``step_time``              seconds of a step and what they are spent on        both
``why_not``                what stands in a plan's way                         –
``plans``, ``best_plan``   every plan that is possible, the fastest first      –
``refused``                … and the others, with the reasons                  –
``PUBLISHED``              what was run, and how fast it was                   both; Llama team 2024, arXiv:2407.21783
``compare_with_published`` our choices beside theirs                           –
``predict_pipeline``       seconds of a pipeline from measured stages          –
=========================  ==================================================  ======================================

The letters of the papers: :math:`L` layers of width :math:`h` with :math:`a` heads, sequences of :math:`s` tokens,
:math:`V` words; a batch of :math:`B` sequences, cut into micro-batches of :math:`b` each, :math:`m` of them for each of
:math:`d` data-parallel pipelines of :math:`p` stages, each of :math:`t` workers, and :math:`v` chunks of layers on
each. Everywhere: bytes, seconds, operations a second.

All this is a model of a dozen lines that fit on a page. With one figure fitted to them (``EFFICIENCY``), half of the
published steps on A100s come out to some 4 percent, and all to 20; those on H100s, to which nothing was fitted, are
overestimated by a quarter to a third (``compare_with_published``). That is good enough to see which plans are
hopeless, and why; not which of two good ones wins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import pandas as pd

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.parallel.scaling import Link, hierarchical_time, overlap_timeline, ring_time
from course_lib.parallel.sharding import memory_per_rank

GB = 1e9
WORD = 2  # bytes of a number in bfloat16: weights, activations, messages between layers

# --- The job ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transformer:
    """A language model and the length of its sequences.

    Attributes
    ----------
    layers, width, heads : depth, width of the residual stream, heads of attention.
    tokens : length of a sequence.
    vocabulary : words.
    ffn_width : width inside the feed-forward layers; ``4 width`` by default.
    gated : the block of the Llama family: a gate in the feed-forward layer (SwiGLU: three matrices, not two), no
        biases, positions that need no parameters, and an output layer of its own. Else the block of GPT: biases,
        learnt positions, the output layer shares the embedding's weights.
    kv_heads : heads of keys and values, if fewer than ``heads`` (grouped queries).
    experts : feed-forward layers that each token can choose from in each layer; 1 is an ordinary network.
    top_k : how many of them it takes.
    """

    layers: int
    width: int
    heads: int
    tokens: int = 2048
    vocabulary: int = 51_200
    ffn_width: int | None = None
    gated: bool = False
    kv_heads: int | None = None
    experts: int = 1
    top_k: int = 1

    def __post_init__(self) -> None:
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "gated"}
        at_least(1, **{name: count for name, count in counts.items() if count is not None})
        require("width", self.width, lambda x: x % self.heads == 0, f"a multiple of heads, {self.heads}")
        require("kv_heads", self.kv_heads, lambda x: x is None or self.heads % x == 0, f"a divisor of {self.heads}")
        require("top_k", self.top_k, lambda x: x <= self.experts, f"at most experts, {self.experts}")

    @property
    def ffn(self) -> int:
        """Width inside the feed-forward layers."""
        return 4 * self.width if self.ffn_width is None else self.ffn_width

    @property
    def kv_width(self) -> int:
        """Width of all keys of a token together."""
        return self.width * (self.kv_heads or self.heads) // self.heads

    @property
    def attention_weights(self) -> int:
        """Weights of the four matrices of attention, in one layer."""
        return 2 * self.width * (self.width + self.kv_width)

    @property
    def ffn_weights(self) -> int:
        """Weights of the matrices of one expert, in one layer."""
        return (3 if self.gated else 2) * self.width * self.ffn

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of one layer, which expert parallelism shares out; 0 in an ordinary network."""
        biases = 0 if self.gated else self.width + self.ffn
        return 0 if self.experts == 1 else self.experts * (self.ffn_weights + biases)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, its experts among them."""
        h = self.width
        if self.experts > 1:
            feed_forward = self.expert_parameters + self.experts * h  # and what chooses among them
        else:
            feed_forward = self.ffn_weights + (0 if self.gated else h + self.ffn)
        norms_and_biases = 2 * h if self.gated else 4 * h + 2 * h + 2 * self.kv_width
        return self.attention_weights + feed_forward + norms_and_biases

    @property
    def embedding_parameters(self) -> int:
        """Parameters in front of the first layer."""
        return self.width * (self.vocabulary + (0 if self.gated else self.tokens))

    @property
    def parameters(self) -> int:
        r"""All parameters. For a GPT they are, by Narayanan et al. 2021, equation 2,

        .. math:: P = 12 L h^2 \left(1 + \frac{13}{12h} + \frac{V + s}{12 L h}\right).
        """
        output = self.width * self.vocabulary if self.gated else 0
        return self.layers * self.layer_parameters + self.embedding_parameters + output

    @property
    def layer_flops(self) -> int:
        """Operations of one layer's forward pass for one sequence: two for each weight and token, and attention."""
        weights = self.attention_weights + self.top_k * self.ffn_weights
        return self.tokens * (2 * weights + self.score_flops)

    @property
    def score_flops(self) -> int:
        """Operations a token of attention's two products, queries with keys and scores with values (no mask used)."""
        return 4 * self.tokens * self.width

    @property
    def output_flops(self) -> int:
        """Operations of the output layer's forward pass for one sequence."""
        return 2 * self.tokens * self.width * self.vocabulary

    def flops_per_step(self, batch: int, recompute: Recompute = "none") -> int:
        r"""Operations of a step: forward pass, backward pass (twice that), and what is computed again.

        For a GPT whose activations are all recomputed they are, by Narayanan et al. 2021, equation 3,

        .. math:: F = 96\,B s L h^2 \left(1 + \frac{s}{6h} + \frac{V}{16 L h}\right),

        and without recomputation :math:`72\,B s L h^2 \left(1 + \frac{s}{6h} + \frac{V}{12 L h}\right)`.
        """
        return batch * (self.layers * self.layer_step_flops(recompute) + 3 * self.output_flops)

    def layer_step_flops(self, recompute: Recompute = "none") -> int:
        """Operations of one layer for one sequence in a whole step, those that are done again among them."""
        again = {"none": 0, "selective": self.tokens * self.score_flops, "full": self.layer_flops}
        return 3 * self.layer_flops + again[recompute]


# --- The cluster and the plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Workers of one kind, in nodes.

    Attributes
    ----------
    workers : how many there are.
    memory : bytes of each.
    peak : operations a second that the maker states.
    efficiency : the share of them that products of large matrices reach.
    bandwidth : bytes a second between a worker and its own memory.
    per_node : workers in a node.
    node_link : a worker's connection inside its node.
    link : a worker's share of its node's connection to the others.
    """

    workers: int
    memory: float
    peak: float
    efficiency: float
    bandwidth: float
    per_node: int
    node_link: Link
    link: Link

    def __post_init__(self) -> None:
        at_least(1, workers=self.workers, per_node=self.per_node)
        for name in ("memory", "peak", "bandwidth"):
            require(name, getattr(self, name), lambda x: x > 0, "a number above 0")
        require("efficiency", self.efficiency, lambda x: 0 < x <= 1, "a share above 0 and up to 1")


EFFICIENCY = 0.62  # the one figure that was fitted: to the throughputs of the A100s among PUBLISHED


def a100(workers: int) -> Cluster:
    """NVIDIA A100 of 80 GB: 312 teraFLOP/s, NVLink of 300 GB/s each way, InfiniBand of 200 Gb/s for each."""
    return Cluster(workers, 80 * GB, 312e12, EFFICIENCY, 2.0e12, 8, Link(5e-6, 300e9), Link(1e-5, 25e9))


def h100(workers: int) -> Cluster:
    """NVIDIA H100 of 80 GB: 989 teraFLOP/s, NVLink of 450 GB/s each way, a network of 400 Gb/s for each."""
    return Cluster(workers, 80 * GB, 989e12, EFFICIENCY, 3.35e12, 8, Link(5e-6, 450e9), Link(1e-5, 50e9))


Recompute = Literal["none", "selective", "full"]
"""What is computed again in the backward pass: nothing, attention's scores, or every layer from its input."""


@dataclass(frozen=True)
class Plan:
    """How a job is spread over ``data * tensor * pipeline`` workers.

    Attributes
    ----------
    data, tensor, pipeline : the degrees.
    expert : workers among which the experts of a layer are shared out; they are taken from the ``data`` ones.
    micro_batch : sequences that go through the pipeline together.
    chunks : parts of the network on each worker, if the schedule is interleaved; 1 is plain 1F1B.
    zero : stage of ZeRO among the ``data`` workers, 0 to 3.
    recompute : see ``Recompute``.
    sequence_parallel : the ``tensor`` workers share out the tokens where they do not share out the width.
    fused : the scores of attention never leave the chip (FlashAttention: Dao et al. 2022, arXiv:2205.14135).
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    micro_batch: int = 1
    chunks: int = 1
    zero: int = 0
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        at_least(1, **{f.name: getattr(self, f.name) for f in fields(self)[:6]})
        require("zero", self.zero, lambda x: x in (0, 1, 2, 3), "0, 1, 2 or 3")
        require("recompute", self.recompute, lambda x: x in ("none", "selective", "full"), "none, selective or full")

    @property
    def workers(self) -> int:
        """How many workers it takes."""
        return self.data * self.tensor * self.pipeline

    @property
    def repeated(self) -> Recompute:
        """What the backward pass computes again: fused attention keeps no scores, and so computes them again."""
        return "selective" if self.fused and self.recompute == "none" else self.recompute

    def micro_batches(self, batch: int) -> int:
        """How many micro-batches each pipeline computes in a step."""
        return batch // (self.data * self.micro_batch)


@dataclass(frozen=True)
class Precision:
    """Bytes for each parameter: of the weight itself, its gradient, and the optimizer's state."""

    weight: float = 2
    gradient: float = 4
    state: float = 12


MIXED = Precision()  # bfloat16 weights, gradients added up in float32; Adam's state: float32 weights and two moments

# --- Memory -----------------------------------------------------------------------------------------------------------


def activation_bytes(job: Transformer, plan: Plan) -> float:
    r"""Bytes that one layer keeps for the backward pass of one micro-batch, on one worker.

    For a GPT, with tensor parallelism, with sequence parallelism too, and with every layer recomputed from its input:

    .. math:: sbh\left(10 + \frac{24}{t} + \frac{5as}{ht}\right), \qquad
              \frac{sbh}{t}\left(34 + \frac{5as}{h}\right), \qquad 2sbh.

    The terms with :math:`a` are the scores of attention, which ``selective`` recomputation and fused attention do not
    keep. Source: Korthikanti et al. 2022, arXiv:2205.05198, table 2. Here the 24 is counted from its parts, 2 bytes a
    number: queries, keys, values, the mixed values, and the feed-forward layer's inner width before and after its GELU
    (with a gate: both factors and the product). The 10 are the inputs of norms, attention and feed-forward layer, and
    two masks of dropout, which the Llama family has not. Sequence parallelism shares out a layer's input as well.
    """
    numbers, h = job.tokens * plan.micro_batch, job.width
    apart = plan.tensor if plan.sequence_parallel else 1
    if plan.recompute == "full":
        return numbers * WORD * h / apart
    inner = (3 if job.gated else 2) * job.ffn * job.top_k
    shared = WORD * (2 * h + 2 * job.kv_width + inner)
    scores = 5 * job.heads * job.tokens
    if plan.fused or plan.recompute == "selective":
        scores = 0
    alike = (8 if job.gated else 10) * h
    return numbers * (alike / apart + (shared + scores) / plan.tensor)


def layers_in_flight(job: Transformer, plan: Plan, batch: int) -> float:
    r"""How many layers' activations the first worker of a pipeline holds at most, counted for each micro-batch.

    1F1B: its own layers, for as many micro-batches as there are stages, so about :math:`L` layers whatever :math:`p`.
    Interleaved: :math:`L\left(1 + \frac{p - 1}{pv}\right)`, Korthikanti et al. 2022.
    """
    p, v = plan.pipeline, plan.chunks
    waiting = p if v == 1 else p * (1 + (p - 1) / (p * v))
    return stage_layers(job, plan) * min(waiting, plan.micro_batches(batch))


def stage_layers(job: Transformer, plan: Plan) -> int:
    """Layers of the fullest worker; those of a network that does not divide evenly are rounded up."""
    return plan.chunks * math.ceil(job.layers / (plan.pipeline * plan.chunks))


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest worker.

    Attributes
    ----------
    states : weights, gradients and optimizer state.
    activations : what the backward pass needs.
    gathered : whole weights of the layers in use, if they are sharded otherwise (ZeRO stage 3).
    """

    states: float
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.activations + self.gathered


def memory_of(job: Transformer, plan: Plan, batch: int, precision: Precision = MIXED) -> Memory:
    """Bytes on the worker that holds most, which is taken to be one of the first stage.

    It holds the embedding beside its layers and has the most micro-batches in flight. What ZeRO saves is chapter 7's
    ``memory_per_rank``; experts are held by ``data / expert`` workers each. Where layers are recomputed, one of them is
    there in full for a moment; of sharded weights two layers are whole, one in use and one on its way. Buffers of
    messages and the room that an allocator loses are not counted.
    """
    _check_shares(plan, batch)
    dense, experts = held_parameters(job, plan)
    each = {f"bytes_{name}": size for name, size in vars(precision).items()}
    states = memory_per_rank(dense, plan.data, plan.zero, **each)
    states += memory_per_rank(experts, plan.data // plan.expert, plan.zero, **each)
    kept = activation_bytes(job, plan)
    whole = activation_bytes(job, replace(plan, recompute="none"))
    activations = kept * layers_in_flight(job, plan, batch) + (whole - kept)
    if plan.pipeline == 1:  # logits in float32
        activations += 4 * job.tokens * plan.micro_batch * job.vocabulary / plan.tensor
    gathered = 0.0
    if plan.zero == 3 and plan.data > 1:
        # experts that no other rank has are whole already; all else of a layer is gathered
        shared_out = job.expert_parameters / plan.expert if plan.data > plan.expert else 0
        dense = job.layer_parameters - job.expert_parameters
        gathered = 2 * precision.weight * (dense + shared_out) / plan.tensor
    return Memory(states, activations, gathered)


def _check_shares(plan: Plan, batch: int) -> None:
    share = plan.data * plan.micro_batch
    require("batch", batch, lambda x: x > 0 and x % share == 0, f"a multiple of data * micro_batch, {share}")
    require("expert", plan.expert, lambda x: plan.data % x == 0, f"a divisor of data, {plan.data}")


def held_parameters(job: Transformer, plan: Plan) -> tuple[int, int]:
    """Parameters on a worker of the first stage: all but experts, and of experts; ZeRO not counted."""
    layers = stage_layers(job, plan)
    dense = layers * (job.layer_parameters - job.expert_parameters) + job.embedding_parameters
    if plan.pipeline == 1:
        dense = job.parameters - layers * job.expert_parameters
    experts = layers * job.expert_parameters // plan.expert
    return math.ceil(dense / plan.tensor), math.ceil(experts / plan.tensor)


# --- Time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of training, by what the fullest worker spends them on.

    Attributes
    ----------
    compute : products of matrices.
    elementwise : everything else in the layers, which waits for the worker's own memory.
    all_reduce : activations and their gradients among the tensor-parallel workers.
    all_to_all : tokens on their way to their experts and back.
    sends : activations and gradients on their way from stage to stage.
    bubble : waiting for the pipeline to fill and to drain.
    exchange : gradients, and weights with ZeRO, among the data-parallel workers: what no computation hides.
    mfu : share of the cluster's stated peak that the model's own operations make, those done twice counted once.
    """

    compute: float
    elementwise: float
    all_reduce: float
    all_to_all: float
    sends: float
    bubble: float
    exchange: float
    mfu: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, f.name) for f in fields(self)[:-1])


def step_time(
    job: Transformer,
    cluster: Cluster,
    plan: Plan,
    batch: int,
    precision: Precision = MIXED,
    *,
    buckets: int = 8,
) -> StepTime:
    r"""Predict a step: m micro-batches through the slowest stage, the pipeline's bubble, and the gradients.

    A stage is busy for :math:`m` micro-batches, and idle for :math:`(p - 1)/v` more while the pipeline fills and drains
    (Narayanan et al. 2021). The data-parallel exchange goes out in ``buckets`` during the last micro-batch's backward
    pass (``overlap_timeline``).
    """
    _check_shares(plan, batch)
    m, layers = plan.micro_batches(batch), paced_layers(job, plan)
    compute = layers * layer_compute(job, cluster, plan)
    elementwise = layers * layer_elementwise(job, cluster, plan)
    all_reduce = layers * layer_all_reduce(job, cluster, plan)
    all_to_all = layers * layer_all_to_all(job, cluster, plan)
    busy = compute + elementwise + all_reduce + all_to_all  # with one micro-batch
    sends = plan.chunks * send_time(job, cluster, plan)
    bubble = (plan.pipeline - 1) / plan.chunks * (busy + sends)
    bucket = exchange_time(job, cluster, plan, m, precision) / buckets
    exchange = overlap_timeline(busy, [bucket] * buckets)[-1].end - busy
    total = m * (busy + sends) + bubble + exchange
    mfu = job.flops_per_step(batch) / (total * plan.workers * cluster.peak)
    work = (m * compute, m * elementwise, m * all_reduce, m * all_to_all)
    return StepTime(*work, m * sends, bubble, exchange, mfu)


def paced_layers(job: Transformer, plan: Plan) -> float:
    """Layers of the stage that sets the pace: a full one, or the last, whose output layer counts as part of one."""
    output = 3 * job.output_flops / job.layer_step_flops(plan.repeated)
    full = stage_layers(job, plan)
    if plan.pipeline == 1:
        return job.layers + output
    chunk = full // plan.chunks
    others = (plan.pipeline * plan.chunks - 1) * chunk
    last = max(0, job.layers - others)  # what is left for the last chunk, of the last worker
    return max(full, full - chunk + last + output)


def layer_compute(job: Transformer, cluster: Cluster, plan: Plan) -> float:
    """Seconds of the products of matrices of one layer for one micro-batch."""
    operations = plan.micro_batch * job.layer_step_flops(plan.repeated)
    return operations / plan.tensor / (cluster.peak * cluster.efficiency)


def layer_elementwise(job: Transformer, cluster: Cluster, plan: Plan) -> float:
    """Seconds of everything else in one layer (norms, softmax, dropout, …) for one micro-batch: memory is read.

    Each activation is written and read in a forward pass; in the backward pass it is read once more, and its gradient
    written and read. Products of matrices hide none of it.
    """
    touched = activation_bytes(job, replace(plan, recompute="none"))
    return touched * (7 if plan.recompute == "full" else 5) / cluster.bandwidth


def layer_all_reduce(job: Transformer, cluster: Cluster, plan: Plan) -> float:
    """Seconds of the all-reduces of one layer for one micro-batch: two of ``[b, s, h]`` in each pass.

    With sequence parallelism each is a reduce-scatter and an all-gather, which together send the same.
    Source: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022.
    """
    size = WORD * plan.micro_batch * job.tokens * job.width
    rounds = 2 * (3 if plan.recompute == "full" else 2)
    return rounds * all_reduce_time(size, plan.tensor, cluster, stride=1)


def layer_all_to_all(job: Transformer, cluster: Cluster, plan: Plan) -> float:
    """Seconds of the all-to-all exchanges of one layer for one micro-batch: two in each pass, there and back.

    Each of the ``expert`` workers keeps one part of its tokens' copies and sends the others on; what leaves the node
    takes the slower connection. Source: Lepikhin et al. 2020, arXiv:2006.16668 (GShard).
    """
    e = plan.expert
    if e == 1:
        return 0.0
    size = WORD * plan.micro_batch * job.tokens * job.width * job.top_k / plan.tensor
    near = min(e, max(1, cluster.per_node // plan.tensor))
    fast, slow, rounds = cluster.node_link, cluster.link, 2 * (3 if plan.recompute == "full" else 2)
    inside = (near - 1) * (fast.latency + size / e / fast.bandwidth)
    outside = (e - near) * (slow.latency + size / e / slow.bandwidth)
    return rounds * (inside + outside)


def send_time(job: Transformer, cluster: Cluster, plan: Plan) -> float:
    """Seconds in which a micro-batch crosses one boundary of stages forward, and its gradient back.

    Each of the ``tensor`` workers sends its part, and they put it together inside the node (scatter and gather,
    Narayanan et al. 2021).
    """
    if plan.pipeline == 1:
        return 0.0
    link = cluster.node_link if plan.workers <= cluster.per_node else cluster.link
    size = WORD * plan.micro_batch * job.tokens * job.width / plan.tensor
    return 2 * (link.latency + size / link.bandwidth)


def exchange_time(
    job: Transformer, cluster: Cluster, plan: Plan, micro_batches: int, precision: Precision = MIXED
) -> float:
    """Seconds in which the data-parallel workers exchange gradients, and weights where ZeRO shards them.

    Stage 0: an all-reduce of the gradients. 1: its first half, a reduce-scatter, then an all-gather of the new weights,
    which is the second half of an all-reduce. 2: the reduce-scatter for every micro-batch, as no worker has room for
    all gradients. 3: the weights also gathered for every micro-batch, once forward and once backward.
    """
    gradient = _exchanged(job, cluster, plan, precision.gradient)
    weight = _exchanged(job, cluster, plan, precision.weight)
    match plan.zero:
        case 0:
            return gradient
        case 1:
            return gradient / 2 + weight / 2
        case 2:
            return micro_batches * gradient / 2 + weight / 2
    return micro_batches * (gradient / 2 + weight)


def _exchanged(job: Transformer, cluster: Cluster, plan: Plan, size: float) -> float:
    """Seconds of an all-reduce of so many bytes a parameter; experts are exchanged among ``data / expert`` workers."""
    (dense, experts), t, e = held_parameters(job, plan), plan.tensor, plan.expert
    seconds = all_reduce_time(size * dense, plan.data, cluster, stride=t)
    return seconds + all_reduce_time(size * experts, plan.data // e, cluster, stride=t * e)


def all_reduce_time(size: float, workers: int, cluster: Cluster, *, stride: int) -> float:
    """Seconds of an all-reduce among workers that are ``stride`` apart: in two levels, if they fill whole nodes.

    Tensor-parallel workers are neighbours (stride 1); data-parallel ones are ``tensor`` apart.
    """
    if workers == 1 or size == 0:
        return 0.0
    fast, slow = cluster.node_link, cluster.link
    near = max(1, cluster.per_node // stride)
    if workers > near and (near == 1 or workers % near):
        return ring_time(size, slow.bandwidth, slow.latency, workers)
    return hierarchical_time(
        size,
        slow.bandwidth,
        slow.latency,
        workers,
        per_node=near,
        node_bandwidth=fast.bandwidth,
        node_latency=fast.latency,
    )


def predict_pipeline(stage_seconds: Sequence[float], send_seconds: Sequence[float], micro_batches: int) -> float:
    r"""Seconds in which a pipeline of unequal stages computes m micro-batches.

    .. math:: T = \sum_i (c_i + s_i) + (m - 1) \max_i \max(c_i, s_i)

    The first micro-batch goes through all of it; after that one comes out whenever the slowest stage or link has done
    another. Equal stages and free sends: :math:`(m + p - 1)\,c`, so the bubble is :math:`(p - 1)/m` of the work. With
    forward and backward pass in ``stage_seconds`` it is the time of a step of GPipe (Huang et al. 2018,
    arXiv:1811.06965).

    Parameters
    ----------
    stage_seconds : of each of the p stages, for one micro-batch.
    send_seconds : of each of the p - 1 links between them.
    """
    at_least(1, micro_batches=micro_batches)
    require("stage_seconds", stage_seconds, lambda x: len(x) > 0, "one number for each stage")
    links = len(stage_seconds) - 1
    require("send_seconds", send_seconds, lambda x: len(x) == links, f"{links} numbers, one for each link")
    every = [*stage_seconds, *send_seconds]
    require("seconds", every, lambda x: all(is_number(t) and t >= 0 for t in x), "numbers of at least 0")
    return sum(every) + (micro_batches - 1) * max(every)


# --- Plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What a planner may choose from, beside the degrees."""

    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    chunks: tuple[int, ...] = (1, 2, 4)
    zero: tuple[int, ...] = (1, 2, 3)
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    sequence_parallel: bool = True
    fused: bool = False


MEGATRON_2021 = Choices(chunks=(1, 2, 3, 4), zero=(0,), recompute=("full",), sequence_parallel=False)
"""What Narayanan et al. had: no ZeRO, everything recomputed, no sequence parallelism."""


MEGATRON_2022 = Choices(chunks=(1, 2, 3, 4), zero=(0,), recompute=("none", "selective", "full"))
"""What Korthikanti et al. had: selective recomputation and sequence parallelism as well."""

LLAMA_2024 = Choices(chunks=(1, 2, 4, 8), zero=(1, 2, 3), recompute=("none", "full"), fused=True)
"""What the Llama team had: sharding among the data-parallel workers, and fused attention."""


def why_not(job: Transformer, cluster: Cluster, plan: Plan, batch: int, precision: Precision = MIXED) -> str:
    """Return what stands in a plan's way, in words; ``""`` if nothing does."""
    if why := _shape_obstacle(job, cluster, plan, batch):
        return why
    need = memory_of(job, plan, batch, precision).total
    if need > cluster.memory:
        return f"does not fit: needs {need / GB:.1f} GB of {cluster.memory / GB:.1f}"
    return ""


def _shape_obstacle(job: Transformer, cluster: Cluster, plan: Plan, batch: int) -> str:
    """Why the degrees do not divide what they should."""
    d, t, p, e = plan.data, plan.tensor, plan.pipeline, plan.expert
    stuck = {
        f"takes {plan.workers} workers of {cluster.workers}": plan.workers != cluster.workers,
        f"tensor={t} does not divide the node of {cluster.per_node}": cluster.per_node % t > 0,
        f"heads={job.heads} not divisible by tensor={t}": job.heads % t > 0,
        f"kv_heads={job.kv_heads} and tensor={t} do not divide": not _divide(job.kv_heads or job.heads, t),
        f"ffn={job.ffn} not divisible by tensor={t}": job.ffn % t > 0,
        f"layers={job.layers} are too few for {p * plan.chunks} parts": p * plan.chunks > job.layers,
        f"batch={batch} not divisible by data * micro_batch={d * plan.micro_batch}": batch % (d * plan.micro_batch) > 0,
        f"experts={job.experts} not divisible by expert={e}": job.experts % e > 0,
        f"data={d} not divisible by expert={e}": d % e > 0,
        f"chunks={plan.chunks} without a pipeline": plan.chunks > 1 and p == 1,
    }
    if why := next((why for why, holds in stuck.items() if holds), ""):
        return why
    m = plan.micro_batches(batch)
    if plan.chunks > 1 and m % p:
        return f"interleaving: {m} micro-batches are no multiple of pipeline={p}"
    return ""


def _divide(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0


def plans(
    job: Transformer,
    cluster: Cluster,
    batch: int,
    choices: Choices = Choices(),
    precision: Precision = MIXED,
) -> pd.DataFrame:
    """Return every plan that uses all workers and fits, with its predicted step, as a table: the fastest first.

    For each set of degrees, micro-batch, chunks and recomputation the lowest stage of ZeRO that fits is listed: higher
    ones send more and save memory that is not missed.

    Columns: those of ``Plan``; ``seconds`` of a step, ``memory`` in bytes, and what ``StepTime`` has. No row if nothing
    fits.
    """
    at_least(1, batch=batch)
    rows = []
    for plan in _fitting(job, cluster, batch, choices, precision):
        time = step_time(job, cluster, plan, batch, precision)
        memory = memory_of(job, plan, batch, precision).total
        rows.append({**vars(plan), "seconds": time.total, "memory": memory, **vars(time)})
    names = [f.name for f in fields(Plan)] + ["seconds", "memory"] + [f.name for f in fields(StepTime)]
    table = pd.DataFrame(rows, columns=names)
    return table.sort_values("seconds", kind="stable", ignore_index=True)


def best_plan(
    job: Transformer,
    cluster: Cluster,
    batch: int,
    choices: Choices = Choices(),
    precision: Precision = MIXED,
) -> Plan:
    """Return the plan with the fastest predicted step.

    Raises
    ------
    ValueError : no plan is possible; ``refused`` says why.
    """
    at_least(1, batch=batch)
    return _fastest(_fitting(job, cluster, batch, choices, precision), job, cluster, batch, precision)


def _fastest(candidates: Iterable[Plan], job: Transformer, cluster: Cluster, batch: int, precision: Precision) -> Plan:
    def seconds(plan: Plan) -> float:
        return step_time(job, cluster, plan, batch, precision).total

    best = min(candidates, key=seconds, default=None)
    if best is None:
        raise ValueError(f"no plan is possible for batch={batch} on {cluster}: `refused` lists the reasons")
    return best


def refused(
    job: Transformer,
    cluster: Cluster,
    batch: int,
    choices: Choices = Choices(),
    precision: Precision = MIXED,
) -> pd.DataFrame:
    """Return the plans that are not possible as a table: their settings, and ``why``."""
    rows = []
    for shape in _shapes(job, cluster, choices, None):
        for recompute, zero in itertools.product(choices.recompute, choices.zero):
            plan = replace(shape, recompute=recompute, zero=zero)
            if why := why_not(job, cluster, plan, batch, precision):
                rows.append({**vars(plan), "why": why})
    return pd.DataFrame(rows, columns=[*(f.name for f in fields(Plan)), "why"])


def _shapes(
    job: Transformer, cluster: Cluster, choices: Choices, degrees: Iterable[tuple[int, int]] | None
) -> Iterator[Plan]:
    """Every combination of degrees whose product is the number of workers, with every micro-batch and schedule."""
    for tensor, pipeline in degrees or _degrees(cluster):
        data = cluster.workers // (tensor * pipeline)
        experts = [e for e in divisors(data) if job.experts % e == 0]
        for expert, micro, chunks in itertools.product(experts, choices.micro_batches, choices.chunks):
            sequence = choices.sequence_parallel and tensor > 1
            yield Plan(data, tensor, pipeline, expert, micro, chunks, sequence_parallel=sequence, fused=choices.fused)


def _degrees(cluster: Cluster) -> list[tuple[int, int]]:
    n = cluster.workers
    return [(t, p) for t in divisors(n) if t <= cluster.per_node for p in divisors(n // t)]


def divisors(n: int) -> list[int]:
    """Return the divisors of a whole number, in order."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _fitting(
    job: Transformer,
    cluster: Cluster,
    batch: int,
    choices: Choices,
    precision: Precision,
    degrees: Iterable[tuple[int, int]] | None = None,
) -> Iterator[Plan]:
    """The plans that are possible, each with the lowest stage of ZeRO that fits."""
    for shape in _shapes(job, cluster, choices, degrees):
        if _shape_obstacle(job, cluster, shape, batch):
            continue
        for recompute in choices.recompute:
            for zero in sorted(choices.zero):
                plan = replace(shape, recompute=recompute, zero=zero)
                if memory_of(job, plan, batch, precision).total <= cluster.memory:
                    yield plan
                    break


# --- What was run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A training run that was published: the job, the degrees, and the seconds of a step.

    ``choices`` are what its authors had to choose from, beside the degrees; ``micro_batch`` and ``chunks`` are None
    where the paper does not say.
    """

    name: str
    job: Transformer
    cluster: Cluster
    batch: int
    tensor: int
    pipeline: int
    seconds: float
    choices: Choices
    source: str
    micro_batch: int | None = None
    chunks: int | None = None

    @property
    def data(self) -> int:
        """Data-parallel pipelines."""
        return self.cluster.workers // (self.tensor * self.pipeline)

    @property
    def mfu(self) -> float:
        """Share of the stated peak that the model's own operations made."""
        return self.job.flops_per_step(self.batch) / (self.seconds * self.cluster.workers * self.cluster.peak)

    def plan(self, precision: Precision = MIXED) -> Plan:
        """Return the fastest plan, as we predict it, with the published degrees: papers leave the rest unsaid.

        Raises
        ------
        ValueError : none of them fits.
        """
        micro = self.choices.micro_batches if self.micro_batch is None else (self.micro_batch,)
        chunks = self.choices.chunks if self.chunks is None else (self.chunks,)
        choices = replace(self.choices, micro_batches=micro, chunks=chunks)
        degrees = [(self.tensor, self.pipeline)]
        candidates = _fitting(self.job, self.cluster, self.batch, choices, precision, degrees)
        return _fastest(candidates, self.job, self.cluster, self.batch, precision)


def _megatron_2021(
    name: str, heads: int, width: int, layers: int, degrees: tuple[int, int], workers: int, batch: int, teraflops: float
) -> Published:
    job = Transformer(layers, width, heads)
    seconds = job.flops_per_step(batch, "full") / (teraflops * 1e12 * workers)  # they count what is recomputed
    return Published(
        name, job, a100(workers), batch, *degrees, seconds, MEGATRON_2021, "Narayanan et al. 2021, arXiv:2104.04473"
    )


def _megatron_2022(
    name: str,
    heads: int,
    width: int,
    layers: int,
    degrees: tuple[int, int],
    workers: int,
    batch: int,
    seconds: float,
    micro_batch: int = 1,
    chunks: int = 1,
) -> Published:
    job, source = Transformer(layers, width, heads), "Korthikanti et al. 2022, arXiv:2205.05198"
    return Published(name, job, a100(workers), batch, *degrees, seconds, MEGATRON_2022, source, micro_batch, chunks)


LLAMA_3_405B = Transformer(126, 16_384, 128, 8192, 128_256, 53_248, gated=True, kv_heads=8)


def _llama_3(workers: int, teraflops: float) -> Published:
    job, batch = LLAMA_3_405B, 2048  # 16 million tokens
    seconds = job.flops_per_step(batch) / (teraflops * 1e12 * workers)
    source = "Llama team 2024, arXiv:2407.21783"
    return Published(f"405B on {workers:,}", job, h100(workers), batch, 8, 16, seconds, LLAMA_2024, source)


PUBLISHED = (
    _megatron_2021("1.7B", 24, 2304, 24, (1, 1), 32, 512, 137),
    _megatron_2021("3.6B", 32, 3072, 30, (2, 1), 64, 512, 138),
    _megatron_2021("7.5B", 32, 4096, 36, (4, 1), 128, 512, 142),
    _megatron_2021("18.4B", 48, 6144, 40, (8, 1), 256, 1024, 135),
    _megatron_2021("39.1B", 64, 8192, 48, (8, 2), 512, 1536, 138),
    _megatron_2021("76.1B", 80, 10_240, 60, (8, 4), 1024, 1792, 140),
    _megatron_2021("145.6B", 96, 12_288, 80, (8, 8), 1536, 2304, 148),
    _megatron_2021("310.1B", 128, 16_384, 96, (8, 16), 1920, 2160, 155),
    _megatron_2021("529.6B", 128, 20_480, 105, (8, 35), 2520, 2520, 163),
    _megatron_2021("1008.0B", 160, 25_600, 128, (8, 64), 3072, 3072, 163),
    _megatron_2022("22B", 64, 6144, 48, (8, 1), 8, 4, 1.10, micro_batch=4),
    _megatron_2022("175B", 96, 12_288, 96, (8, 8), 64, 64, 13.75, chunks=3),
    _megatron_2022("530B", 128, 20_480, 105, (8, 35), 280, 280, 37.83, chunks=3),
    _megatron_2022("1T", 160, 25_600, 128, (8, 64), 512, 512, 71.49),
    _llama_3(8192, 430),
    _llama_3(16_384, 400),
)
"""Runs whose degrees and speed were published: tables 1, 3 and 5, and 4 of the three papers."""


def compare_with_published(runs: Iterable[Published] = PUBLISHED) -> pd.DataFrame:
    """Return a table of published runs: how well we predict them, and what the planner would have chosen.

    Columns: ``name``, ``workers``; ``tensor``, ``pipeline``, ``seconds`` and ``mfu`` as published; the ``predicted``
    seconds of that plan, and ``error``, which is predicted over published less 1; the degrees that the planner chooses,
    its predicted seconds ``best``, and ``gain``: how many times faster than the published plan it takes that to be.
    """
    rows = []
    for run in runs:
        theirs = step_time(run.job, run.cluster, run.plan(), run.batch).total
        plan = best_plan(run.job, run.cluster, run.batch, run.choices)
        best = step_time(run.job, run.cluster, plan, run.batch).total
        published = (run.name, run.cluster.workers, run.tensor, run.pipeline, run.seconds, run.mfu)
        rows.append((*published, theirs, theirs / run.seconds - 1, plan.tensor, plan.pipeline, best, theirs / best))
    columns = ["name", "workers", "tensor", "pipeline", "seconds", "mfu", "predicted", "error"]
    return pd.DataFrame(rows, columns=[*columns, "our tensor", "our pipeline", "best", "gain"]).set_index("name")
