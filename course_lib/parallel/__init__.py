"""Training on several processes: how they start, agree, share, save messages, and what all that costs. Chapter 7.

==============================  ==============================================  ========================================
name                            what it does                                    source
==============================  ==============================================  ========================================
launch, process_group           N processes that talk to one another            torch.distributed, torchrun
broadcast, reduce               one to all and all to one, by a tree            Thakur et al., IJHPCA 19(1), 2005
tree_all_reduce                 the one, then the other                         the same
ring_reduce_scatter             the sum in chunks, one finished by each rank    Patarasuk & Yuan, JPDC 69(2), 2009
ring_all_gather                 the finished chunks, round the ring             the same
ring_all_reduce                 the two rings, one after the other              the same
average_gradients               one message for each parameter                  –
average_in_buckets              a few large messages                            Li et al. 2020, arXiv:2006.15704
BucketedAverage                 the same, sent during the backward pass         the same
synchronize_batchnorm           batch norm by the whole batch's statistics      Peng et al. 2017, arXiv:1711.07240
ShardedOptimizer                optimizer state shared out among the ranks      ZeRO-1: Rajbhandari et al. 2019,
                                                                                arXiv:1910.02054
reduce_to_owners                gradients shared out as well                    ZeRO-2: the same
measure_sharding                bytes per rank at every stage                   FSDP: Zhao et al. 2023, arXiv:2304.11277
train_resumably                 goes on after a process was killed              torchrun --max-restarts
accumulate                      one exchange for k steps' gradients             –
local_sgd                       the weights averaged every H steps              Stich 2018, arXiv:1805.09767
top_k, top_fraction             only the largest entries                        Aji & Heafield 2017, arXiv:1704.05021;
                                                                                Lin et al. 2017, arXiv:1712.01887
sign_compress                   one bit an entry                                Karimireddy et al. 2019,
                                                                                arXiv:1901.09847
with_error_feedback             what was not sent is added to the next          Seide et al., Interspeech 2014;
                                                                                Stich et al. 2018, arXiv:1809.07599
stale_gradients                 gradients that are some steps old               Dean et al., NeurIPS 2012
staleness_aware                 a rate divided by their age                     Zhang et al. 2015, arXiv:1511.05950
hogwild                         one network in shared memory, no locks          Recht et al. 2011, arXiv:1106.5730
ring_time, tree_time            seconds of an all-reduce, by formula            Patarasuk & Yuan; Thakur et al.
double_tree_time                two trees at once, in blocks                    Sanders, Speck & Träff 2009; NCCL 2.4
in_network_time                 switches that add up                            Graham et al., COMHPC 2016
simulate_scaling                speed-up over the number of workers             –
amdahl, gustafson               the limits of strong and weak scaling           Amdahl 1967; Gustafson 1988
measure_loading, …_threads      loader processes, threads on one machine        torch's documentation
==============================  ==============================================  ========================================

Functions that are to be run by ``launch`` say so: ``launch(measure_collectives, 2, [4000])`` calls
``measure_collectives([4000])`` in two processes. ``torchrun`` runs them as well.
"""

from typing import TYPE_CHECKING, Any

from course_lib.parallel.asynchronous import (
    hogwild,
    largest_stable_rate,
    stale_gradients,
    staleness_aware,
)
from course_lib.parallel.batch_norm import (
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    global_statistics,
    synchronize_batchnorm,
)
from course_lib.parallel.collectives import (
    Traffic,
    all_reduce_demo,
    broadcast,
    measure_collectives,
    reduce,
    ring_all_gather,
    ring_all_reduce,
    ring_bytes,
    ring_messages,
    ring_reduce_scatter,
    ring_schedule,
    ring_states,
    ring_traffic,
    traffic,
    tree_all_reduce,
    tree_bytes,
    tree_messages,
    tree_rounds,
    tree_traffic,
)
from course_lib.parallel.communicating_less import (
    ErrorFeedback,
    Outcome,
    Signs,
    Sparse,
    Team,
    accumulate,
    by_class,
    compress_with_memory,
    compressed,
    every_step,
    local_sgd,
    sign_compress,
    simulate_workers,
    top_fraction,
    top_k,
    train_worker,
    with_error_feedback,
)
from course_lib.parallel.data_parallel import (
    Bucket,
    BucketedAverage,
    average_gradients,
    average_in_buckets,
    broadcast_model,
    local_loss,
    make_buckets,
    shard,
)
from course_lib.parallel.data_parallel_runs import (
    Run,
    alone,
    endless_batches,
    in_buckets,
    measure_overlap,
    one_by_one,
    overlapped,
    relative_difference,
    replica,
    torch_ddp,
    torch_ddp_unweighted,
    train_alone,
    train_data_parallel,
)
from course_lib.parallel.input_pipeline import (
    measure_loading,
    measure_pinned,
    measure_threads,
    random_rotation,
)
from course_lib.parallel.launching import (
    LaunchTimeout,
    RankFailed,
    World,
    in_turn,
    launch,
    process_group,
)
from course_lib.parallel.scaling import (
    Link,
    Transfer,
    amdahl,
    double_tree_time,
    fit_link,
    gustafson,
    hierarchical_time,
    in_network_time,
    measure_step,
    overlap_timeline,
    ring_time,
    simulate_scaling,
    straggler_factor,
    tree_time,
)
from course_lib.parallel.sharding import (
    Memory,
    ShardedOptimizer,
    measure_sharding,
    memory_per_rank,
    partition,
    reduce_to_owners,
)

if TYPE_CHECKING:
    from course_lib.parallel.resuming import (
        Resumed,
        read_lives,
        run_under_torchrun,
        save_atomically,
        train_resumably,
    )

__all__ = [
    "Bucket",
    "BucketedAverage",
    "ErrorFeedback",
    "LaunchTimeout",
    "Link",
    "Memory",
    "Outcome",
    "RankFailed",
    "Resumed",
    "Run",
    "ShardedOptimizer",
    "Signs",
    "Sparse",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "Team",
    "Traffic",
    "Transfer",
    "World",
    "accumulate",
    "all_reduce_demo",
    "alone",
    "amdahl",
    "average_gradients",
    "average_in_buckets",
    "broadcast",
    "broadcast_model",
    "by_class",
    "compress_with_memory",
    "compressed",
    "double_tree_time",
    "endless_batches",
    "every_step",
    "fit_link",
    "global_statistics",
    "gustafson",
    "hierarchical_time",
    "hogwild",
    "in_buckets",
    "in_network_time",
    "in_turn",
    "largest_stable_rate",
    "launch",
    "local_loss",
    "local_sgd",
    "make_buckets",
    "measure_collectives",
    "measure_loading",
    "measure_overlap",
    "measure_pinned",
    "measure_sharding",
    "measure_step",
    "measure_threads",
    "memory_per_rank",
    "one_by_one",
    "overlap_timeline",
    "overlapped",
    "partition",
    "process_group",
    "random_rotation",
    "read_lives",
    "reduce",
    "reduce_to_owners",
    "relative_difference",
    "replica",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_bytes",
    "ring_messages",
    "ring_reduce_scatter",
    "ring_schedule",
    "ring_states",
    "ring_time",
    "ring_traffic",
    "run_under_torchrun",
    "save_atomically",
    "shard",
    "sign_compress",
    "simulate_scaling",
    "simulate_workers",
    "stale_gradients",
    "staleness_aware",
    "straggler_factor",
    "synchronize_batchnorm",
    "top_fraction",
    "top_k",
    "torch_ddp",
    "torch_ddp_unweighted",
    "traffic",
    "train_alone",
    "train_data_parallel",
    "train_resumably",
    "train_worker",
    "tree_all_reduce",
    "tree_bytes",
    "tree_messages",
    "tree_rounds",
    "tree_time",
    "tree_traffic",
    "with_error_feedback",
]


def __getattr__(name: str) -> Any:
    """Import ``resuming`` when it is asked for: it is a script too, and ``python -m`` warns of one imported before."""
    if name in ("Resumed", "read_lives", "run_under_torchrun", "save_atomically", "train_resumably"):
        from course_lib.parallel import resuming

        return getattr(resuming, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
