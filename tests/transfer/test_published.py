"""torchvision's weights from a cache made here; the network is never asked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models
from torchvision.transforms.functional import normalize

from course_lib import transfer
from course_lib.lab.data import batches
from tests.transfer.small import data, same_weights, split

NAME = "squeezenet1_1"  # small, and quick to make


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TORCH_HOME; who asks the network is told so."""

    def no_network(url: str, *_: Any, **__: Any) -> None:
        raise AssertionError(f"asked for {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def store(folder: Path, name: str = NAME) -> Any:
    network = models.get_model(name)
    torch.save(network.state_dict(), folder / Path(models.get_model_weights(name).DEFAULT.url).name)
    return network


def test_cached_weights_are_loaded_with_what_their_images_need(cache: Path) -> None:
    stored = store(cache)
    found = transfer.pretrained(NAME)
    same_weights(found.network, stored)
    assert not found.network.training
    theirs = models.get_model_weights(NAME).DEFAULT
    assert (list(found.mean), list(found.std)) == (theirs.transforms().mean, theirs.transforms().std)
    assert (found.size, found.weights) == (224, "SqueezeNet1_1_Weights.IMAGENET1K_V1")
    assert list(found.classes) == theirs.meta["categories"]
    assert transfer.available() == [NAME]
    same_weights(transfer.pretrained(NAME, "IMAGENET1K_V1").network, stored)


def test_what_is_not_there_is_named_with_the_command_and_not_fetched(cache: Path) -> None:
    with pytest.raises(transfer.WeightsUnavailable) as raised:
        transfer.pretrained("resnet50", "IMAGENET1K_V1")
    message = str(raised.value)
    assert str(cache / "resnet50-0676ba61.pth") in message
    command = re.search(r'python -c "(.+)"$', message)
    assert command is not None
    assert command[1] == (
        "from course_lib.transfer import pretrained; pretrained('resnet50', 'IMAGENET1K_V1', download=True)"
    )
    with pytest.raises(AssertionError, match="asked for https://download.pytorch.org/models/squeezenet1_1"):
        transfer.pretrained(NAME, download=True)
    assert transfer.available() == []


def test_images_are_prepared_as_the_network_knows_them(cache: Path) -> None:
    store(cache)
    found = transfer.pretrained(NAME)
    task = found.prepared(data(6), size=16)
    assert task.input_shape == (3, 16, 16)
    x, _ = next(batches(task.train, 6))
    expected = normalize(task.train.images.float() / 255, list(found.mean), list(found.std))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    same = found.prepared(data(6), size=8).val.images
    assert torch.equal(same, data(6).val.images.expand(-1, 3, -1, -1))
    one = data(2)
    assert found.prepared(one).input_shape == (3, 224, 224)


def test_bad_input_is_named(cache: Path) -> None:
    store(cache)
    found = transfer.pretrained(NAME)
    rows = split(6, 5)
    table = replace(data(6), train=rows, val=rows, test=rows)
    cases: list[tuple[str, Any]] = [
        (
            "name='resnet19': must be one of torchvision's classifiers: alexnet, ",
            lambda: transfer.pretrained("resnet19"),
        ),
        ("weights='BEST': must be one of 'IMAGENET1K_V1', 'DEFAULT'", lambda: transfer.pretrained(NAME, "BEST")),
        ("must be uint8 [N, 1 or 3, H, W]", lambda: found.prepared(table)),
        ("size=0: must be", lambda: found.prepared(data(6), size=0)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
