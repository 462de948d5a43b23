"""Data sets, splits, batches, downloads and folders: on real files where there are some, and on tiny ones always.

Only the network is played: a server on this machine serves tiny files in the formats of the real ones, and
torchvision's addresses and md5 sums are pointed at them. Its download code runs as it is.
"""

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.lab import data as lab_data
from course_lib.lab.data import DataDamaged, DataUnavailable, Split, batches, downloads, folders, load, random_shift
from course_lib.lab.data.dataset import channel_statistics
from course_lib.lab.data.resizing import resize
from course_lib.lab.data.splits import stratified_order
from course_lib.lab.models import convnet, freeze, mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh

CHECKOUT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("COURSE_SHARED", CHECKOUT.parent / "shared")) / "data"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(*image_tensors):
    """The images as a sorted list of byte strings: equal lists hold the same images, each as often."""
    return sorted(row.tobytes() for images in image_tensors for row in images.numpy())


def parts(data):
    return data.train, data.val, data.test


# --- Splits -----------------------------------------------------------------------------------------------------------


UNEQUAL = torch.tensor([0] * 400 + [1] * 150 + [2] * 40 + [3] * 10)[torch.randperm(600, generator=seeded(9))]


def test_stratified_order_is_a_permutation_whose_every_beginning_is_balanced():
    order = stratified_order(UNEQUAL, seed=1)
    assert sorted(order.tolist()) == list(range(600))
    ordered = torch.nn.functional.one_hot(UNEQUAL[order]).cumsum(0)
    assert (ordered[3] == 1).all()  # one of each class first
    fair = torch.arange(1, 601)[:, None] * UNEQUAL.bincount() / 600
    assert ((ordered - fair).abs() <= 2).all()
    assert ((ordered - fair)[60:].abs() <= 1.2).all()  # when even the rarest class is due its first


def test_stratified_order_is_decided_by_its_seed():
    assert torch.equal(stratified_order(UNEQUAL, 1), stratified_order(UNEQUAL, 1))
    assert not torch.equal(stratified_order(UNEQUAL, 1), stratified_order(UNEQUAL, 2))


def test_digits_splits_are_disjoint_balanced_and_complete():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert [len(part) for part in parts(data)] == [1000, 397, 400]
    assert data.input_shape == (1, 8, 8)
    original = load_digits()
    scaled = torch.tensor(np.rint(original.images * 255 / 16), dtype=torch.uint8).unsqueeze(1)
    # All 1,797 images differ, so the same images once each means: no image stands in two splits, and none is missing.
    assert len(set(rows_of(scaled))) == 1797
    assert rows_of(*(part.images for part in parts(data))) == rows_of(scaled)
    label_of = {image.tobytes(): label for image, label in zip(scaled.numpy(), original.target, strict=True)}
    share = np.bincount(original.target) / 1797
    for part in parts(data):
        assert [label_of[image.tobytes()] for image in part.images.numpy()] == part.labels.tolist()
        assert (abs(part.labels.bincount().numpy() - share * len(part)) <= 2).all()


def test_digits_splits_never_change():
    """The stored outputs of every notebook hang on these very splits."""
    drawn = hashlib.sha256(b"".join(part.images.numpy().tobytes() for part in parts(load("digits")))).hexdigest()
    assert drawn[:16] == "649a31f1ad63b3c6"
    for seed in (1, 2):
        other = load("digits", seed=seed)
        assert all(torch.equal(a.images, b.images) for a, b in zip(parts(other), parts(load("digits")), strict=True))


def test_train_size_is_balanced_nested_and_decided_by_the_seed():
    full = load("digits")
    few, more, other = (load("digits", train_size=n, seed=s) for n, s in [(50, 1), (200, 1), (50, 2)])
    assert len(few.train) == 50
    assert few.train.labels.bincount().tolist() == [5] * 10
    few_rows, more_rows, full_rows = (set(rows_of(d.train.images)) for d in (few, more, full))
    assert few_rows < more_rows < full_rows
    assert few_rows != set(rows_of(other.train.images))
    for part in ("val", "test"):
        assert torch.equal(getattr(few, part).images, getattr(full, part).images)
    assert few.train.mean == few.test.mean == channel_statistics(few.train.images)[0]


@pytest.mark.parametrize("train_size", [10, 1000])
def test_train_size_at_its_ends(train_size):
    data = load("digits", train_size=train_size)
    assert len(data.train) == train_size
    assert (data.train.labels.bincount(minlength=10) >= 1).all()


def test_glyph_splits():
    data = load("glyphs", count=600, size=16)
    assert [len(part) for part in parts(data)] == [400, 100, 100]
    assert len(set(rows_of(*(part.images for part in parts(data))))) == 600
    for part in parts(data):
        counts = part.labels.bincount(minlength=36)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(load("glyphs", count=600, size=16).train.images, data.train.images)
    assert not torch.equal(load("glyphs", count=600, size=16, seed=1).train.images, data.train.images)
    assert load("glyphs", count=600, size=16, domain="colour").input_shape == (3, 16, 16)


def test_size_resizes_every_split_smoothly():
    data = load("digits", size=16)
    assert {tuple(part.images.shape[1:]) for part in parts(data)} == {(1, 16, 16)}
    # The reference: PIL's own bilinear filter, which also widens when shrinking.
    image = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8, generator=seeded())
    for size in (9, 40):
        reference = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)
        apart = resize(image, size)[0].permute(1, 2, 0).int() - torch.tensor(np.array(reference)).int()
        assert apart.abs().max() <= 1


def test_a_data_set_says_what_it_is():
    assert repr(load("digits")) == "digits: images 1×8×8, 10 classes; train 1,000, val 397, test 400; on cpu"
    assert repr(load("digits").val) == "Split(397 images 1×8×8, on cpu)"
    moved = load("digits").to("meta")
    assert {part.device.type for part in parts(moved)} == {"meta"}


# --- Bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("minst", "mnist"), ("digit", "digits"), ("fashion-mnist", "fashion_mnist"), ("CIFAR10", "cifar10")],
)
def test_an_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"name is '{name}'.*'folder:PATH'\. Did you mean '{nearest}'\?"):
        load(name)


def test_a_name_near_nothing_lists_them_all():
    with pytest.raises(
        ValueError,
        match=r"'digits', 'glyphs', 'wine', 'breast_cancer', 'mnist', 'fashion_mnist', 'cifar10' and 'folder:PATH'\.$",
    ):
        load("xyzzy")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digits", {"train_size": 0}, "train_size is 0"),
        ("digits", {"train_size": 9}, r"train_size is 9; it must be 10 .* to 1000"),
        ("digits", {"train_size": 1001}, "train_size is 1001"),
        ("digits", {"train_size": 0.5}, "train_size is 0.5; it must be a whole number"),
        ("digits", {"size": 3}, "size is 3; it must be 4 to 512"),
        ("digits", {"seed": -1}, "seed is -1"),
        ("digits", {"difficulty": 0.5}, "difficulty is for load\\('glyphs'\\) only"),
        ("glyphs", {"size": 8}, "size is 8; glyphs are drawn at 16 to 64"),
        ("glyphs", {"val_size": 35}, "val_size is 35; it must be a whole number, at least 36: one image a class"),
        ("glyphs", {"test_size": 2.5}, "test_size is 2.5; it must be a whole number"),
        ("digits", {"test_size": 50}, "test_size is for load..glyphs.. only, not for 'digits'"),
        ("glyphs", {"count": 100}, "count is 100; it must be at least 216"),
        ("glyphs", {"domain": "neon"}, "domain is 'neon'.*'chalk'"),
        ("wine", {"size": 16}, "size is 16; it is for images, and 'wine' is a table"),
        ("wine", {"train_size": 107}, "train_size is 107; it must be 3 .* to 106"),
        ("folder:", {}, "without a path"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(name, **arguments)


# --- Batches ----------------------------------------------------------------------------------------------------------


def numbered(count=10, channels=2, side=4):
    """Image i has the value i in all its pixels of channel 0."""
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=seeded())
    images[:, 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return Split(images, torch.arange(count), *channel_statistics(images))


def test_batches_in_order_are_the_whole_split_normalised():
    split = numbered()
    x, y = (torch.cat(pieces) for pieces in zip(*batches(split, 4), strict=True))
    assert torch.equal(y, split.labels)
    pixels = split.images.double() / 255
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(x.double(), (pixels - mean) / std, rtol=0, atol=1e-5)
    assert torch.equal(x, lab_data.normalise(split.images, split))


def test_val_and_test_are_normalised_with_the_figures_of_train():
    data = load("digits")
    assert data.train.mean == data.val.mean == data.test.mean
    x, _ = next(batches(data.train, 1000))
    assert abs(x.mean()) < 1e-4
    assert x.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_shuffled_batches_hold_each_example_once_in_an_order_decided_by_the_seed():
    split = numbered(100)
    orders = [torch.cat([y for _, y in batches(split, 32, generator=seeded(s))]).tolist() for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(100))
    assert orders[0] != list(range(100))
    for x, y in batches(split, 32, generator=seeded()):  # images and labels stay together
        assert torch.equal(x, lab_data.normalise(split.images[y], split))


def test_each_pass_is_shuffled_anew():
    split, generator = numbered(50), seeded()
    first, second = ([y.tolist() for _, y in batches(split, 50, generator=generator)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_last_batch(drop_last, sizes):
    assert [len(y) for _, y in batches(numbered(), 4, drop_last=drop_last)] == sizes
    assert [len(y) for _, y in batches(numbered(), 4, drop_last=drop_last, generator=seeded())] == sizes


def test_batches_in_bfloat16():
    x, _ = next(batches(numbered(), 4, dtype=torch.bfloat16, generator=seeded(), augment=random_shift))
    assert x.dtype == torch.bfloat16


def test_augment_gets_each_whole_batch_and_the_generator():
    seen, generator = [], seeded()

    def flip_sign(x, given):
        assert given is generator
        seen.append(len(x))
        return -x

    split = numbered()
    x, _ = zip(*batches(split, 4, generator=generator, augment=flip_sign), strict=True)
    plain, _ = zip(*batches(split, 4, generator=seeded()), strict=True)
    assert seen == [4, 4, 2]
    assert torch.equal(torch.cat(x), -torch.cat(plain))


def test_a_constant_channel_is_not_divided_by_zero():
    images = torch.full((6, 2, 4, 4), 7, dtype=torch.uint8)
    images[:3, 1] = 200
    mean, std = channel_statistics(images)
    assert std[0] == 1
    x, _ = next(batches(Split(images, torch.zeros(6, dtype=torch.long), mean, std), 6))
    assert torch.isfinite(x).all()
    assert x[:, 0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
        ({"batch_size": 4, "augment": random_shift}, "augment needs generator"),
        (
            {"batch_size": 4, "generator": seeded(), "augment": lambda x, y, generator, alpha: (x, y)},
            r"augment takes \(x, y, generator, alpha\); it must take \(x, generator\) or \(x, y, generator\)",
        ),
    ],
)
def test_bad_batches_are_refused_at_the_call(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(numbered(), **arguments)


@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_random_shift_is_what_one_image_at_a_time_gives(pixels):
    x = torch.randn(40, 3, 5, 7, generator=seeded(1))
    shifted = random_shift(x, seeded(2), pixels)
    down, right = torch.randint(0, 2 * pixels + 1, (2, 40), generator=seeded(2)).tolist()
    for image, result, top, left in zip(x, shifted, down, right, strict=True):
        canvas = torch.zeros(3, 5 + 2 * pixels, 7 + 2 * pixels)
        canvas[:, pixels : pixels + 5, pixels : pixels + 7] = image
        assert torch.equal(result, canvas[:, top : top + 5, left : left + 7])
    if pixels:
        assert set(down) == set(right) == set(range(2 * pixels + 1))  # both ways, and none


def test_random_shift_keeps_type_and_input():
    x = torch.randn(4, 1, 6, 6, generator=seeded(), dtype=torch.float32)
    before = x.clone()
    assert random_shift(x.bfloat16(), seeded()).dtype == torch.bfloat16
    random_shift(x, seeded()).zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("pixels", [-1, 4])
def test_random_shift_refuses_what_leaves_nothing(pixels):
    with pytest.raises(ValueError, match=f"pixels is {pixels}; it must be between 0 and 3"):
        random_shift(torch.zeros(1, 1, 4, 9), seeded(), pixels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_batches():
    data = load("digits")
    on_cpu = batches(data.train, 64, generator=seeded(), augment=random_shift)
    on_gpu = batches(data.to("cuda").train, 64, generator=seeded(), augment=random_shift)
    for (x, y), (gx, gy) in zip(on_cpu, on_gpu, strict=True):
        assert gx.is_cuda
        assert gy.is_cuda
        assert torch.equal(y, gy.cpu())
        torch.testing.assert_close(x, gx.cpu(), rtol=0, atol=1e-6)


# --- A small internet -------------------------------------------------------------------------------------------------


class Mirror:
    """Serves ``files`` (path -> bytes) on this machine; ``stall_after`` bytes of ``stalls`` it stops sending."""

    def __init__(self):
        self.files, self.asked, self.stalls, self.stalled = {}, [], None, threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.asked.append(self.path)
                body = mirror.files.get(self.path.lstrip("/"))
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                # A download asks twice (probe and redirect check read no body): only what is read can stall a reader.
                if mirror.stalls and self.path.endswith(mirror.stalls):
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    mirror.stalled.set()
                    time.sleep(20)
                else:
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def idx(array):
    """The IDX format of MNIST: two zero bytes, type (8: uint8), dimensions, their lengths, the data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def tiny_mnist():
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (60, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(60) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(20) % 10,
    }


def write_raw(folder, arrays=None, dataset="MNIST"):
    raw = folder / dataset / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, array in (arrays or tiny_mnist()).items():
        (raw / name).write_bytes(idx(array))
    return raw


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def mirror(monkeypatch):
    """torchvision's addresses and sums of MNIST point at tiny files on this machine."""
    from torchvision.datasets import MNIST

    server = Mirror()
    server.files = {f"{name}.gz": gzip.compress(idx(array), mtime=0) for name, array in tiny_mnist().items()}
    monkeypatch.setattr(MNIST, "mirrors", [server.url])
    monkeypatch.setattr(MNIST, "resources", [(name, md5(body)) for name, body in server.files.items()])
    yield server
    server.close()


def left_behind(folder):
    """Everything in the data folder but locks and finished data sets."""
    return [p.name for p in folder.iterdir() if not p.name.startswith(".lock-") and p.name not in ("MNIST", "cache")]


def assert_is_tiny_mnist(data):
    arrays = tiny_mnist()
    assert [len(part) for part in parts(data)] == [50, 10, 20]
    assert data.train.labels.bincount().tolist() == [5] * 10
    assert data.val.labels.bincount().tolist() == [1] * 10
    assert np.array_equal(data.test.images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    official = torch.tensor(arrays["train-images-idx3-ubyte"], dtype=torch.uint8)[:, None]
    assert rows_of(data.train.images, data.val.images) == rows_of(official)


@pytest.mark.parametrize(("name", "dataset"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_files_in_torchvisions_layout_are_used_as_they_are(tmp_path, name, dataset, monkeypatch):
    monkeypatch.setattr(downloads, "_download", lambda *_: pytest.fail("nothing is to be downloaded"))
    write_raw(tmp_path, dataset=dataset)
    data = load(name, folder=tmp_path)
    assert_is_tiny_mnist(data)
    assert len(data.classes) == 10
    assert load(name, folder=tmp_path, size=14).input_shape == (1, 14, 14)


def test_a_data_folder_that_may_not_be_written_is_read(tmp_path):
    write_raw(tmp_path)
    tmp_path.chmod(0o555)
    try:
        assert_is_tiny_mnist(load("mnist", folder=tmp_path))
        assert [p.name for p in tmp_path.iterdir()] == ["MNIST"]
    finally:
        tmp_path.chmod(0o755)


def test_a_download_is_complete_tidy_and_happens_once(tmp_path, mirror):
    folder = tmp_path / "not" / "yet"
    assert_is_tiny_mnist(load("mnist", folder=folder))
    assert sorted(p.name for p in (folder / "MNIST" / "raw").iterdir()) == sorted(tiny_mnist())
    assert left_behind(folder) == []
    mirror.close()
    assert_is_tiny_mnist(load("mnist", folder=folder))


def test_the_second_mirror_helps_when_the_first_is_gone(tmp_path, mirror, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", mirror.url])
    assert_is_tiny_mnist(load("mnist", folder=tmp_path))


def test_loads_at_the_same_time_download_once(tmp_path, mirror):
    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(lambda _: load("mnist", folder=tmp_path), range(4)):
            assert_is_tiny_mnist(data)
    # torchvision asks for a file twice (where does it redirect to, then the file); the first is also our probe.
    last = "/t10k-labels-idx1-ubyte.gz"
    assert mirror.asked.count(last) == 2
    assert left_behind(tmp_path) == []


def test_what_fails_its_md5_is_not_kept(tmp_path, mirror):
    good = mirror.files["t10k-images-idx3-ubyte.gz"]
    mirror.files["t10k-images-idx3-ubyte.gz"] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(DataUnavailable, match=r"t10k-images-idx3-ubyte\.gz"):
        load("mnist", folder=tmp_path)
    assert not (tmp_path / "MNIST").exists()
    assert left_behind(tmp_path) == []


def test_archives_brought_by_hand_need_no_network(tmp_path, mirror):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, body in mirror.files.items():
        (raw / name).write_bytes(body)
    mirror.close()
    assert_is_tiny_mnist(load("mnist", folder=tmp_path))


def test_an_incomplete_folder_is_completed(tmp_path, mirror):
    raw = write_raw(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    assert_is_tiny_mnist(load("mnist", folder=tmp_path))
    assert left_behind(tmp_path) == []


CHILD = """
import json, os, sys, time
import course_lib
from torchvision.datasets import MNIST
from course_lib.lab.data import files, load
MNIST.mirrors, MNIST.resources = json.loads(sys.argv[2])
if sys.argv[3] != "receiving":
    replace, count = os.replace, [0]
    def slow(*paths):
        count[0] += 1
        if count[0] == int(sys.argv[3]):
            open(sys.argv[4], "w").close()
            time.sleep(60)
        replace(*paths)
    files.os.replace = slow
load("mnist", folder=sys.argv[1])
"""


@pytest.mark.parametrize("moment", ["receiving", "moving the old away", "moving the new in"])
def test_a_download_that_is_killed_leaves_nothing_half_made(tmp_path, mirror, moment):
    from torchvision.datasets import MNIST

    folder, marker = tmp_path / "data", tmp_path / "marker"
    steps = {"receiving": "receiving", "moving the old away": "1", "moving the new in": "2"}
    if moment == "receiving":
        mirror.stalls = "t10k-images-idx3-ubyte.gz"
    else:
        (write_raw(folder) / "t10k-labels-idx1-ubyte").unlink()  # an incomplete old one is to make way
    arguments = [str(folder), json.dumps([MNIST.mirrors, MNIST.resources]), steps[moment], str(marker)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        half = folder / ".partial-mnist" / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
        waited_for = half if moment == "receiving" else marker
        give_up = time.monotonic() + 60
        while not waited_for.exists():
            assert child.poll() is None, "the child ended before it could be killed"
            assert time.monotonic() < give_up
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert (folder / ".partial-mnist").exists()  # it was indeed killed in the middle
    complete = [name for name in tiny_mnist() if (folder / "MNIST" / "raw" / name).exists()]
    assert len(complete) < 4
    mirror.stalls = None
    assert_is_tiny_mnist(load("mnist", folder=folder))
    assert left_behind(folder) == []


def test_nothing_is_built_on_what_a_killed_download_left(tmp_path, mirror):
    """Killed while it unpacked the last file: all four names are there, and torchvision asks for no more than that."""
    raw = write_raw(tmp_path / ".partial-mnist")
    last = raw / "t10k-labels-idx1-ubyte"
    last.write_bytes(last.read_bytes()[:12])
    assert_is_tiny_mnist(load("mnist", folder=tmp_path))
    assert left_behind(tmp_path) == []


# --- No network, damage -----------------------------------------------------------------------------------------------


def test_no_network_says_what_is_missing_where_and_what_works_without(tmp_path, mirror):
    mirror.close()
    with pytest.raises(DataUnavailable) as caught:
        load("mnist", folder=tmp_path)
    message = str(caught.value)
    for needed in ("'mnist'", str(tmp_path), "12 MB", "127.0.0.1", "refused", "load('digits')", "load('glyphs')"):
        assert needed in message
    assert left_behind(tmp_path) == []


def test_a_network_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(downloads, "ANSWER_WITHIN", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        with pytest.raises(DataUnavailable, match=r"no answer within|timed out"):
            load("mnist", folder=tmp_path)


def test_the_timeout_of_the_process_is_put_back(tmp_path, mirror):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(123)
    try:
        load("mnist", folder=tmp_path)
        assert socket.getdefaulttimeout() == 123
    finally:
        socket.setdefaulttimeout(before)


def cut_short(content):
    return content[:-100]


def other_magic(content):
    return b"\xff\xff" + content[2:]


def emptied(content):
    return b""


def label_ten(content):
    return content[:-1] + b"\x0a"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-images-idx3-ubyte", cut_short),
        ("train-images-idx3-ubyte", other_magic),
        ("t10k-images-idx3-ubyte", emptied),
        ("t10k-labels-idx1-ubyte", label_ten),
        ("train-labels-idx1-ubyte", other_magic),
    ],
)
def test_a_damaged_file_is_named_and_mended_as_the_error_says(tmp_path, mirror, file, damage):
    damaged = write_raw(tmp_path) / file
    damaged.write_bytes(damage(damaged.read_bytes()))
    with pytest.raises(DataDamaged) as caught:
        load("mnist", folder=tmp_path)
    assert str(damaged) in str(caught.value)
    assert "delete it and load again" in str(caught.value)
    damaged.unlink()
    assert_is_tiny_mnist(load("mnist", folder=tmp_path))


def test_labels_that_do_not_match_the_images_are_damage(tmp_path):
    raw = write_raw(tmp_path, tiny_mnist() | {"t10k-labels-idx1-ubyte": np.arange(19) % 10})
    with pytest.raises(DataDamaged, match=r"t10k-labels-idx1-ubyte is damaged \(19 labels for 20 images\)"):
        load("mnist", folder=tmp_path)
    assert raw.exists()


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar_mirror(monkeypatch):
    """A tiny archive in CIFAR-10's format: five training batches of 20 images, one test batch, the names."""
    from torchvision.datasets import CIFAR10

    rng, content = np.random.default_rng(0), {}
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        content[name] = pickle.dumps(batch)
    content["batches.meta"] = pickle.dumps({"label_names": list(downloads.REAL["cifar10"].classes)})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, body in content.items():
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    server = Mirror()
    server.files, server.content = {"cifar.tar.gz": packed.getvalue()}, content
    monkeypatch.setattr(CIFAR10, "url", server.url + "cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(packed.getvalue()))
    for lists in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, lists, [[name, md5(content[name])] for name, _ in getattr(CIFAR10, lists)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(content["batches.meta"])})
    yield server
    server.close()


def test_cifar10_is_downloaded_unpacked_and_read(tmp_path, cifar_mirror):
    from torchvision.datasets import CIFAR10

    data = load("cifar10", folder=tmp_path)
    assert [len(part) for part in parts(data)] == [90, 10, 20]
    assert data.input_shape == (3, 32, 32)
    assert data.val.labels.bincount().tolist() == [1] * 10
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock-cifar10", "cifar-10-batches-py"]
    reference = CIFAR10(tmp_path, train=False)  # torchvision reads the same folder, pixel for pixel the same
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), reference.data)
    assert data.test.labels.tolist() == reference.targets
    assert list(data.classes) == reference.classes
    official = torch.tensor(CIFAR10(tmp_path, train=True).data).permute(0, 3, 1, 2)
    assert rows_of(data.train.images, data.val.images) == rows_of(official.contiguous())


def test_a_damaged_cifar10_batch_is_named_before_it_is_unpickled(tmp_path, cifar_mirror, monkeypatch):
    load("cifar10", folder=tmp_path)
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    body = bytearray(damaged.read_bytes())
    body[len(body) // 2] ^= 1
    damaged.write_bytes(body)
    with pytest.raises(DataDamaged, match="data_batch_3 is damaged"):
        load("cifar10", folder=tmp_path)
    damaged.unlink()
    assert len(load("cifar10", folder=tmp_path).train) == 90


# --- Folders of images ------------------------------------------------------------------------------------------------


def picture(value, mode="RGB", size=(6, 5)):
    pixels = np.full((*size, 3), value, np.uint8) + np.arange(3, dtype=np.uint8) * 40
    pixels[0, 0] = 9
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def pets(tmp_path):
    """12 training and 4 test pictures of two classes, 6 rows of 5 pixels."""
    for part, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(10 * i + 5 * c + 100 * (part == "test")).save(folder / f"{i}.png")
    return tmp_path / "pets"


def load_pets(pets, **arguments):
    return load(f"folder:{pets}", folder=pets.parent / "data", **arguments)


def test_a_folder_is_read_in_splits(pets):
    data = load_pets(pets)
    assert [len(part) for part in parts(data)] == [10, 2, 4]
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 6, 5)
    assert data.val.labels.bincount().tolist() == [1, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    expected = torch.tensor(np.array(picture(100))).permute(2, 0, 1)
    assert torch.equal(data.test.images[0], expected)
    assert len(set(rows_of(*(part.images for part in parts(data))))) == 16


def test_a_relative_folder_is_found(pets, monkeypatch):
    monkeypatch.chdir(pets.parent)
    assert len(load("folder:pets", folder=pets.parent / "data").test) == 4


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(folders, "_read_picture", lambda file: pytest.fail(f"{file} was decoded again"))


def test_the_second_read_comes_from_one_file(pets, monkeypatch):
    first = load_pets(pets)
    assert [p.suffix for p in (pets.parent / "data" / "cache").iterdir() if not p.name.startswith(".")] == [".npz"]
    forbid_decoding(monkeypatch)
    second = load_pets(pets)
    assert second.classes == first.classes
    for a, b in zip(parts(first), parts(second), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("change", ["pixels", "added", "removed", "renamed"])
def test_a_changed_folder_is_read_again(pets, change):
    file = pets / "test" / "dog" / "1.png"
    picture(7).save(file, format="BMP")  # not compressed: other pixels, same size
    before = load_pets(pets)
    if change == "pixels":
        size, stamp = file.stat().st_size, file.stat().st_mtime_ns
        picture(250).save(file, format="BMP")
        os.utime(file, ns=(stamp + 1, stamp + 1))
        assert file.stat().st_size == size
    elif change == "added":
        picture(251).save(file.with_name("2.png"))
    elif change == "removed":
        file.unlink()
    else:
        file.rename(pets / "test" / "cat" / "2.png")
    after = load_pets(pets)
    assert not (
        torch.equal(before.test.images, after.test.images) and torch.equal(before.test.labels, after.test.labels)
    )
    assert len(after.test) == {"added": 5, "removed": 3}.get(change, 4)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "emptied", "other content"])
def test_a_damaged_cache_is_rebuilt(pets, damage, monkeypatch):
    first = load_pets(pets)
    (cache,) = (pets.parent / "data" / "cache").glob("*.npz")
    body = bytearray(cache.read_bytes())
    if damage == "one bit":
        at = body.index(first.test.images.numpy().tobytes()) + 20
        body[at] ^= 1
    cache.write_bytes({"cut short": body[:-50], "one bit": body, "emptied": b"", "other content": b"hello"}[damage])
    assert torch.equal(load_pets(pets).test.images, first.test.images)
    forbid_decoding(monkeypatch)
    load_pets(pets)


def test_a_cache_that_cannot_be_written_only_warns(pets):
    (pets.parent / "data").write_text("a file where the data folder should be")
    with pytest.warns(UserWarning, match="could not be written"):
        assert len(load_pets(pets).test) == 4


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGBA", 3), ("P", 3)])
def test_grey_stays_grey_and_all_else_is_rgb(pets, mode, channels):
    for file in pets.rglob("*.png"):
        picture(120, mode).save(file)
    assert load_pets(pets).input_shape == (channels, 6, 5)


def test_sixteen_bit_grey_keeps_its_brightness(pets):
    for file in pets.rglob("*.png"):
        Image.fromarray(np.full((6, 5), 0x8040, np.uint16)).save(file)
    data = load_pets(pets)
    assert data.input_shape == (1, 6, 5)
    assert (data.test.images == 0x80).all()


def test_one_coloured_picture_makes_all_rgb(pets):
    for file in pets.rglob("*.png"):
        picture(120, "L").save(file)
    picture(120, "RGB").save(pets / "train" / "cat" / "0.png")
    data = load_pets(pets)
    assert data.input_shape == (3, 6, 5)
    assert torch.equal(data.test.images[:, 0], data.test.images[:, 2])


def test_a_picture_is_turned_upright_as_its_camera_noted(pets):
    for file in pets.rglob("*.png"):
        file.unlink()
        sideways = picture(120, size=(5, 6))
        exif = sideways.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        sideways.save(file.with_suffix(".jpg"), exif=exif)
    assert load_pets(pets).input_shape == (3, 6, 5)


def test_unequal_sizes_are_named_and_size_mends_them(pets):
    odd = pets / "train" / "dog" / "3.png"
    picture(77, size=(9, 8)).save(odd)
    with pytest.raises(ValueError, match=r"most are 6×5 .*dog/3\.png is 9×8, which does not fit.* Pass size="):
        load_pets(pets)
    data = load_pets(pets, size=12)
    assert {tuple(part.images.shape[1:]) for part in parts(data)} == {(3, 12, 12)}
    assert load_pets(pets, size=16).input_shape == (3, 16, 16)  # another size is another cache


def test_several_odd_sizes_are_counted(pets):
    for i in range(3):
        picture(77, size=(9, 8)).save(pets / "train" / "dog" / f"{i}.png")
    with pytest.raises(ValueError, match=r"dog/0\.png is 9×8, and 2 more do not fit either"):
        load_pets(pets)


def test_an_unreadable_picture_is_named(pets):
    broken = pets / "test" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataDamaged, match=r"cat/0\.png cannot be read as an image .*Replace it or delete it"):
        load_pets(pets)


def empty_class(pets):
    for file in (pets / "train" / "cat").iterdir():
        file.unlink()


def no_train(pets):
    (pets / "train").rename(pets / "Train")


def no_test(pets):
    (pets / "test").rename(pets / "validation")


def no_classes(pets):
    for file in sorted((pets / "train").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()


def emptied_folder(pets):
    for file in sorted(pets.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()


def other_classes(pets):
    (pets / "test" / "cat").rename(pets / "test" / "cow")


def single_example(pets):
    for i in range(1, 6):
        (pets / "train" / "cat" / f"{i}.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty_class, r"train has a class without images.*cat"),
        (no_train, r"has no folder train/ \(found: Train/, test/\)"),
        (no_test, r"has no folder test/ \(found: train/, validation/\)"),
        (no_classes, r"train holds no class folders"),
        (emptied_folder, r"has no folder train/ \(found: nothing\)"),
        (other_classes, r"only in train/: \['cat'\], only in test/: \['cow'\]"),
        (single_example, r"at least 2 training images"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(pets, spoil, message):
    spoil(pets)
    with pytest.raises(ValueError, match=message):
        load_pets(pets)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load(f"folder:{tmp_path / 'nowhere'}", folder=tmp_path)


# --- Real files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_mnist(tmp_path_factory):
    archive = SHARED / "mnist.tar.xz"
    if not archive.is_file():
        pytest.skip(f"the real MNIST is not at {archive}")
    raw = tmp_path_factory.mktemp("real") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(raw, filter="data")
    return raw.parents[1]


def test_the_real_mnist(real_mnist):
    from torchvision.datasets import MNIST

    data = load("mnist", folder=real_mnist)
    assert [len(part) for part in parts(data)] == [50_000, 10_000, 10_000]
    train, test = (MNIST(real_mnist, train=train) for train in (True, False))
    assert torch.equal(data.test.images[:, 0], test.data)
    assert torch.equal(data.test.labels, test.targets)
    assert rows_of(data.train.images, data.val.images) == rows_of(train.data)  # each image once: disjoint, complete
    assert not set(rows_of(data.train.images)) & set(rows_of(data.val.images))
    # The figures that every MNIST tutorial normalises with, for the 60,000: ours are those of 50,000 of them.
    assert data.train.mean[0] == pytest.approx(0.1307, abs=5e-4)
    assert data.train.std[0] == pytest.approx(0.3081, abs=5e-4)
    share = train.targets.bincount() / 60_000
    for part in (data.train, data.val):
        assert ((part.labels.bincount() - share * len(part)).abs() <= 2).all()
    few = load("mnist", folder=real_mnist, train_size=100)
    assert ((few.train.labels.bincount() - share * 100).abs() <= 2).all()


def test_real_photographs_in_a_folder(tmp_path):
    archive = SHARED / "cifar10-images.tar.xz"
    if not archive.is_file():
        pytest.skip(f"the CIFAR-10 images are not at {archive}")
    wanted = {}
    with tarfile.open(archive, "r|xz") as tar:  # as a stream, and only as far as needed: the whole takes long
        for member in tar:
            pieces = Path(member.name).parts
            if member.isfile() and len(pieces) >= 3:
                kept = wanted.setdefault(pieces[-3:-1], 0)
                if kept < 20:
                    wanted[pieces[-3:-1]] += 1
                    target = tmp_path / "cifar" / Path(*pieces[-3:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
            if len(wanted) == 20 and min(wanted.values()) == 20:
                break
    data = load(f"folder:{tmp_path / 'cifar'}", folder=tmp_path)
    assert len(data.classes) == 10
    assert data.input_shape == (3, 32, 32)
    assert len(data.test) == 200
    assert len(data.train) + len(data.val) == 200
    assert data.train.labels.bincount().min() >= 16
    file = sorted((tmp_path / "cifar" / "test" / data.classes[0]).iterdir())[0]
    assert torch.equal(data.test.images[0].permute(1, 2, 0), torch.tensor(np.array(Image.open(file).convert("RGB"))))
    assert all(0.2 < m < 0.8 and 0.1 < s < 0.4 for m, s in zip(data.train.mean, data.train.std, strict=True))


# Splits of any size, and labels that change with the images


def test_glyph_splits_of_any_size_leave_the_others_alone():
    usual = load("glyphs", count=600, size=16, classes="digits")
    other = load("glyphs", count=600, size=16, classes="digits", val_size=50, test_size=700)
    assert [len(part) for part in (other.train, other.val, other.test)] == [400, 50, 700]
    assert torch.equal(other.train.images, usual.train.images)
    assert other.test.labels.bincount().tolist() == [70] * 10
    assert other.train.mean == usual.train.mean
    few = load("glyphs", count=600, size=16, classes="digits", train_size=30, test_size=700)
    assert torch.equal(few.test.images, other.test.images)
    assert len(few.train) == 30


def test_glyphs_in_two_domains_and_digits_at_glyph_size_share_classes_and_shape():
    """So that what was learnt on one can be transferred to another."""
    settings = {"classes": "digits", "size": 16, "count": 600}
    one, two = (load("glyphs", domain=domain, **settings) for domain in ("print", "chalk"))
    real = load("digits", size=16)
    assert one.classes == two.classes == real.classes
    assert one.input_shape == two.input_shape == real.input_shape == (1, 16, 16)
    assert not torch.equal(one.train.images, two.train.images)


def test_an_augmentation_may_change_the_labels():
    def mixup(x, y, generator):
        share = torch.rand((), generator=generator)
        soft = torch.nn.functional.one_hot(y, 10).float()
        return share * x + (1 - share) * x.flip(0), share * soft + (1 - share) * soft.flip(0)

    def mixed(generator, augment=mixup):
        return next(batches(load("digits").train, 8, generator=generator, augment=augment))

    x, y = mixed(seeded())
    plain_x, plain_y = next(batches(load("digits").train, 8, generator=seeded()))
    source = seeded()
    torch.randperm(1000, generator=source)
    wanted_x, wanted_y = mixup(plain_x, plain_y, source)
    assert torch.equal(x, wanted_x)
    assert torch.equal(y, wanted_y)
    settings = functools.partial(lambda x, y, generator, alpha: (x * alpha, y), alpha=2.0)
    assert torch.equal(mixed(seeded(), settings)[0], 2 * plain_x)
    assert torch.equal(mixed(seeded(), lambda x, generator, times=3: x * times)[0], 3 * plain_x)


def test_glyphs_are_drawn_where_train_size_needs_more_than_count_gives():
    settings = {"size": 16, "classes": "digits"}
    usual, more = (load("glyphs", count=60, **settings, **few) for few in ({}, {"train_size": 300}))
    assert [len(part) for part in parts(more)] == [300, 10, 10]
    assert set(rows_of(usual.train.images)) < set(rows_of(more.train.images))
    assert torch.equal(more.test.images, usual.test.images)
    asked = load("glyphs", difficulty=0.5, train_size=1000, val_size=1000, test_size=5000, **settings)
    assert [len(part) for part in parts(asked)] == [1000, 1000, 5000]


def test_a_domain_is_a_shift_and_what_was_learnt_on_glyphs_serves_real_digits():
    settings = {"classes": "digits", "size": 16, "count": 6000}
    chalk, ink = (load("glyphs", domain=domain, **settings) for domain in ("chalk", "print"))
    assert torch.equal(chalk.test.labels, ink.test.labels)
    recipe = Recipe(epochs=6, batch_size=25, optimizer=functools.partial(torch.optim.Adam, lr=0.003))
    untrained, model = (fresh(functools.partial(convnet, (1, 16, 16), 10, width=8), recipe, seed=0) for _ in range(2))
    fit(model, chalk, recipe, seed=0, progress=False)
    few = load("digits", size=16, train_size=50)
    at_home, abroad, real = (evaluate(model, data.test).accuracy for data in (chalk, ink, few))
    assert at_home > 0.75
    assert abroad < at_home - 0.4
    assert real > 0.35

    def probed(model):
        """A new head on frozen features, from 50 labels."""
        freeze(model.features)
        model.head.reset_parameters()
        fit(model, few, replace(recipe, epochs=20), seed=0, progress=False)
        return evaluate(model, few.test).accuracy

    assert probed(model) > probed(untrained) + 0.2


# Inputs that are no images, and inputs in parts


@pytest.mark.parametrize(
    ("name", "sizes", "columns"), [("wine", [106, 36, 36], 13), ("breast_cancer", [341, 114, 114], 30)]
)
def test_tables_are_split_whole_and_standardised_by_the_training_rows(name, sizes, columns):
    import sklearn.datasets

    data, bunch = load(name), getattr(sklearn.datasets, f"load_{name}")()
    assert [len(part) for part in parts(data)] == sizes
    assert (data.input_shape, data.classes) == ((columns,), tuple(bunch.target_names))
    rows = torch.cat([torch.cat([part.inputs, part.labels[:, None].float()], 1) for part in parts(data)])
    expected = torch.from_numpy(np.column_stack([bunch.data, bunch.target])).float()
    assert rows_of(rows) == rows_of(expected)
    share = torch.from_numpy(bunch.target).bincount() / len(bunch.target)
    for part in parts(data):
        assert ((part.labels.bincount() - share * len(part)).abs() <= 2).all()
    before = data.train.inputs.clone()
    x, _ = next(batches(data.train, len(data.train)))
    torch.testing.assert_close(x.mean(0), torch.zeros(columns), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(columns), rtol=0, atol=1e-4)
    assert torch.equal(data.train.inputs, before), "a batch in order is a view: the split itself must not be scaled"
    other, _ = next(batches(data.test, 5))
    torch.testing.assert_close(other, (data.test.inputs[:5] - before.mean(0)) / before.std(0, correction=0))
    assert len(load(name, train_size=20).train) == 20


def test_a_table_is_learnt():
    data = load("wine")
    model = mlp(data.input_shape, 3, width=16)
    fit(model, data, Recipe(epochs=20), seed=0, progress=False)
    assert evaluate(model, data.test).accuracy > 0.85
    assert repr(data) == "wine: rows of 13 numbers, 3 classes; train 106, val 36, test 36; on cpu"
    with pytest.raises(AttributeError, match="are not images: read .inputs"):
        data.train.images  # noqa: B018


class TwoViews(torch.nn.Module):
    """Halves of an image, one of them as plain numbers, through a network each."""

    def __init__(self, shapes):
        super().__init__()
        self.left, self.right = (mlp(shape, 10, width=32, depth=1) for shape in shapes)

    def forward(self, x):
        left, right = x
        return self.left(left) + self.right(right)


def halves(images):
    return images[..., :4], images[..., 4:].flatten(1).float()


def test_inputs_in_parts_go_through_the_whole_laboratory():
    whole = load("digits", train_size=300)
    data = whole.with_inputs(halves)
    assert data.input_shape == ((1, 8, 4), (32,))
    assert repr(data.train) == "Split(300 images 1×8×4 + rows of 32 numbers, on cpu)"
    split = data.train.subset(torch.arange(7))
    (left, right), y = next(batches(split, 7, dtype=torch.float64))
    pixels = whole.train.images.double() / 255
    expected = pixels[:7, :, :, :4] - pixels[..., :4].mean()
    torch.testing.assert_close(left, expected / pixels[..., :4].std(correction=0), rtol=0, atol=1e-5)
    columns = whole.train.images[..., 4:].flatten(1).double()
    spread = columns.std(0, correction=0)
    expected = (columns[:7] - columns.mean(0)) / torch.where(spread > 0, spread, 1.0)
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-4)
    assert torch.equal(y, whole.train.labels[:7])

    def swapped_signs(x, generator):
        return tuple(-part for part in x)

    order = seeded(3)
    for (a, b), y in batches(data.train, 64, generator=order, augment=swapped_signs):
        assert len(a) == len(b) == len(y)
    recipe = Recipe(epochs=12, accumulate=2, augment=None)
    model = TwoViews(data.input_shape)
    fit(model, data, recipe, seed=0, progress=False)
    assert evaluate(model, data.test).accuracy > 0.8
    assert all(part.device.type == "meta" for part in data.to("meta").val.inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(3, 1, 4, 4), None),
        (torch.zeros(3, 1), None),
        (torch.zeros(3, 1).double(), r"inputs must be images, uint8 \[3, C, H, W\], .* got torch.float64 \[3, 1\]"),
        (torch.zeros(3, 1).byte(), "inputs must be images"),
        (torch.zeros(2, 1), r"one for each label; got torch.float32 \[2, 1\]"),
        (torch.zeros(3, 2), "one number for each of 2 channels or columns, got 1 and 1"),
        ((torch.zeros(3, 1), torch.zeros(3, 1)), "one number for each of 2"),
        ([torch.zeros(3, 1)], "inputs must be a tensor or a tuple of tensors, got list"),
        ((), "inputs must be a tensor or a tuple of tensors, got tuple"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    labels = torch.zeros(3, dtype=torch.long)
    if message is None:
        assert len(Split(inputs, labels, (0.0,), (1.0,))) == 3
        assert torch.equal(next(batches(Split(inputs, labels, (0.0,), (1.0,)), 3))[0], inputs)
    else:
        with pytest.raises(ValueError, match=message):
            Split(inputs, labels, (0.0,), (1.0,))


def test_soft_labels_have_the_type_of_the_batch():
    def soft(x, y, generator):
        return x, torch.nn.functional.one_hot(y, 10).float()

    _, y = next(batches(load("digits").train, 8, generator=seeded(), augment=soft, dtype=torch.float64))
    assert y.dtype == torch.float64
    model = mlp((1, 8, 8), 10, width=8)
    fit(
        model.double(),
        load("digits", train_size=50),
        Recipe(1, augment=soft, precision="float64"),
        seed=0,
        progress=False,
    )


def test_a_weighted_sample_is_a_subset():
    split = numbered(3)
    chosen = torch.multinomial(torch.tensor([0.0, 1.0, 3.0]), 400, replacement=True, generator=seeded())
    counts = split.subset(chosen).labels.bincount(minlength=3)
    assert counts[0] == 0
    assert 2 < counts[2] / counts[1] < 4
