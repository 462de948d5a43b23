"""Start a function in several processes that talk to one another, from a script or from a notebook.

=================  ====================================================================================================
name               what it does
=================  ====================================================================================================
``launch``         runs ``fn`` once in each of N new processes; returns their N results, or raises what went wrong
``in_turn``        to be launched: several jobs one after the other, so that processes are started only once
``process_group``  joins the processes to a group that can communicate, for the length of a ``with`` block
``World``          who a process is: its rank, the size of the group, its device
``RankFailed``     a process raised, or was killed: its own traceback, or the signal
``LaunchTimeout``  they did not finish in time: which ones, and the line at which each of them hung
=================  ====================================================================================================

``launch`` sets the environment variables that ``torchrun`` sets, so a function that opens with
``with process_group() as world:`` runs under either, unchanged.
"""

from __future__ import annotations

import faulthandler
import functools
import io
import itertools
import multiprocessing
import numbers
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the group of the moment as a default. First imported inside a group (torch.optim does it), they
# would keep that group, and threads that still run when Python ends can abort the process.
import torch.distributed.nn
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing.reductions import reduce_storage
from torch.storage import UntypedStorage

from course_lib.lab.arguments import at_least

LOCALHOST = "127.0.0.1"
# what nearly every function needs: torch.optim imports dynamo when it is first used, the digits need scikit-learn
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "sklearn.datasets", "course_lib.parallel"]
GRACE = 1.0  # seconds in which the others may still report, once one has failed


# --- Inside a process: joining the group ------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Who this process is: ``rank`` counts from 0 to ``size - 1``; its tensors belong on ``device``."""

    rank: int
    size: int
    device: torch.device


@contextmanager
def process_group(backend: str | None = None, timeout: float = 300.0) -> Iterator[World]:
    """Join this process to its group for the length of a ``with`` block.

    Parameters
    ----------
    backend : ``"gloo"`` (CPU) or ``"nccl"`` (one GPU a process). By default NCCL where every process of this machine
        has a GPU to itself, else gloo.
    timeout : seconds after which a communication that found no partner raises.

    Who belongs to the group stands in the environment, put there by ``launch`` or ``torchrun``; a process that neither
    of them started is a world of its own, with rank 0 and size 1.
    """
    if backend not in (None, "gloo", "nccl"):
        raise ValueError(f"backend must be 'gloo', 'nccl' or None, got {backend!r}")
    _positive_seconds("timeout", timeout)
    local_rank, local_size = (int(os.environ.get(name, usual)) for name, usual in _LOCAL_DEFAULTS)
    backend = backend or ("nccl" if _a_gpu_each(local_size) else "gloo")
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = timedelta(seconds=timeout)
    dist.init_process_group(backend, timeout=patience, **_own_meeting_point(patience))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    except BaseException as error:
        # Leaving the group makes the others fail too. `launch` tells cause from consequence by this time.
        error.failed_at = time.monotonic()  # type: ignore[attr-defined]
        raise
    finally:
        # After an error NCCL would wait for operations that can no longer end; the end of the process frees it all.
        if backend == "gloo" or sys.exc_info()[0] is None:
            dist.destroy_process_group()


_LOCAL_DEFAULTS = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


_groups = itertools.count()  # of this process, so far


def _own_meeting_point(patience: timedelta) -> dict[str, Any]:
    """Return the store at which the processes meet, with a place in it for this group alone; the rank and the size.

    A second group in one process would else read what the first has left there, and wait for answers to it.
    """
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    store, rank, size = next(iter(rendezvous("env://", timeout=patience)))
    own = dist.PrefixStore(f"group {next(_groups)}", store)  # type: ignore[attr-defined]
    return {"store": own, "rank": rank, "world_size": size}


def _a_gpu_each(local_size: int) -> bool:
    wanted = os.environ.get("COURSE_DEVICE", "").strip().lower() or "cuda"
    return wanted.startswith("cuda") and torch.cuda.device_count() >= local_size and dist.is_nccl_available()


# --- What can go wrong ------------------------------------------------------------------------------------------------


class RankFailed(RuntimeError):
    """A process of ``launch`` failed: the first one, not those that then missed it. ``rank`` says which."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:  # so that it survives the way back from a process
        return RankFailed, (str(self), self.rank)


class LaunchTimeout(TimeoutError):
    """The processes of ``launch`` did not all finish in time. ``ranks`` are those that had not."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return LaunchTimeout, (str(self), self.ranks)


# --- In the parent: launch --------------------------------------------------------------------------------------------


def in_turn(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call each of ``jobs`` and return what they returned, in order; to be run by ``launch``.

    ``launch(in_turn, 2, [partial(train, "a"), partial(train, "b")])`` starts two processes for both jobs, where two
    calls of ``launch`` would start four.
    """
    return [job() for job in jobs]


def launch(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, threads: int = 1, **kwargs: Any
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` in ``world_size`` new processes at once and return what each returned, by rank.

    Parameters
    ----------
    fn : a function of a module (a .py file), since each process imports it by its name. It finds out who it is by
        ``with process_group() as world:``.
    timeout : seconds for the whole of it; the first launch may take a few more before they start to count (see below).
    threads : threads that torch may use in each process.

    Arguments and results travel by value, tensors as tensors on the CPU. Only a CPU tensor argument that lies in
    shared memory (``share_memory_()``) is the same memory in every process.

    However it ends (also by Ctrl-C), no process, port or file of the group is left behind. Where the system can fork,
    one idle helper stays until Python ends: the next launch takes some hundredths of a second, for torch is already
    imported in it. It keeps the course's code as it was when the first launch began, as a notebook's kernel does.

    Raises
    ------
    RankFailed : a process raised (its traceback is in the message), was killed, or returned what cannot be pickled.
    LaunchTimeout : not all were done in time; the message says where each of them was.
    ValueError : an argument is out of range, or ``fn`` cannot be imported by its name.
    """
    _check_arguments(fn, world_size, timeout, threads)
    _context()
    deadline = time.monotonic() + timeout
    call = _Call(fn, args, kwargs)
    ranks: list[_Rank] = []
    try:
        with _meeting_point() as port:
            for number in range(world_size):
                ranks.append(_Rank(number, call, _environment(number, world_size, port, threads), threads))
                ranks[-1].start()
            if not _wait(ranks, deadline):
                raise _timed_out(ranks, timeout)
    finally:
        for rank in ranks:
            rank.end()
    failed = [rank for rank in ranks if rank.failure]
    if failed:
        # One that died without a word did not die for want of another; of the others, the earliest.
        first = min(failed, key=lambda rank: (rank.failed_at is not None, rank.failed_at))
        raise RankFailed(f"rank {first.number} of {world_size} {first.failure}", first.number)
    return [pickle.loads(rank.result) for rank in ranks]


@functools.cache
def _context() -> Any:
    """Return what starts processes; where that is by a helper, wait until the helper has imported torch.

    Never by "fork": a copy of a process that has threads or CUDA in use may hang. The helper has neither.
    """
    _end_helpers_with_the_kernel()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    first = context.Process(target=os.getpid)
    try:
        first.start()
    except OSError as error:
        if "too long" not in str(error):
            raise
        where = tempfile.gettempdir()
        warnings.warn(f"TMPDIR={where} is too long a path for a socket: each process starts anew, slowly", stacklevel=3)
        return multiprocessing.get_context("spawn")
    first.join()
    return context


def _end_helpers_with_the_kernel() -> None:
    """In a notebook: when the kernel is told to end, end the helpers of multiprocessing first.

    They ignore the signal by which a kernel ends its children. It would repeat it for half a minute, or be killed
    meanwhile, and then their temporary folder would stay.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.observe(_end_helpers, "exit_now")


def _end_helpers(_: Any = None) -> None:
    for name in ("forkserver", "resource_tracker"):
        helper: Any = getattr(sys.modules.get(f"multiprocessing.{name}"), f"_{name}", None)
        with suppress(AttributeError, OSError):  # there is no public way to end them
            helper._stop()


@contextmanager
def _meeting_point() -> Iterator[int]:
    """Keep a store at which the processes find one another; yield its port.

    The parent keeps it on a port that the system picks, since one picked beforehand could be taken when rank 0 comes to
    open it. It listens on this machine only.
    """
    listener = socket.create_server((LOCALHOST, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    try:
        yield port
    finally:
        del store  # this closes the port, even while an exception's traceback keeps this frame


def _environment(rank: int, world_size: int, port: int, threads: int) -> dict[str, str]:
    """Return the parent's environment with what ``torchrun`` would add to it for this rank."""
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    own = {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}  # one machine: nothing need pass the network card
    for scope in ("", "LOCAL_", "ROLE_"):
        own |= {f"{scope}RANK": str(rank), f"{scope}WORLD_SIZE": str(world_size)}
    own |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": LOCALHOST, "MASTER_PORT": str(port)}
    own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **own}


def _wait(ranks: list[_Rank], deadline: float) -> bool:
    """Hear the ranks until all have ended, or one has failed; say whether that came before the deadline."""
    while running := [rank for rank in ranks if not rank.ended]:
        failed = any(rank.failure for rank in ranks)
        if failed:  # the others notice, but will not end of themselves
            deadline = min(deadline, time.monotonic() + GRACE)
        channels = [rank.process.sentinel for rank in running] + [rank.reports for rank in running if not rank.heard]
        ready = connection.wait(channels, max(0.0, deadline - time.monotonic()))
        if not ready:
            return failed
        for rank in running:
            if rank.process.sentinel in ready or rank.reports in ready:
                rank.hear(ended=rank.process.sentinel in ready)
    return True


def _timed_out(ranks: list[_Rank], timeout: float) -> LaunchTimeout:
    """Ask all that still run where they are."""
    late = [rank for rank in ranks if not rank.ended]
    for rank in late:
        rank.ask_where()
    numbers_of_late = ", ".join(str(rank.number) for rank in late)
    places = "".join(f"\n\nrank {rank.number} was at (innermost call first):\n{rank.where()}" for rank in late)
    message = f"after {timeout:g} seconds {len(late)} of {len(ranks)} ranks had not finished: {numbers_of_late}{places}"
    return LaunchTimeout(message, tuple(rank.number for rank in late))


class _Rank:
    """A process as the parent sees it: what it has reported, and how to end it."""

    def __init__(self, number: int, call: _Call, environment: dict[str, str], threads: int) -> None:
        context = _context()
        self.number = number
        self.heard = False
        self.ended = False
        self.result = b""
        self.failure = ""
        self.failed_at: float | None = None
        self.reports: Connection
        self.traces: Connection
        self.reports, self._reports_end = context.Pipe(duplex=False)
        self.traces, self._traces_end = context.Pipe(duplex=False)
        ends = (self._reports_end, self._traces_end)
        self.process: BaseProcess = context.Process(
            target=_run_rank, args=(call, environment, threads, *ends), name=f"rank {number}"
        )

    def start(self) -> None:
        try:
            self.process.start()
        finally:
            self._reports_end.close()  # only the process holds them now
            self._traces_end.close()

    def hear(self, *, ended: bool) -> None:
        """Take in the report, if there is one; after the end of the process, draw the conclusion."""
        with suppress(EOFError, OSError):  # it died, perhaps in the midst of a report
            if not self.heard and self.reports.poll():
                self.heard = True
                self.result, self.failure, self.failed_at = self.reports.recv()
        if ended:
            self.ended = True
            self.process.join()
            if self.process.exitcode and not self.failure:
                self.failure = _epitaph(self.process.exitcode) + (", after it had returned" if self.result else "")
            elif not self.result and not self.failure:
                self.failure = "ended without a word (did it call os._exit?)"

    def ask_where(self) -> None:
        """Make the process write where it is, which it does even when it hangs in C++."""
        if hasattr(signal, "SIGUSR1") and self.process.pid:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)

    def where(self) -> str:
        """Return what it wrote, without the frames of this module: they say nothing about the cause."""
        written, patience = b"", GRACE
        while connection.wait([self.traces], patience) and (part := os.read(self.traces.fileno(), 65536)):
            written, patience = written + part, 0.1
        lines = [line for line in written.decode(errors="replace").splitlines() if line.startswith("  ")]
        here = __file__.encode("ascii", "backslashreplace").decode()  # as faulthandler writes a path
        own = next((i for i, line in enumerate(lines) if line.endswith("in __call__") and here in line), len(lines))
        return "\n".join(lines[:own]) or "  (no answer)"

    def end(self) -> None:
        """Kill the process and whatever it has started, and release all that was held for it."""
        if self.process.pid is not None:
            self.process.kill()
            with suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
        self.process.close()
        self.reports.close()
        self.traces.close()


def _epitaph(exitcode: int) -> str:
    """Say in words how a process died that could not say it itself."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else "a signal"
        hint = ": so the system ends a process when memory runs out" if name == "SIGKILL" else ""
        return f"was killed by {name} (signal {-exitcode}{hint})"
    hint = "; a script needs `if __name__ == '__main__':` around its call of launch" if exitcode == 1 else ""
    return f"ended with exit code {exitcode} and no traceback{hint}"


# --- In the process of a rank -----------------------------------------------------------------------------------------


def _run_rank(call: _Call, environment: dict[str, str], threads: int, reports: Connection, traces: Connection) -> None:
    """Call the function and report ``(result, failure, time of failure)``."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: Ctrl-C reaches the parent alone, and the parent ends the whole group
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, file=traces.fileno(), all_threads=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)  # whole lines, and at once
    try:
        report: tuple[bytes, str, float | None] = (call(), "", None)
    except BaseException as error:
        report = (b"", f"failed:\n\n{_own_traceback(error)}", getattr(error, "failed_at", time.monotonic()))
    reports.send(report)


def _own_traceback(error: BaseException) -> str:
    """Return the traceback from the function on, without the frames of this module above it."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def _end_with_parent() -> None:
    """End this process, and what it has started, when the parent is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


class _Call:
    """A function and its arguments, to be pickled for a process; called there, it returns the pickled result."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fn, self.args, self.kwargs = fn, args, kwargs

    def __getstate__(self) -> bytes:
        try:
            return _pickled((self.fn, self.args, self.kwargs), _SharingPickler)
        except Exception as error:
            raise self._blame(error) from None

    def __setstate__(self, state: bytes) -> None:
        self.state = state

    def __call__(self) -> bytes:
        fn, args, kwargs = pickle.loads(self.state)
        result = fn(*args, **kwargs)
        try:
            return _pickled(result, _Pickler)
        except Exception as error:
            raise TypeError(f"the result, of type {type(result).__name__}, cannot be pickled: {error}") from None

    def _blame(self, error: Exception) -> ValueError:
        """Find the argument that cannot be pickled."""
        named = {"fn": self.fn} | {f"argument {i}": value for i, value in enumerate(self.args)} | self.kwargs
        for name, value in named.items():
            try:
                _pickled(value, _Pickler)
            except Exception as cause:
                return ValueError(f"{name}={value!r} cannot be pickled, so it cannot be sent to a process: {cause}")
        return ValueError(f"the arguments cannot be pickled, so they cannot be sent to a process: {error}")


class _Pickler(pickle.Pickler):
    """Pickles tensors by value: without the rest of a storage of which they are a part, and for the CPU."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided:
            return NotImplemented
        if value.is_cpu and value.untyped_storage().nbytes() == value.nbytes:
            return NotImplemented
        own = value.detach().to("cpu", copy=True).requires_grad_(value.requires_grad)
        return own.contiguous().__reduce_ex__(self.PROTOCOL)

    PROTOCOL = pickle.HIGHEST_PROTOCOL


class _SharingPickler(_Pickler):
    """The same, but what lies in shared memory stays there, and the process gets a handle to it."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.is_cpu and value.is_shared():
            layout = (value.dtype, value.storage_offset(), value.shape, value.stride(), value.requires_grad)
            return _tensor_in, (value.untyped_storage(), *layout)
        if isinstance(value, UntypedStorage) and value.is_shared():
            return reduce_storage(value)
        return super().reducer_override(value)


def _tensor_in(
    storage: UntypedStorage, dtype: torch.dtype, offset: int, shape: Any, stride: Any, requires_grad: bool
) -> Tensor:
    """Return the tensor that lies in this memory."""
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride).requires_grad_(requires_grad)


def _pickled(value: Any, pickler: type[_Pickler]) -> bytes:
    buffer = io.BytesIO()
    pickler(buffer, _Pickler.PROTOCOL).dump(value)
    return buffer.getvalue()


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check_arguments(fn: Callable[..., Any], world_size: int, timeout: float, threads: int) -> None:
    at_least(1, world_size=world_size, threads=threads)
    _positive_seconds("timeout", timeout)
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not callable(fn):
        raise ValueError(f"fn must be a function, got {fn!r}")
    name = getattr(fn, "__qualname__", "")
    if "<lambda>" in name or "<locals>" in name:
        raise ValueError(
            f"fn must be a function at the top level of a module, since each process imports it by name; got {name}"
        )
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) == "<stdin>":
        raise ValueError(
            f"fn={name} was launched by a program read from standard input, which a new process cannot read again: "
            "save the program as a .py file"
        )
    if getattr(fn, "__module__", None) == "__main__" and not hasattr(main, "__file__"):
        raise ValueError(
            f"fn={name} was defined in a notebook or an interactive session, where a new process cannot import it: "
            "put it in a .py file beside the notebook and import it from there"
        )


def _positive_seconds(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
