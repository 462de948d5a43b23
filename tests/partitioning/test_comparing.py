"""Ways to share a step: what they send is what was predicted."""

from __future__ import annotations

import math

import pytest

from course_lib.parallel.launching import launch
from course_lib.parallel.scaling import Link
from course_lib.partitioning.comparing import Job, measure_partitions, predict_partitions

JOBS = (Job(4, 32, depth=2), Job(24, 16, depth=3, heads=2, side=8, micro_batches=3))


def test_what_is_sent_is_what_was_predicted() -> None:
    rows = launch(measure_partitions, 2, JOBS, repeats=1, timeout=300)[0]
    assert len(rows) == 8
    for row in rows:
        predicted = predict_partitions(JOBS[row["job"]], 1.0, Link(0.0, 1e9))
        assert row["sent"] == predicted.loc[row["way"], "sent"]
        assert 0 < row["seconds"] < math.inf


@pytest.mark.parametrize("job", JOBS)
def test_parameters_are_the_networks(job: Job) -> None:
    network = job.network()
    assert job.parameters == network.parameter_count
    assert job.tokens == len(network.position)


def test_seconds_by_hand() -> None:
    job = Job(8, 64, depth=2, micro_batches=4)
    table = predict_partitions(job, 2.0, Link(0.01, 1e6))["seconds"]
    edge = 4 * 8 * 16 * 64
    assert table["alone"] == 2
    assert table["data"] == pytest.approx(1 + 2 * (0.01 + 4 * job.parameters / 2 / 1e6))
    assert table["tensor"] == pytest.approx(1 + 8 * 2 * (0.01 + edge / 2 / 1e6))
    send = 2 * (0.01 + edge / 4 / 1e6)
    assert table["pipeline"] == pytest.approx(2 * 0.25 + send + 3 * max(0.25, send))


def test_tensor_parallelism_sends_less_where_tokens_are_fewer_than_three_widths() -> None:
    for batch, less in ((64, True), (128, False)):  # 16 tokens an image, width 512
        sent = predict_partitions(Job(batch, 512, depth=12), 1.0, Link(0, 1))["sent"]
        assert (sent["tensor"] < sent["data"]) == less


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"side=10: must be a multiple of 4"):
        Job(1, 8, side=10)
    with pytest.raises(ValueError, match=r"batch=0"):
        Job(0, 8)
    with pytest.raises(ValueError, match=r"ranks=1"):
        predict_partitions(JOBS[0], 1.0, Link(0, 1), ranks=1)
