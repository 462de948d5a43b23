"""Graphs against the networks that they came from, sizes of packages made by hand, processes that are played."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib.compression import engines
from course_lib.compression.engines import Engine
from course_lib.efficiency import deployment as d

SHAPE = (1, 8, 8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Two networks and a decision between them, so that each export has all there is to export."""
    torch.manual_seed(0)
    usual = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with torch.no_grad():
        usual(3 * normal(20, *SHAPE) + 1)  # statistics unlike those of a new network
    return d.Conditional(usual, other, 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployed")


@pytest.fixture(scope="module")
def path(model: nn.Module, folder: Path) -> Path:
    return d.save_program(d.exported(model, normal(3, *SHAPE)), folder / "net.pt2")


@pytest.fixture(scope="module")
def onnx_path(model: nn.Module, folder: Path) -> Path:
    return engines.export_onnx(model, normal(3, *SHAPE), folder / "net.onnx")


# --- A graph in a file ------------------------------------------------------------------------------------------------


def test_the_file_answers_as_the_network_does(model: nn.Module, path: Path) -> None:
    assert model.training, "the network is as it was"
    loaded, plain = d.program_engine(path), engines.torch_engine(model)
    for size in (1, 2, 3, 11):
        x = normal(size, *SHAPE, seed=size)
        torch.testing.assert_close(loaded.answer(x), plain.answer(x), rtol=1e-6, atol=1e-6)
    assert loaded.bytes == path.stat().st_size
    assert not loaded.answer(normal(2, *SHAPE)).requires_grad


def test_a_graph_of_one_size_takes_no_other() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.Dropout()).double()
    program = d.exported(layer, normal(1, 3).double(), dynamic=False)
    x = normal(2, 3).double()
    assert torch.equal(program.module()(x[:1]), layer[0](x[:1])), "in evaluation mode"
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(x)


# --- What is no graph -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))


@pytest.mark.parametrize("kind", [d.Branching, d.Conditional])
def test_a_batch_goes_the_way_that_it_should(kind: Any, parts: tuple[nn.Module, nn.Module]) -> None:
    usual, other = parts
    model = kind(usual, other, 1.5).eval()
    narrow = normal(50, 3)
    with torch.no_grad():
        assert torch.equal(model(narrow), usual(narrow))
        assert torch.equal(model(2 * narrow), other(2 * narrow))


def test_a_decision_in_python_is_no_graph(
    parts: tuple[nn.Module, nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    said = d.why_not(d.Branching(*parts), normal(4, 3))
    assert said is not None
    assert "data-dependent" in said
    assert said.endswith("| if x.std() > self.threshold:")
    assert "\n" not in said
    assert d.why_not(d.Conditional(*parts), normal(4, 3)) is None
    assert capfd.readouterr() == ("", "")


# --- The same answers -------------------------------------------------------------------------------------------------


def test_parity_by_hand() -> None:
    x = torch.tensor([[1.0, 4.0], [2.0, 0.0], [0.0, 1.0]])

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError(f"too many: {len(x)}\nand more")

    ways = {
        "first": Engine(lambda x: x, 1),
        "off": Engine(lambda x: x + torch.tensor([[0.0, 0.2], [-3.0, 0.0], [0.1, 0.0]])[: len(x)], 1),
        "other": Engine(lambda x: x.double() if len(x) == 1 else fails(x), 1),
    }
    table = d.parity(ways, x, sizes=[1, 3])
    assert [*table.columns] == ["engine", "batch", "difference", "same", "failed"]
    assert table["engine"].tolist() == ["off", "off", "other", "other"]
    assert table["batch"].tolist() == [1, 3, 1, 3]
    assert table["difference"].tolist()[:3] == pytest.approx([0.2 / 4, 3 / 4, 0])
    assert table["same"].tolist()[:3] == pytest.approx([1, 2 / 3, 1])
    assert math.isnan(table["difference"].tolist()[3])
    assert table["failed"].tolist() == ["", "", "", "too many: 3"]

    def silent(x: Tensor) -> Tensor:
        raise NotImplementedError

    ways = {"first": Engine(lambda x: x, 1), "one row": Engine(lambda x: x[:1], 1), "silent": Engine(silent, 1)}
    assert d.parity(ways, x, sizes=[3])["failed"].tolist() == ["gives [1, 2], the first engine [3, 2]",
                                                               "NotImplementedError"]  # fmt: skip


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_engines_agree_on_batches_never_seen(model: nn.Module, path: Path, onnx_path: Path, scale: float) -> None:
    """Whichever way the batch goes: the graphs were made from an example that goes one of them."""
    ways = {
        "torch": engines.torch_engine(model),
        "graph": d.program_engine(path),
        "onnx": engines.onnx_engine(onnx_path),
    }
    x = scale * normal(9, *SHAPE)
    assert isinstance(model, d.Conditional)
    taken = engines.torch_engine(model.other if scale > 1.5 else model.usual)
    assert torch.equal(ways["torch"].answer(x), taken.answer(x))
    table = d.parity(ways, x, sizes=[1, 3, 9])
    assert len(table) == 6
    assert (table["failed"] == "").all()
    assert (table["difference"] < 1e-5).all()
    assert (table["same"] == 1).all()


# --- What has to be installed -----------------------------------------------------------------------------------------


def install(site: Path, name: str, size: int, requires: list[str]) -> None:
    """A package as pip leaves it: its files, and what it says of itself."""
    package, info = site / name, site / f"{name}-1.0.dist-info"
    (package / "__pycache__").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_bytes(b"#" * size)
    (package / "__pycache__" / "__init__.pyc").write_bytes(b"x" * 1000)
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {each}" for each in requires)]
    (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    listed = [f"{name}/__init__.py", f"{name}/__pycache__/__init__.pyc", f"{name}/gone.py"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in listed))


def test_sizes_of_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "craft_a", 10, ["craft-b>=1", "craft_c; extra == 'more'", "craft_d; sys_platform == 'none'"])
    install(tmp_path, "craft_b", 200, ["Craft.A", "craft_e; python_version >= '3'", "craft_gone"])
    for name, size in (("craft_c", 3000), ("craft_d", 3000), ("craft_e", 7)):
        install(tmp_path, name, size, [])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert d.installed_sizes("craft_a") == {"craft-a": 10, "craft-b": 200, "craft-e": 7}
    assert [*d.installed_sizes("craft_b")] == ["craft-b", "craft-a", "craft-e"]


def test_sizes_of_real_packages() -> None:
    torch_, onnx = d.installed_sizes("torch"), d.installed_sizes("onnxruntime")
    assert {"torch", "sympy", "mpmath", "typing-extensions"} <= torch_.keys()
    assert {"onnxruntime", "numpy"} <= onnx.keys()
    assert "torch" not in onnx
    files = metadata.distribution("packaging").files or []
    paths = [Path(str(file.locate())) for file in files if "__pycache__" not in str(file)]
    assert d.installed_sizes("packaging")["packaging"] == sum(len(path.read_bytes()) for path in paths)


# --- What starting costs ----------------------------------------------------------------------------------------------


def test_starts_are_taken_in_turns_and_their_median() -> None:
    asked: list[str] = []
    replies = {"a.onnx": iter(["1 2 3 4", "10 20 30 40", "2 3 4 5"]), "b.pt2": iter(["5 6 7 8"] * 3)}

    def launch(command: list[str]) -> str:
        assert command[0] == sys.executable
        assert command[1] == "-c"
        assert command[4:] == ["2", "7", "1", "8"]
        asked.append(command[3])
        return next(replies[command[3]])

    table = d.cold_start({"x": "a.onnx", "y": "b.pt2"}, (7, 1, 8), repeats=3, threads=2, launch=launch)
    assert asked == ["a.onnx", "b.pt2"] * 3
    assert [*table.columns] == ["import", "load", "first", "second", "total"]
    assert table.to_numpy().tolist() == [[2, 3, 4, 5, 9], [5, 6, 7, 8, 18]]
    assert [*table.index] == ["x", "y"]


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    count = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(count)


@pytest.mark.parametrize("ending", d.STARTS)
def test_what_the_process_runs(
    ending: str, model: nn.Module, path: Path, onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, without a process: it answers twice, with what the network answers, and prints four numbers."""
    file = {".onnx": onnx_path, ".pt2": path, ".pt": path.with_suffix(".pt")}[ending]
    if ending == ".pt":
        torch.save(model, file)
    command = d.start_command(file, (2, *SHAPE))
    monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
    printed, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(printed), threads_kept():
        exec(command[2], names)
    times = [float(word) for word in printed.getvalue().split()]
    assert len(times) == 4
    assert min(times) >= 0
    (answer,) = names["answer"]() if ending == ".onnx" else (names["answer"](),)
    wanted = engines.torch_engine(model).answer(torch.zeros(2, *SHAPE))
    torch.testing.assert_close(torch.as_tensor(answer), wanted, rtol=1e-4, atol=1e-5)


def test_a_process_of_its_own(onnx_path: Path) -> None:
    table = d.cold_start({"onnx": onnx_path}, (1, *SHAPE))
    assert (table.to_numpy() > 0).all()
    with pytest.raises(RuntimeError, match="it says why"):
        d.launched([sys.executable, "-c", "raise SystemExit('it says why')"])


def test_bad_input_is_named(model: nn.Module) -> None:
    engine, x = Engine(torch.sin, 1), normal(3, *SHAPE)
    two = {"a": engine, "b": engine}
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("example=(1, 1, 8, 8): must be a batch [N, ...] of N >= 2", lambda: d.exported(model, x[:1])),
        ("example=(0, 1, 8, 8): must be", lambda: d.exported(model, x[:0], dynamic=False)),
        ("example=(1, 1, 8, 8): must be", lambda: d.why_not(model, x[:1])),
        ("must be a name that ends in .pt2", lambda: d.save_program(None, "net.pt")),  # type: ignore[arg-type]
        ("engines=['a']: must be two", lambda: d.parity({"a": engine}, x)),
        ("sizes=(4,): must be numbers of 1 to 3", lambda: d.parity(two, x, [4])),
        ("sizes=(): must be", lambda: d.parity(two, x, [])),
        ("package='no-such-package': must be installed", lambda: d.installed_sizes("no-such-package")),
        ("path='a.h5': must be a file that ends in .onnx", lambda: d.cold_start({"a": "a.h5"}, (1,))),
        ("repeats=0: must be", lambda: d.cold_start({"a": "a.pt2"}, (1,), repeats=0)),
        ("shape=(0, 1): must be", lambda: d.cold_start({"a": "a.pt2"}, (0, 1))),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu(emulated=False)
def test_on_a_gpu(model: nn.Module) -> None:
    x = normal(3, *SHAPE).cuda()
    program = d.exported(model.cuda(), x)
    wanted = engines.torch_engine(model).answer(x[:2])
    model.cpu()
    torch.testing.assert_close(program.module()(x[:2]), wanted, rtol=1e-5, atol=1e-5)
