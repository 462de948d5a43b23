r"""Deployment: a network out of Python's hands, as a graph in a file; the same answers elsewhere; what starting costs.

=======================  ===================================================  ========================================
name                     what it does or gives                                source
=======================  ===================================================  ========================================
``exported``             a network as a graph, for batches of any size        torch.export
``save_program``         that graph with its weights as a file
``program_engine``       such a file, loaded and ready to answer
``why_not``              what keeps a network from becoming a graph
``Branching``            a network that decides in Python
``Conditional``          the same decision within the graph                   torch.cond
``parity``               how far engines' answers are apart, batch by batch
``installed_sizes``      bytes to be installed for a package to run           importlib.metadata
``cold_start``           seconds of import, load, first answer and second,
                         in a process of its own
=======================  ===================================================  ========================================

A graph says what is computed without the Python that said so: it can be checked, rewritten, run without the class that
it came from, and by other engines. The price is that nothing in it may depend on the numbers that flow through it,
unless the graph itself holds both ways. ``compression.engines`` writes and runs ONNX files; ``Engine`` is from there.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from course_lib.compression.engines import Engine, file_size
from course_lib.lab.arguments import at_least, require

# --- A graph in a file ------------------------------------------------------------------------------------------------


def exported(
    model: nn.Module, example: Tensor, *, dynamic: bool = True
) -> torch.export.ExportedProgram:  # fmt: skip
    """Return the network, in evaluation mode, as a graph of torch's operators with its
    weights.

    Parameters
    ----------
    example : an input that the network takes, ``[N, ...]``; its numbers do not matter.
    dynamic : whether the graph takes batches of any size, or of N alone.

    Raises
    ------
    ValueError : a dynamic graph is wanted from fewer than two examples, since sizes 0 and
        1 are taken for constants.
    Exception : torch's own, if something depends on the values; see ``why_not``.
    """
    _check_example(example, 2 if dynamic else 1)
    plain = copy.deepcopy(model).eval()
    sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(plain, (example.detach(),), dynamic_shapes=sizes)


def _check_example(example: Tensor, least: int) -> None:
    shape, allowed = tuple(example.shape), f"a batch [N, ...] of N >= {least}"
    require("example", shape, lambda s: len(s) > 0 and s[0] >= least, allowed)


def save_program(program: torch.export.ExportedProgram, path: str | Path) -> Path:
    """Write an exported graph and its weights; return the path. By custom it ends in ``.pt2``.

    Raises
    ------
    ValueError : the path does not end so.
    """
    require("path", str(path), lambda p: p.endswith(".pt2"), "a name that ends in .pt2")
    torch.export.save(program, path)
    return Path(path)


def program_engine(path: str | Path) -> Engine:
    """Load a file of ``save_program``: the class of the network is not needed."""
    loaded = torch.export.load(path).module()

    def answer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return loaded(x)

    return Engine(answer, file_size(path))


# --- What is no graph -------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A network that looks at its input and then decides, in Python, which part of it answers.

    Parameters
    ----------
    usual, other : parts that take and give the same shapes.
    threshold : the standard deviation of a batch above which ``other`` answers.
    """

    def __init__(self, usual: nn.Module, other: nn.Module, threshold: float = 1.0) -> None:
        super().__init__()
        self.usual, self.other, self.threshold = usual, other, threshold

    def forward(self, x: Tensor) -> Tensor:
        """A batch to what one of the parts gives."""
        if x.std() > self.threshold:
            return self.other(x)
        return self.usual(x)


class Conditional(Branching):
    """The same decision, taken within the graph: both ways are in it, one of them runs.

    In evaluation mode: neither part may change anything of its own, as batch norm does while it trains.
    """

    def forward(self, x: Tensor) -> Tensor:
        """A batch to what one of the parts gives."""
        return torch.cond(x.std() > self.threshold, self.other, self.usual, (x,))


def why_not(model: nn.Module, example: Tensor) -> str | None:
    """Return what keeps a network from being exported, in the words of torch's first line,
    and the line of code where it happens; None if nothing does.

    Raises
    ------
    ValueError : as ``exported``.
    """
    _check_example(example, 2)
    try:
        with _quietly():
            exported(model, example)
    except Exception as error:  # torch has a dozen kinds
        text = str(error)
        reason = next((line for line in text.splitlines() if line.strip()), "")
        _, _, raised = text.partition("The following call raised this error:")
        code = [line.strip() for line in raised.splitlines() if line.strip()][1:2]
        return f"{type(error).__name__}: {reason}" + "".join(f" | {c}" for c in code)
    return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the graph that torch logs, and prints, when it gives up."""
    was = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(was)


# --- The same answers -------------------------------------------------------------------------------------------------


def parity(
    engines: Mapping[str, Engine], x: Tensor, sizes: Sequence[int] = (1, 2, 7)
) -> pd.DataFrame:  # fmt: skip
    """Compare the answers of engines with those of the first, on the first examples of a
    batch.

    Parameters
    ----------
    sizes : how many examples; 1 and one that nothing was exported with should be among
        them.

    Returns
    -------
    A row for each engine but the first and each size: ``engine``, ``batch``, the largest
    ``difference`` of an output as a part of the largest output, and the share of examples
    with the ``same`` largest output. Where an engine fails both are NaN and ``failed``
    says why; elsewhere it is empty.

    Raises
    ------
    ValueError : there are fewer than two engines, or a size is not 1 to the examples of
        ``x``.
    """
    require("engines", [*engines], lambda names: len(names) > 1, "two engines or more")
    fits = all(1 <= size <= len(x) for size in sizes)
    require("sizes", tuple(sizes), lambda s: s and fits, f"numbers of 1 to {len(x)}")
    (_, first), *others = engines.items()
    rows = []
    for name, engine in others:
        for size in sizes:
            found = _apart(first.answer(x[:size]), engine, x[:size])
            rows.append((name, size, *found))
    return pd.DataFrame(rows, columns=["engine", "batch", "difference", "same", "failed"])


def _apart(wanted: Tensor, engine: Engine, x: Tensor) -> tuple[float, float, str]:
    try:
        y = engine.answer(x).to(wanted)
        if y.shape != wanted.shape:
            raise ValueError(f"gives {list(y.shape)}, the first engine {list(wanted.shape)}")
    except Exception as error:  # whatever an engine raises
        return float("nan"), float("nan"), (str(error).strip() or type(error).__name__).splitlines()[0]
    difference = (y - wanted).abs().max() / wanted.abs().max()
    same = (y.argmax(-1) == wanted.argmax(-1)).double().mean()
    return float(difference), float(same), ""


# --- What has to be installed -----------------------------------------------------------------------------------------


def installed_sizes(package: str) -> dict[str, int]:
    """Return the bytes of a package's files and of all that it needs, recursively, by name:
    the package first.

    What it needs only for an extra, or on other systems, is left out, and so is what is
    not installed; compiled Python (``__pycache__``) is not counted.

    Raises
    ------
    ValueError : the package is not installed.
    """
    found: dict[str, int] = {}
    waiting = [package]
    while waiting:
        name = waiting.pop(0)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            require("package", name, lambda n: n != package, "installed")
            continue
        if (known := canonical(distribution.name)) not in found:
            found[known] = own_size(distribution)
            waiting += needed(distribution)
    return found


def needed(distribution: metadata.Distribution) -> list[str]:
    """Return the names of what a package needs here, without extras."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in distribution.requires or ()]
    return [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def own_size(distribution: metadata.Distribution) -> int:
    """Return the bytes of a package's own files that are there."""
    listed = [file for file in distribution.files or () if "__pycache__" not in file.parts]
    paths = [Path(str(distribution.locate_file(file))) for file in listed]
    return sum(path.stat().st_size for path in paths if path.is_file())


def canonical(name: str) -> str:
    """Return a package's name as it is compared: ``Typing_Extensions`` is
    ``typing-extensions``.
    """
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


# --- What starting costs ----------------------------------------------------------------------------------------------

Launch = Callable[[list[str]], str]
"""``command -> what it prints``."""


def launched(command: list[str]) -> str:
    """Run a command; return what it prints.

    Raises
    ------
    RuntimeError : it failed; with the end of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that was to answer failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def cold_start(
    files: Mapping[str, str | Path], shape: Sequence[int], *,
    repeats: int = 1, threads: int = 1, launch: Launch = launched,
) -> pd.DataFrame:  # fmt: skip
    """Return how long it takes from a new process to an answer, the median of some starts.

    Parameters
    ----------
    files : by name; what runs them follows from the ending: ``.onnx`` ONNX Runtime,
        ``.pt2`` a graph of ``save_program``, ``.pt`` a whole network of ``torch.save``.
    shape : of the batch, ``[N, ...]``, float32.
    repeats : processes for each, in turns. The first ever reads its libraries from the
        disk, later ones from memory.
    launch : runs a command and returns what it prints.

    Returns
    -------
    A row for each: seconds of ``import``, ``load``, ``first`` answer and ``second``; and
    ``total``, the first three.

    Raises
    ------
    ValueError : an ending is none of the three, or a number below 1.
    RuntimeError : a process failed.
    """
    at_least(1, repeats=repeats, threads=threads)
    require("shape", tuple(shape), lambda s: s and min(s) >= 1, "numbers of at least 1, [N, ...]")
    commands = {name: start_command(path, shape, threads) for name, path in files.items()}
    runs: dict[str, list[list[float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append([float(word) for word in launch(command).split()])
    parts = ["import", "load", "first", "second"]
    rows = {name: [statistics.median(each) for each in zip(*run, strict=True)] for name, run in runs.items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=parts)
    table["total"] = table[parts[:3]].sum(axis=1)
    return table


def start_command(path: str | Path, shape: Sequence[int], threads: int = 1) -> list[str]:
    """Return the command that starts a process, answers twice and prints the seconds of each part.

    Raises
    ------
    ValueError : the file's ending is unknown.
    """
    ending = Path(path).suffix
    require("path", str(path), lambda _: ending in STARTS, f"a file that ends in {', '.join(STARTS)}")
    code = _CHILD.format(*(part.strip() for part in STARTS[ending]))
    return [sys.executable, "-c", code, str(path), str(threads), *map(str, shape)]


_CHILD = """
import sys, time
marks = [time.perf_counter()]
path, threads, *shape = sys.argv[1:]
threads, shape = int(threads), [int(size) for size in shape]
{}
marks.append(time.perf_counter())
{}
marks.append(time.perf_counter())
for _ in range(2):
    answer()
    marks.append(time.perf_counter())
print(*[b - a for a, b in zip(marks, marks[1:])])
"""

_WITH_TORCH = """
x = torch.zeros(shape)
def answer():
    with torch.no_grad():
        return model(x)
"""

STARTS: dict[str, tuple[str, str]] = {
    ".onnx": (
        "import numpy, onnxruntime",
        """
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
x = numpy.zeros(shape, dtype=numpy.float32)
def answer():
    return session.run(None, {session.get_inputs()[0].name: x})
""",
    ),
    ".pt2": ("import torch; torch.set_num_threads(threads)", "model = torch.export.load(path).module()" + _WITH_TORCH),
    ".pt": (
        "import torch; torch.set_num_threads(threads)",
        "model = torch.load(path, weights_only=False, map_location='cpu').eval()" + _WITH_TORCH,
    ),
}
"""By a file's ending: what a process imports, and how it loads the file and defines ``answer``."""
