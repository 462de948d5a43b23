"""Networks of the capstone: PyTorch's own example, shapes, and a stem whose outputs are white."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.capstone import example_net, quick_net, speed_net, whiten_stem
from course_lib.lab.data import normalise
from tests.capstone.small import coloured

NETWORKS = [example_net, quick_net, speed_net]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_example_is_pytorchs():
    """github.com/pytorch/examples/blob/main/mnist/main.py, written out."""
    model = example_net((1, 28, 28), 10).eval()
    assert count(model) == 1_199_882

    def theirs(x):
        x = F.relu(model.conv1(x))
        x = F.relu(model.conv2(x))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return model.head(F.relu(model.fc1(x)))

    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(model(x), theirs(x))
    sizes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]
    assert sizes == [(32, 1, 3, 3), (64, 32, 3, 3), (128, 9216), (10, 128)]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.5]


def test_the_example_drops_a_quarter_and_a_half():
    model = example_net((1, 12, 12), 10)
    kept = {}
    for name in ("dropout1", "dropout2"):
        getattr(model, name).register_forward_hook(
            lambda _, x, y, name=name: kept.update({name: (y != 0).sum().item() / (x[0] != 0).sum().item()})
        )
    model(torch.randn(200, 1, 12, 12))
    assert kept == {"dropout1": pytest.approx(0.75, abs=0.02), "dropout2": pytest.approx(0.5, abs=0.04)}


@pytest.mark.parametrize(("width", "shape", "sides"), [(16, (1, 28, 28), 3 * 3), (4, (3, 16, 9), 2 * 1)])
def test_the_quick_networks_parameters(width, shape, sides):
    w, channels = width, shape[0]
    convolutions = 25 * channels * w + 9 * w * 2 * w + 9 * 2 * w * 4 * w
    norms = 2 * (w + 2 * w + 4 * w)
    assert count(quick_net(shape, 10, width=w)) == convolutions + norms + 10 * (4 * w * sides + 1)


def test_the_quick_network_works_at_a_quarter_of_the_places():
    seen = []
    model = quick_net((1, 28, 28), 10)
    for layer in model.features:
        layer.register_forward_hook(lambda layer, x, y: seen.append((type(layer).__name__, y.shape[-1])))
    model(torch.randn(2, 1, 28, 28))
    assert [side for kind, side in seen if kind == "Conv2d"] == [14, 14, 7]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (3, 9, 14)])
def test_logits_are_the_heads_of_the_embedding(network, shape):
    model = network(shape, 7).eval()
    x = torch.randn(2, *shape)
    features = model.embedding(x)
    assert features.ndim == 2
    assert features.shape[1] == model.head.in_features
    torch.testing.assert_close(model(x), model.head(features))
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize(("network", "smallest"), [(example_net, 6), (quick_net, 7), (speed_net, 9)])
def test_the_smallest_images(network, smallest):
    side = smallest
    assert network((1, side, side), 2)(torch.randn(2, 1, side, side)).shape == (2, 2)
    for shape in ((1, side - 1, side), (1, side, side - 1), (side, side)):
        with pytest.raises(ValueError, match=rf"input_shape=.* at least {smallest} pixels"):
            network(shape, 2)
    with pytest.raises(ValueError, match="classes=0"):
        network((1, side, side), 0)


def test_other_arguments_at_the_door():
    with pytest.raises(ValueError, match="width=0"):
        quick_net((1, 16, 16), 2, width=0)
    for widths in ((), (8, 0)):
        with pytest.raises(ValueError, match="widths=0"):
            speed_net((1, 16, 16), 2, widths=widths)


def test_the_speed_networks_stages():
    model = speed_net((3, 32, 32), 10, widths=(8, 16), scale=0.5).eval()
    sides = []
    for layer in model.stages:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, x, y: sides.append((layer.out_channels, x[0].shape[-1])))
    x = torch.randn(2, 3, 32, 32)
    embedding = model.embedding(x)
    assert sides == [(8, 31), (8, 15), (16, 15), (16, 7)]
    torch.testing.assert_close(embedding, 0.5 * model.stages(model.stem(x)).amax((2, 3)))


# The white stem


def images(count=40, size=9):
    """Neighbours and channels that resemble each other, and a mean that is not 0."""
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))
    x = F.avg_pool2d(x, 3, stride=1, padding=1)
    return x + 0.5 * x.mean(1, keepdim=True) + 0.2


def stem_outputs(model, x):
    """[patches, 24], the bias and the activation left out."""
    return F.conv2d(x, model.stem[0].weight).movedim(1, 3).flatten(0, 2).double()


def test_what_comes_out_of_a_white_stem_is_white():
    model, x = speed_net((3, 9, 9), 10, widths=(4,)), images()
    before = stem_outputs(model, x)
    assert whiten_stem(model, x, eps=1e-9) is model
    out = stem_outputs(model, x)
    eye = torch.eye(12, dtype=torch.float64)
    moments = out[:, :12].T @ out[:, :12] / len(out)
    torch.testing.assert_close(moments, eye, rtol=0, atol=1e-3)
    torch.testing.assert_close(out[:, 12:], -out[:, :12])
    assert ((before.T @ before / len(before))[:12, :12] - eye).abs().max() > 0.1, "before, it was not"


def test_the_filters_are_the_principal_axes_and_the_largest_comes_first():
    """Against the singular values of the patches, in float64."""
    model, x = whiten_stem(speed_net((3, 9, 9), 10, widths=(4,)), images()), images().double()
    patches = F.unfold(x, 2).movedim(1, 2).flatten(0, 1)
    _, singular, axes = torch.linalg.svd(patches, full_matrices=False)
    values = singular**2 / len(patches)
    filters = model.stem[0].weight[:12].flatten(1).double()
    torch.testing.assert_close(filters.norm(dim=1), (values + 5e-4).rsqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close((filters * axes).sum(1).abs(), filters.norm(dim=1), rtol=1e-4, atol=0)


def test_eps_keeps_what_hardly_varies_small():
    flat = torch.full((10, 3, 9, 9), 0.5)
    model = whiten_stem(speed_net((3, 9, 9), 10, widths=(4,)), flat, eps=0.01)
    assert model.stem[0].weight.flatten(1).norm(dim=1).max() == pytest.approx(10, rel=1e-3)


def test_a_white_stem_stays_as_it_is_and_its_bias_does_not():
    data = coloured()
    model = speed_net(data.input_shape, 3, widths=(4,))
    whiten_stem(model, normalise(data.train.images, data.train))
    stem = model.stem[0]
    assert (stem.weight.requires_grad, stem.bias.requires_grad) == (False, True)
    before = stem.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    F.cross_entropy(model(normalise(data.train.images, data.train)), data.train.labels).backward()
    optimizer.step()
    assert torch.equal(stem.weight, before)
    assert stem.bias.grad.abs().max() > 0


def test_a_stem_of_another_size_is_refused():
    grey = speed_net((1, 9, 9), 2, widths=(4,))
    with pytest.raises(ValueError, match="network=8: must be a stem of 8 filters"):
        whiten_stem(grey, torch.randn(4, 1, 9, 9))
