"""The launcher (however it ends, nothing is left) and the collectives (against torch.distributed and the formulas)."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import torch

from course_lib import parallel
from course_lib.parallel import LaunchTimeout, RankFailed, launch
from tests.parallel import run_by_ranks as functions

ROOT = Path(__file__).parents[2]
LINUX = Path("/proc/self/fd").exists()


# --- What a launch may leave behind: nothing --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _helpers() -> None:
    """The first launch starts the helpers of multiprocessing, which have files of their own."""
    launch(functions.echo, 1)


@pytest.fixture
def nothing_left(_helpers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that the test leaves no process, port, open file, thread, temporary file or shared memory."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    if not LINUX:
        yield
        return
    before = settled(held)
    yield
    more = until_nothing(lambda: more_than(before, held()) + [f"{path} is there" for path in folder.iterdir()])
    assert not more, more


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder for a program that is killed; pytest's own has too long a path for a socket in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def held() -> dict[str, set[Any] | int]:
    """What this process holds at this instant: things where they have names, else their number."""
    return {
        "processes": functions.descendants(),
        "ports": functions.listening(),
        "shared memory": functions.shared_memory(),
        "open files": len(functions.open_files()),
        "threads": threading.active_count(),
    }


def more_than(before: dict[str, set[Any] | int], now: dict[str, set[Any] | int]) -> list[str]:
    """What is held now and was not before, in words. What has gone meanwhile does no harm."""
    found = []
    for name, value in now.items():
        old = before[name]
        if isinstance(value, int) and isinstance(old, int):
            found += [f"{name}: {value}, before {old}"] if value > old else []
        elif isinstance(value, set) and isinstance(old, set):
            found += [f"{name}: {', '.join(map(str, value - old))}"] if value - old else []
    return found


def settled(measure: Callable[[], Any], patience: float = 10.0) -> Any:
    """A measurement that was the same three times in a row: what just ended may still be closing its files."""
    until, last = time.monotonic() + patience, [measure()]
    while (last[-3:] != last[-1:] * 3) and time.monotonic() < until:
        time.sleep(0.02)
        last.append(measure())
    return last[-1]


def until_nothing(look: Callable[[], list[str]], patience: float = 10.0) -> list[str]:
    """What is still found when patience ends; usually nothing, at once."""
    until = time.monotonic() + patience
    while (found := look()) and time.monotonic() < until:
        time.sleep(0.02)
    return found


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_the_search_for_leftovers_finds_them(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with socket.create_server(("127.0.0.1", 0)):
        assert child.pid in functions.descendants()
        assert len(functions.listening()) == 1
    child.communicate(b"\n")
    assert child.pid not in functions.descendants()
    assert not functions.listening()


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_what_stays_is_named_and_what_is_only_late_is_waited_for(tmp_path: Path) -> None:
    before = settled(held)
    with open(tmp_path / "kept", "w"), socket.create_server(("127.0.0.1", 0)):
        found = until_nothing(lambda: more_than(before, held()), patience=0.1)
        assert [line.split(":")[0] for line in found] == ["ports", "open files"]
    assert not more_than(before, held())
    late = threading.Timer(0.2, lambda: None)
    late.start()
    assert more_than(before, held()) == [f"threads: {before['threads'] + 1}, before {before['threads']}"]
    assert not until_nothing(lambda: more_than(before, held()))


# --- launch: what goes right ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_by_rank(world_size: int) -> None:
    total = [world_size, sum(range(world_size)), sum(10**r for r in range(world_size))]
    expected = [x + 2.0 * world_size for x in total]
    results = launch(functions.gather, world_size, offset=2)
    assert results == [(rank, world_size, expected) for rank in range(world_size)]


@pytest.mark.usefixtures("nothing_left")
def test_jobs_in_turn_return_what_they_return_alone() -> None:
    """Each joins a group of its own, as in a launch of its own."""
    jobs = [functools.partial(functions.gather, offset=k) for k in (2, 5)]
    alone = [launch(job, 2) for job in jobs]
    assert alone[0] != alone[1]
    assert launch(parallel.in_turn, 2, jobs) == [list(each) for each in zip(*alone, strict=True)]


@pytest.mark.usefixtures("nothing_left")
def test_a_partial_function_can_be_launched() -> None:
    assert launch(functools.partial(functions.echo, 1), 2, "x", timeout=30) == [(1, "x")] * 2


@pytest.mark.usefixtures("nothing_left")
def test_a_process_may_join_one_group_after_another() -> None:
    first, second = [2.0, 1.0, 11.0], [4.0, 3.0, 13.0]
    assert launch(functions.gather_in_two_groups, 2, timeout=40) == [[first, second]] * 2


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_nothing_keeps_a_group_that_was_left() -> None:
    """Its threads, alive when Python ends, abort the process now and then: an exit code of -6 after all went well."""
    program = """
import os, torch
from course_lib.parallel import process_group
names = lambda: [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
with process_group(backend="gloo"):
    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    print(sum("gloo" in name for name in names()) > 0)
print(sum("gloo" in name for name in names()))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "True\n0\n"


def test_torchrun_gives_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.parallel.run_by_ranks", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    printed = [tuple(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(2)]
    assert printed == launch(functions.gather, 2, offset=2)


@pytest.mark.usefixtures("nothing_left")
def test_a_process_alone_is_a_world() -> None:
    assert functions.lone() == (0, 1)
    assert functions.lone() == (0, 1)


@pytest.mark.usefixtures("nothing_left")
def test_the_environment_is_the_parents_of_now_and_what_torchrun_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "NEW", "HOME")
    monkeypatch.setenv("NEW", "set after the helper process was started")
    monkeypatch.delenv("HOME", raising=False)
    for rank, found in enumerate(launch(functions.environment, 2, *names, threads=2)):
        expected = (str(rank), str(rank), "2", "2", "127.0.0.1", "2", "set after the helper process was started", None)
        assert found == {**dict(zip(names, expected, strict=True)), "threads": "2"}


@pytest.mark.usefixtures("nothing_left")
def test_tensors_come_back_by_value() -> None:
    sent, found = functions.tensors(), launch(functions.tensors, 2)[1]
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert torch.equal(found[name], tensor)
        assert (found[name].dtype, type(found[name])) == (tensor.dtype, type(tensor))
        assert not found[name].is_shared()
    stored = found["view"].untyped_storage().nbytes()
    assert stored == 8, "the rest of the storage came along"
    assert found["weight"].requires_grad


@pytest.mark.usefixtures("nothing_left")
def test_only_shared_memory_is_shared() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4)).share_memory_()
    tensor = torch.zeros(4).share_memory_()
    assert launch(functions.add_to, 3, tensor, parameter) == [True] * 3
    assert tensor.tolist() == parameter.tolist() == [10, 10, 10, 0]
    assert launch(functions.add_to, 3, tensor[1:], parameter) == [True] * 3
    assert tensor.tolist() == [10, 20, 20, 10]

    own = torch.zeros(4)
    assert launch(functions.add_to, 3, own, torch.nn.Parameter(own)) == [False] * 3
    assert own.tolist() == [0, 0, 0, 0]
    assert not own.is_shared()


@pytest.mark.gpu(emulated=False)
def test_tensors_travel_without_the_gpu_and_nccl_is_the_default() -> None:
    x = torch.arange(3.0, device="cuda")
    assert [found[0].device.type for found in launch(functions.echo, 2, x)] == ["cpu", "cpu"]
    assert launch(functions.gather, 1)[0][:2] == (0, 1)
    assert launch(parallel.all_reduce_demo, 1)[0]["after"] == [1] * 8


# --- launch: what goes wrong ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("fails", [functions.explode, functions.explode_apart])
@pytest.mark.parametrize("culprit", [0, 2])
def test_the_failing_ranks_own_traceback(fails: Callable[..., Any], culprit: int) -> None:
    with pytest.raises(RankFailed) as caught:
        launch(fails, 3, culprit)
    message = str(caught.value)
    assert caught.value.rank == culprit
    assert message.startswith(f"rank {culprit} of 3 failed:")
    assert message.endswith('''raise KeyError("the culprit's own words")\nKeyError: "the culprit's own words"''')
    assert "launching.py" not in message, "the launcher's own frames say nothing"
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), str(copied), copied.rank) == (RankFailed, message, culprit)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("how", "words"),
    [("killed", "was killed by SIGKILL"), ("exit 3", "ended with exit code 3"), ("exit 0", "ended without a word")],
)
def test_a_rank_that_dies_without_a_word_is_the_one_that_failed(how: str, words: str) -> None:
    with pytest.raises(RankFailed, match=f"^rank 1 of 3 {words}") as caught:
        launch(functions.die, 3, 1, how)
    assert caught.value.rank == 1


@pytest.mark.usefixtures("nothing_left")
def test_a_hang_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchTimeout, match="^after 3 seconds 2 of 2 ranks had not finished: 0, 1") as caught:
        launch(functions.hang, 2, 1, str(tmp_path), timeout=3)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.ranks == (0, 1)
    places = str(caught.value).split("rank 1 was at")
    assert "in all_reduce" in places[0], "where it waits"
    assert re.search(r"in oversleep\n.*in hang$", places[1]), "where it sleeps, the innermost first, and no frame more"
    assert_gone(tmp_path, 2)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), str(copied), copied.ranks) == (LaunchTimeout, str(caught.value), (0, 1))


@pytest.mark.usefixtures("nothing_left")
def test_a_rank_that_returns_but_does_not_end_is_named() -> None:
    with pytest.raises(LaunchTimeout, match="^after 1 seconds 2 of 2 ranks had not finished: 0, 1") as caught:
        launch(functions.linger, 2, timeout=1)
    assert "threading.py" in str(caught.value)


def assert_gone(folder: Path, world_size: int) -> None:
    """No process is left of those that `hang` noted, its child processes included."""
    noted = [int(pid) for path in folder.glob("*.pid") for pid in path.read_text().split()]
    assert len(noted) == 2 * world_size
    if LINUX:
        patience = time.monotonic() + 10
        while set(noted) & set(functions.processes()) and time.monotonic() < patience:
            time.sleep(0.05)
        assert not set(noted) & set(functions.processes())


def wait_for_ranks(
    folder: Path, world_size: int, parent: subprocess.Popen[str] | None = None, patience: float = 60.0
) -> None:
    limit = time.monotonic() + patience
    while len(list(folder.glob("*.pid"))) < world_size:
        assert parent is None or parent.poll() is None, parent and parent.communicate()[1]
        assert time.monotonic() < limit, "the ranks did not start"
        time.sleep(0.05)


LONG = "a_folder_with_a_name_of_forty_characters/" * 3


@pytest.mark.parametrize(
    ("folder", "words"), [("short", ""), (LONG, "too long a path for a socket: each process starts")]
)
def test_a_long_path_to_the_temporary_folder_is_no_hindrance(
    folder: str, words: str, tmp_path: Path, short_folder: Path
) -> None:
    """A socket's path has room for about a hundred characters."""
    (tmp_path / "script.py").write_text(
        "from course_lib.parallel import launch\nfrom tests.parallel import run_by_ranks as functions\n"
        "if __name__ == '__main__':\n    print(launch(functions.echo, 1, 'heard', timeout=100))\n"
    )
    temporary = short_folder / folder
    temporary.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "[('heard',)]\n"
    assert words in done.stderr
    assert bool(words) == bool(done.stderr)
    assert [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")] == []  # torch's cache


def test_a_program_from_standard_input_is_refused() -> None:
    program = "from course_lib.parallel import launch\nimport os\nlaunch(os.getpid, 1)"
    done = subprocess.run([sys.executable, "-"], input=program, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "ValueError: fn=getpid was launched by a program read from standard input" in done.stderr
    assert "save the program as a .py file" in done.stderr


SCRIPT = """
import sys
from course_lib.parallel import launch
from tests.parallel import run_by_ranks as functions

if __name__ == "__main__":
    launch(functions.echo, 1)
    before = functions.listening(), len(functions.open_files())
    try:
        launch(functions.hang, 2, 1, sys.argv[1])
    except KeyboardInterrupt as interrupt:
        assert not functions.descendants()
        assert (functions.listening(), len(functions.open_files())) == before
        print("interrupted, and well", flush=True)
    launch(functions.hang, 2, 1, sys.argv[2])
"""


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_the_ranks_end_when_their_parent_is_interrupted_or_killed(tmp_path: Path, short_folder: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    folders = [tmp_path / "interrupted", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(short_folder)}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), *map(str, folders)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_ranks(folders[0], 2, parent)
        temporary = list(short_folder.rglob("*"))
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does it: all processes of the group at once
        wait_for_ranks(folders[1], 2, parent)
        assert_gone(folders[0], 2)
        assert list(short_folder.rglob("*")) == temporary
        parent.kill()
        assert parent.communicate(timeout=30) == ("interrupted, and well\n", "")
        assert_gone(folders[1], 2)
    finally:
        parent.kill()
        for path in tmp_path.glob("*/*.pid"):  # what a failing test would leave
            for pid in path.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@pytest.mark.usefixtures("nothing_left")
def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(RankFailed, match=r"rank 0 of 1 failed:\s+TypeError: the result, of type function, cannot be"):
        launch(functions.unpicklable, 1)
    with pytest.raises(ValueError, match=r"^argument 1=<function .* cannot be pickled"):
        launch(functions.echo, 2, 0, lambda: 1)
    with pytest.raises(ValueError, match=r"^offset=<function .* cannot be pickled"):
        launch(functions.gather, 2, offset=lambda: 1)


def test_bad_arguments_are_named() -> None:
    def nested() -> None:
        """A function that no other process can import."""

    cases: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
        (launch, (functions.echo, 0), {}, "world_size=0: must be a whole number of at least 1"),
        (launch, (functions.echo, True), {}, "world_size=True: must be a whole number of at least 1"),
        (launch, (functions.echo, 2.0), {}, "world_size=2.0: must be a whole number of at least 1"),
        (launch, (functions.echo, 2), {"threads": 0}, "threads=0: must be a whole number of at least 1"),
        (launch, (functions.echo, 2), {"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        (launch, (functions.echo, 2), {"timeout": float("inf")}, "timeout must be .* got inf"),
        (launch, (functions.echo, 2), {"timeout": None}, "timeout must be .* got None"),
        (launch, ("echo", 2), {}, "fn must be a function, got 'echo'"),
        (launch, (lambda: 1, 2), {}, "fn must be a function at the top level of a module.*<lambda>"),
        (launch, (nested, 2), {}, "fn must be a function at the top level of a module.*nested"),
        (launch, (functools.partial(nested), 2), {}, "fn must be a function at the top level of a module.*nested"),
    ]
    for call, args, kwargs, message in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            call(*args, **kwargs)
    for settings, message in (
        ({"backend": "mpi"}, "backend must be 'gloo', 'nccl' or None, got 'mpi'"),
        ({"timeout": -1.0}, "timeout must be a positive number of seconds, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"), parallel.process_group(**settings):
            pass


# --- launch in a notebook ---------------------------------------------------------------------------------------------

NOTEBOOK = [
    """
import os
from course_lib.parallel import launch
from tests.parallel import run_by_ranks as functions
launch(functions.gather, 2)
""",
    """
def mine(): pass
try:
    launch(mine, 2)
except ValueError as error:
    print(error)
""",
    """
before = functions.listening()
try:
    launch(functions.hang, 2, 0, FOLDER)
except KeyboardInterrupt:
    print("interrupted", functions.descendants(), functions.listening() == before)
""",
    "launch(functions.gather, 2)",
]


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_launch_works_in_a_notebook_and_can_be_interrupted(
    tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_folder))
    cells = [nbformat.v4.new_code_cell(source.replace("FOLDER", repr(str(tmp_path)))) for source in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )

    client.create_kernel_manager().shutdown_wait_time = 30.0

    def interrupt() -> None:
        """Do what Jupyter's stop button does: signal the whole group of the kernel."""
        wait_for_ranks(tmp_path, 2, patience=100)
        manager: Any = client.km
        os.killpg(os.getpgid(manager.provisioner.pid), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    client.execute()
    thread.join()
    outputs = ["".join(out.get("text", "") or out["data"]["text/plain"] for out in cell.outputs) for cell in cells]
    expected = "[(0, 2, [2.0, 1.0, 11.0]), (1, 2, [2.0, 1.0, 11.0])]"
    assert outputs[0] == outputs[3] == expected
    assert outputs[1].startswith("fn=mine was defined in a notebook or an interactive session")
    assert "put it in a .py file beside the notebook" in outputs[1]
    assert outputs[2] == "interrupted set() True\n"
    assert_gone(tmp_path, 2)
    assert list(short_folder.glob("pymp-*")) == []  # the kernel ended of itself, its helpers too


def test_a_function_of_an_interactive_session_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session = types.ModuleType("__main__")
    exec("def mine(): pass", session.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", session)
    with pytest.raises(ValueError, match=r"^fn=mine was defined in a notebook.*in a \.py file beside the notebook"):
        launch(session.mine, 2)


# --- The package ------------------------------------------------------------------------------------------------------


def test_the_package_offers_what_it_lists() -> None:
    assert parallel.__all__ == sorted(set(parallel.__all__))
    for name in parallel.__all__:
        assert getattr(parallel, name).__module__.startswith("course_lib.parallel.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        parallel.nothing  # noqa: B018
    # `python -m course_lib.parallel.resuming` would warn otherwise.
    assert launch(functions.imported, 1, "course_lib.parallel.scaling", "course_lib.parallel.resuming") == [
        [True, False]
    ]


# --- The collectives --------------------------------------------------------------------------------------------------

SIZES = [0, 1, 2, 3, 7, 10, 1000, 1001]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_collectives_agree_with_torch_and_the_formulas(world_size: int) -> None:
    ranks = launch(functions.run_collectives, world_size, SIZES, DTYPES, timeout=120)
    for size in SIZES:
        for dtype in DTYPES:
            brought = [functions.vector(rank, size, dtype) for rank in range(world_size)]
            total = torch.stack(brought).double().sum(0)
            scale = float(torch.stack(brought).double().norm())  # the sum alone may come out near zero
            found = [rank[size, dtype] for rank in ranks]
            for rank in range(world_size):
                for name in ("ring", "tree", "torch"):
                    assert difference(found[rank][name], total) <= scale * TOLERANCE[dtype]
                    assert torch.equal(found[rank][name], found[0][name]), "all ranks must hold the same bits"
                mine = (rank + 1) % world_size
                chunk = total.flatten().tensor_split(world_size)[mine]
                assert found[rank]["chunk"].shape == chunk.shape
                assert difference(found[rank]["chunk"], chunk) <= scale * TOLERANCE[dtype]
                assert size == 0 or found[rank]["chunk is a view"]
                for root in range(world_size):
                    assert torch.equal(found[rank][f"broadcast {root}"], brought[root])
                assert difference(found[rank][f"reduce {rank}"], total) <= scale * TOLERANCE[dtype]
                for name, formula in (("ring", parallel.ring_traffic), ("tree", parallel.tree_traffic)):
                    assert found[rank][f"{name} traffic"] == asdict(formula(size, dtype.itemsize, world_size, rank))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_the_exact_counts_are_those_of_the_papers(world_size: int) -> None:
    n, size = world_size, 40 * world_size
    rings = [parallel.ring_traffic(size, 8, n, rank) for rank in range(n)]
    for count in rings:  # N divides the size: every rank moves 2 (N - 1) chunks of an N-th each
        assert count.messages_sent == count.messages_received == parallel.ring_messages(n) == 2 * (n - 1)
        assert count.bytes_sent == count.bytes_received == parallel.ring_bytes(8 * size, n)
        assert count.bytes_sent == pytest.approx(2 * (n - 1) / n * 8 * size)
    trees = [parallel.tree_traffic(size, 8, n, rank) for rank in range(n)]
    rounds = {1: 0, 2: 1, 3: 2, 4: 2, 5: 3, 8: 3}[n]
    assert trees[0].messages_sent == parallel.tree_messages(n) == rounds
    assert trees[0].bytes_sent == max(count.bytes_sent for count in trees) == parallel.tree_bytes(8 * size, n)
    assert trees[0].bytes_sent == rounds * 8 * size
    for elements in (0, 1, 7, 1001):
        for formula in (parallel.ring_traffic, parallel.tree_traffic):
            counts = [formula(elements, 4, n, rank) for rank in range(n)]
            assert sum(c.bytes_sent for c in counts) == sum(c.bytes_received for c in counts)
            assert sum(c.messages_sent for c in counts) == sum(c.messages_received for c in counts)
            # An all-reduce by either sends N - 1 sums up and N - 1 down, of every element.
            assert sum(c.bytes_sent for c in counts) == 2 * (n - 1) * elements * 4


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_all_gather_takes_each_chunk_from_its_rank(world_size: int) -> None:
    for size in (1, 4, 11):
        results = launch(functions.all_gather, world_size, size)
        expected = torch.empty(size)
        for rank in range(world_size):
            expected.tensor_split(world_size)[(rank + 1) % world_size].fill_(rank)
        for before, after in results:
            assert torch.equal(after, expected)
            assert not torch.equal(before, expected) or size == 0 or (size == 1 and before[0] == expected[0])


def test_counters_count_only_inside_their_block() -> None:
    outer, inner, late = launch(functions.nested_counts, 2)[0]
    assert inner == asdict(parallel.ring_traffic(4, 4, 2, 0))
    assert outer == {name: 2 * count for name, count in inner.items()}
    assert set(late.values()) == {0}


def test_bad_tensors_and_ranks_are_named() -> None:
    source, destination, strides, parameter = launch(functions.bad_arguments, 2)[1]
    assert source == "src must be a rank from 0 to 1, got 2"
    assert destination == "dst must be a rank from 0 to 1, got -1"
    assert strides == "tensor must be contiguous, for it is changed in place; got strides (1, 3)"
    assert parameter == "[2.0, 2.0, 2.0]"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("elements", [0, 2, 10, 11])
def test_the_states_of_the_ring_are_those_of_the_processes(world_size: int, elements: int) -> None:
    brought = [functions.vector(rank, elements, torch.float64).flatten() for rank in range(world_size)]
    states = list(parallel.ring_states(brought))
    assert len(states) == 2 * (world_size - 1) + 1
    assert torch.equal(states[0], torch.stack(brought))
    for row in states[-1]:
        torch.testing.assert_close(row, torch.stack(brought).sum(0))
    for rank in range(world_size):  # halfway: a complete chunk in each
        mine = (rank + 1) % world_size
        chunks = torch.stack(brought).sum(0).tensor_split(world_size)
        halfway = states[world_size - 1][rank].tensor_split(world_size)
        torch.testing.assert_close(halfway[mine], chunks[mine])


def test_the_states_of_the_ring_by_hand() -> None:
    states = [state.tolist() for state in parallel.ring_states([torch.full((3,), 10**rank) for rank in range(3)])]
    assert states == [
        [[1, 1, 1], [10, 10, 10], [100, 100, 100]],
        [[1, 1, 101], [11, 10, 10], [100, 110, 100]],
        [[1, 111, 101], [11, 10, 111], [111, 110, 100]],
        [[111, 111, 101], [11, 111, 111], [111, 110, 111]],
        [[111, 111, 111], [111, 111, 111], [111, 111, 111]],
    ]


def test_schedules() -> None:
    assert [parallel.ring_schedule(0, step, 4) for step in range(6)] == [(0, 3), (3, 2), (2, 1), (1, 0), (0, 3), (3, 2)]
    for world_size in (2, 3, 7):
        for step in range(2 * (world_size - 1)):
            for rank in range(world_size):
                _, received = parallel.ring_schedule((rank + 1) % world_size, step, world_size)
                assert received == parallel.ring_schedule(rank, step, world_size)[0]
    assert parallel.tree_rounds(1) == []
    assert parallel.tree_rounds(6) == [[(0, 1)], [(0, 2), (1, 3)], [(0, 4), (1, 5)]]
    for call, message in (
        (lambda: parallel.ring_schedule(4, 0, 4), "rank must lie between 0 and 3, got 4"),
        (lambda: parallel.ring_schedule(0, 6, 4), r"step must be at least 0 and below 2 \(N - 1\) = 6, got 6"),
        (lambda: parallel.tree_rounds(0), "world_size=0: must be a whole number of at least 1"),
        (lambda: parallel.ring_bytes(8, 0), "world_size=0: must be a whole number of at least 1"),
        (lambda: parallel.measure_collectives([]), "sizes must be numbers of bytes"),
        (lambda: parallel.measure_collectives([4], 0), "repeats must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_measuring_and_the_demonstration() -> None:
    rows = launch(parallel.measure_collectives, 2, [400, 4000], repeats=2)
    assert [(row["bytes"], row["algorithm"]) for row in rows[0]] == [
        (size, name) for size in (400, 4000) for name in ("ring", "tree", "torch")
    ]
    for mine, other in zip(*rows, strict=True):
        assert mine["seconds"] == other["seconds"] > 0  # the slowest rank's, on both
        if mine["algorithm"] == "ring":
            assert mine["bytes_sent"] == parallel.ring_bytes(mine["bytes"], 2)
            assert mine["messages_sent"] == 2
    for rank, shown in enumerate(launch(parallel.all_reduce_demo, 3, 5)):
        assert (shown["rank"], shown["before"], shown["after"]) == (rank, [10**rank] * 5, [111] * 5)
        assert shown["bytes_sent"] == parallel.ring_traffic(5, 8, 3, rank).bytes_sent
