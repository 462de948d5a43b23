"""The mend lets torchvision be imported beside a CPU-only torch, and is applied only when that is needed.

Each case runs in a process of its own: operators once defined stay defined, and what is imported stays imported.
"""

import importlib.machinery
import importlib.metadata
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from course_lib._torchvision_mend import non_maximum_suppression

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def in_new_process(code: str, *, path: Path | None = None) -> Any:
    """Run ``code`` in a fresh interpreter, ``path`` first on its search path; what its last line prints, as JSON."""
    prelude = f"import sys\nsys.path.insert(0, {str(path)!r})\n" if path is not None else ""
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fake_torchvision(folder: Path, *, with_extension: bool) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("imported = True\n")
    if with_extension:
        (package / f"_C{SUFFIX}").touch()
    return folder


def test_torchvision_works_after_course_lib() -> None:
    found = in_new_process(
        """
        import json, course_lib, torch, torchvision
        from torchvision import datasets, utils
        from torchvision.transforms import v2
        logits = torchvision.models.resnet18(num_classes=5).eval()(torch.zeros(1, 3, 32, 32))
        flipped = v2.RandomHorizontalFlip(p=1.0)(torch.arange(3.0).view(1, 1, 3))
        grid = utils.make_grid(torch.zeros(4, 3, 8, 8), nrow=2, padding=2)
        print(json.dumps([list(logits.shape), flipped.flatten().tolist(), list(grid.shape), datasets.MNIST.__name__]))
        """
    )
    assert found == [[1, 5], [2.0, 1.0, 0.0], [3, 22, 22], "MNIST"]


def test_is_applied_exactly_where_torchvision_alone_fails() -> None:
    """The real environment, whichever it is: a CPU-only torch needs the mend, one with CUDA does not."""
    alone = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=120)
    applied = in_new_process(
        """
        import json
        from course_lib import _torchvision_mend
        print(json.dumps(len(_torchvision_mend._keep_alive)))
        """
    )
    assert bool(applied) == (alone.returncode != 0), alone.stderr


def test_defines_both_operators_when_the_extension_does_not_load(tmp_path: Path) -> None:
    folder = fake_torchvision(tmp_path, with_extension=True)  # an empty file is no library
    found = in_new_process(
        """
        import json, course_lib, torch
        from course_lib._torchvision_mend import apply_if_needed, _keep_alive
        defined = [hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")]
        print(json.dumps([defined, len(_keep_alive), apply_if_needed(), len(_keep_alive)]))
        """,
        path=folder,
    )
    assert found == [[True, True], 1, False, 1], "mended once, and not again"


def test_does_nothing_when_the_extension_loads(tmp_path: Path) -> None:
    folder = fake_torchvision(tmp_path, with_extension=True)
    found = in_new_process(
        """
        import json, torch
        loaded = []
        torch.ops.load_library = loaded.append  # a machine on which the extension loads
        import course_lib
        defined = [hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")]
        print(json.dumps([loaded, defined, course_lib._torchvision_mend._keep_alive, "torchvision" in sys.modules]))
        """,
        path=folder,
    )
    assert found == [[str(folder / "torchvision" / f"_C{SUFFIX}")], [False, False], [], False]


def test_does_nothing_when_the_operators_exist(tmp_path: Path) -> None:
    folder = fake_torchvision(tmp_path, with_extension=True)
    found = in_new_process(
        """
        import json, torch
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a) -> Tensor")
        import course_lib
        schema = str(torch.ops.torchvision.nms.default._schema)
        print(json.dumps([schema, course_lib._torchvision_mend._keep_alive]))
        """,
        path=folder,
    )
    assert found == ["torchvision::nms(Tensor a) -> Tensor", []]


def test_does_nothing_when_torchvision_is_imported_already(tmp_path: Path) -> None:
    found = in_new_process(
        """
        import json, torchvision, torch, course_lib
        print(json.dumps([hasattr(torch.ops.torchvision, "nms"), torchvision.imported]))
        """,
        path=fake_torchvision(tmp_path, with_extension=False),
    )
    assert found == [False, True]


def test_does_nothing_without_torchvision() -> None:
    found = in_new_process(
        """
        import importlib.util, json, torch
        importlib.util.find_spec = lambda name: None
        import course_lib
        print(json.dumps([hasattr(torch.ops.torchvision, "nms"), course_lib._torchvision_mend.apply_if_needed()]))
        """
    )
    assert found == [False, False]


def test_nms_keeps_the_best_of_boxes_that_overlap() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 10, 5], [50, 50, 50, 50]]).float()
    scores = torch.tensor([0.8, 0.9, 0.1, 0.7, 0.05])
    # by hand: box 1 is the best; box 0 shares 80 of 100 with it (0.8), box 3 shares 50 of 80 (0.625), the rest nothing
    assert non_maximum_suppression(boxes, scores, 0.7).tolist() == [1, 3, 2, 4]
    assert non_maximum_suppression(boxes, scores, 0.5).tolist() == [1, 2, 4]
    assert non_maximum_suppression(boxes, scores, 0.9).tolist() == [1, 0, 3, 2, 4]
    assert non_maximum_suppression(boxes[:0], scores[:0], 0.5).tolist() == []


@pytest.mark.skipif(
    "+cpu" not in torch.__version__ and torch.version.cuda is None, reason="torchvision's own nms is there to be used"
)
def test_nms_is_what_the_operator_computes() -> None:
    torch.manual_seed(0)
    boxes, scores = torch.rand(30, 2).repeat(1, 2), torch.rand(30)
    boxes[:, 2:] += torch.rand(30, 2)
    operator = torch.ops.torchvision.nms(boxes, scores, 0.3)
    assert operator.tolist() == non_maximum_suppression(boxes, scores, 0.3).tolist()
    assert operator.dtype == torch.int64
