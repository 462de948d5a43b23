"""Folded layers against the layers one after the other, and against torch's own fusion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from course_lib.efficiency import folding
from course_lib.efficiency.folding import (
    MeanPad,
    border_error,
    first_layer,
    fold_normalisation,
    fold_pair,
    input_folded,
    merge_convs,
    merge_linears,
    norm_folded,
    products_folded,
)
from course_lib.lab.models import convnet, mlp, resnet, vit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def trained(norm: Any) -> Any:
    """A norm as training leaves it: statistics of its own, scales of either sign."""
    size = norm.num_features
    norm.running_mean.copy_(normal(size, seed=1))
    norm.running_var.copy_(normal(size, seed=2).square() + 0.3)
    if norm.affine:
        norm.weight.data, norm.bias.data = normal(size, seed=3), normal(size, seed=4)
    return norm.double().eval()


# --- Batch norm -------------------------------------------------------------------------------------------------------

PAIRS: dict[str, Any] = {
    "linear": (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (5, 4)),
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda bias: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 5)),
    "conv3d": (lambda bias: nn.Conv3d(4, 6, 2, bias=bias), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "transposed": (lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 5)),
    "grouped": (lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 5)),
    "depthwise": (lambda bias: nn.ConvTranspose1d(6, 6, 3, groups=6, bias=bias), nn.BatchNorm1d, (2, 6, 5)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_a_folded_norm_answers_alike(name: str, affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    make, norm_of, shape = PAIRS[name]
    layer, norm, x = make(bias).double(), trained(norm_of(6, affine=affine, eps=0.1)), normal(*shape)
    before = copy.deepcopy(layer.state_dict())
    folded = fold_pair(layer, norm)
    assert type(folded) is type(layer)
    assert folded.weight.shape == layer.weight.shape
    close(folded(x), norm(layer(x)))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    if (name == "linear" and not affine) or name in ("grouped", "depthwise"):
        return  # torch's own cannot
    if name == "linear":
        theirs: Any = fuse_linear_bn_eval(layer.eval(), norm)
    else:
        theirs = fuse_conv_bn_eval(layer.eval(), norm, transpose=isinstance(layer, folding.TRANSPOSED))
    close(folded.weight, theirs.weight)
    close(folded.bias, theirs.bias)


def test_the_formula_by_hand() -> None:
    weight, bias = norm_folded(
        *(torch.tensor(v) for v in ([[2.0]], [3.0], [1.0], [3.0], [4.0], [5.0])),
        eps=1.0,
    )
    assert weight.tolist() == [[4.0]]  # 4 / sqrt(3 + 1) * 2
    assert bias.tolist() == [9.0]  # 4 / 2 * (3 - 1) + 5
    weight, bias = norm_folded(torch.tensor([[2.0]]), None, torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
    assert (weight.item(), bias.item()) == (1.0, -0.5)


# --- Normalisation ----------------------------------------------------------------------------------------------------

MEAN, STD = (0.4, 0.7), (0.2, 0.5)


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


@pytest.mark.parametrize("make", [mlp, convnet, resnet, vit])
def test_networks_take_images_as_they_come(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make((2, 8, 8), 3).double().eval(), normal(3, 2, 8, 8).abs()
    made = fold_normalisation(model, MEAN, STD)
    close(made(x), model(normalised(x)))
    assert (made(x) - model(x)).abs().max() > 1e-3
    assert any(isinstance(module, MeanPad) for module in made.modules()) == (make in (convnet, resnet))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_any_padding(padding: Any, mode: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, (4, 3), padding=padding, padding_mode=mode, bias=False).double()
    mean, std, x = normal(2, seed=1), normal(2, seed=2).abs() + 0.1, normal(2, 2, 7, 6)
    made = fold_normalisation(layer, mean, std)  # type: ignore[arg-type]  # a tensor does for a sequence
    close(made(x), layer((x - mean.view(1, 2, 1, 1)) / std.view(1, 2, 1, 1)))
    padded = mode == "zeros" and padding not in (0, "valid")
    assert isinstance(made, nn.Sequential) == padded


def test_padding_with_zeros_is_right_for_a_mean_of_zero() -> None:
    assert isinstance(fold_normalisation(nn.Conv2d(1, 1, 3, padding=1), [0.0], [2.0]), nn.Conv2d)


def test_the_border_is_where_forgetting_it_shows() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3, padding=1).double(), normal(2, 2, 6, 6)
    error = border_error(layer, MEAN, STD, x)
    assert error.shape == (2, 3, 6, 6)
    close(error[:, :, 1:-1, 1:-1], torch.zeros(2, 3, 4, 4).double())
    assert error[:, :, 0].abs().min() > 1e-3
    # the corner misses 5 of 9 places, at each of which the mean would have been taken off
    missing = torch.ones(3, 3).double()
    missing[1:, 1:] = 0
    shift = (layer.weight * normalised(torch.zeros(1, 2, 1, 1)) * missing).sum((1, 2, 3))
    close(error[0, :, 0, 0], shift)


def test_input_folded_by_hand() -> None:
    mean, std = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    weight, bias = input_folded(torch.tensor([[6.0, 8.0]]), torch.tensor([1.0]), mean, std)
    assert weight.tolist() == [[3.0, 2.0]]
    assert bias.tolist() == [-6.0]  # 1 - 3 * 1 - 2 * 2


def test_first_layers() -> None:
    assert first_layer(mlp((1, 4, 4), 2)) == "hidden.0"
    assert first_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) == "1"
    assert first_layer(nn.Linear(2, 2)) == ""
    with pytest.raises(ValueError, match="model: its input must go to one convolution or linear layer alone"):
        first_layer(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


# --- Products ---------------------------------------------------------------------------------------------------------

BIASES = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("one", "two"), BIASES)
def test_two_linear_layers_are_one(one: bool, two: bool) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 7, bias=one).double(), nn.Linear(7, 3, bias=two).double()
    merged, x = merge_linears(first, second), normal(5, 4)
    close(merged(x), second(first(x)))
    assert (merged.bias is not None) == (one or two)
    assert (merged.in_features, merged.out_features) == (4, 3)


@pytest.mark.parametrize(("one", "two"), BIASES)
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "padding_mode": "reflect"}])
def test_a_convolution_takes_the_next_one_in(one: bool, two: bool, settings: Any) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 5, 3, bias=one, **settings).double()
    second = nn.Conv2d(5, 3, 1, bias=two).double()
    merged, x = merge_convs(first, second), normal(2, 2, 6, 6)
    close(merged(x), second(first(x)))
    assert merged.out_channels == 3
    assert first.out_channels == 5
    assert len(first.weight) == 5


def test_products_folded_is_matrix_multiplication() -> None:
    w, b = products_folded(normal(4, 3), normal(4), normal(2, 4), normal(2))
    close(w, normal(2, 4) @ normal(4, 3))
    assert b is not None
    close(b, normal(2, 4) @ normal(4) + normal(2))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = convnet((1, 8, 8), 3).cuda().eval()
    x = torch.rand(2, 1, 8, 8, device="cuda")
    made = fold_normalisation(model, [0.5], [0.25])
    torch.testing.assert_close(made(x), model((x - 0.5) / 0.25), rtol=1e-3, atol=1e-3)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_errors_at_the_door() -> None:
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="layer='ReLU': must be Linear or Conv1d"):
        fold_pair(nn.ReLU(), norm)
    with pytest.raises(ValueError, match="norm='LayerNorm': must be BatchNorm1d"):
        fold_pair(conv, nn.LayerNorm(3))
    with pytest.raises(ValueError, match="must be one that keeps running statistics"):
        fold_pair(conv, nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"norm\.num_features=4: must be the layer's outputs, 3"):
        fold_pair(conv, nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="mean=3: must be one number for each channel of the 2 inputs"):
        fold_normalisation(conv, [0.1, 0.2, 0.3], [1, 1, 1])
    with pytest.raises(ValueError, match="std=1: must be as many numbers as the mean has, 2"):
        fold_normalisation(conv, [0.1, 0.2], [1])
    with pytest.raises(ValueError, match=r"std=\[1, 0\]: must be numbers above 0"):
        fold_normalisation(conv, [0.1, 0.2], [1, 0])
    with pytest.raises(ValueError, match="groups=2: must be 1 in the first layer"):
        fold_normalisation(nn.Conv2d(2, 2, 3, groups=2), MEAN, STD)
    with pytest.raises(ValueError, match=r"second\.in_features=4: must be what the first gives, 3"):
        merge_linears(nn.Linear(2, 3), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="must be a 1x1 convolution with stride 1 and without padding"):
        merge_convs(conv, nn.Conv2d(3, 2, 3))
    with pytest.raises(ValueError, match="must be a 1x1 convolution"):
        merge_convs(conv, nn.Conv2d(3, 2, 1, padding=1))
    with pytest.raises(ValueError, match=r"second\.in_channels=4: must be what the first gives, 3"):
        merge_convs(conv, nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match=r"first\.groups=3: must be 1"):
        merge_convs(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 2, 1))
