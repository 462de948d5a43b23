"""Each network has the shape, the size and the arithmetic that its name promises."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.data import load
from course_lib.lab.models import (
    Attention,
    BasicBlock,
    EncoderBlock,
    Network,
    as_in_training,
    convnet,
    freeze,
    mlp,
    resnet,
    thaw,
    vit,
)
from course_lib.lab.training import Recipe, evaluate, fit

MAKERS = [mlp, convnet, resnet, vit]
SHAPES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 64, 64), (2, 12, 20)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_images_become_logits(make, shape) -> None:
    model = make(shape, 7)
    logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, 7)
    assert (model.input_shape, model.classes) == (shape, 7)
    assert isinstance(model, Network)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_the_input_shape_may_be_any_sequence(make) -> None:
    assert make(torch.Size([1, 8, 8]), 3).input_shape == (1, 8, 8)
    assert make([1, 8, 8], 3).input_shape == (1, 8, 8)


# Sizes, counted by hand: weights + biases of each layer


def test_parameter_count_of_mlp() -> None:
    assert mlp((1, 8, 8), 10, width=128, depth=2).parameter_count == (64 * 128 + 128) + (128 * 128 + 128) + (1280 + 10)
    assert mlp((3, 4, 5), 2, width=7, depth=0).parameter_count == 60 * 2 + 2, "no hidden layer: logistic regression"


def test_parameter_count_of_convnet() -> None:
    convolutions = 9 * (3 * 16 + 16 * 32 + 32 * 64)
    norms = 2 * (16 + 32 + 64)
    assert convnet((3, 32, 32), 10, width=16).parameter_count == convolutions + norms + (64 * 10 + 10)


def test_resnet_20_has_the_size_that_the_paper_gives() -> None:
    # He et al. 2015, table 6: ResNet-20 has 0.27 M parameters, ResNet-56 0.85 M
    assert round(resnet((3, 32, 32), 10, blocks=(3, 3, 3)).parameter_count / 1e6, 2) == 0.27
    assert round(resnet((3, 32, 32), 10, blocks=(9, 9, 9)).parameter_count / 1e6, 2) == 0.86  # 0.85 + two projections
    # exactly: 19 convolutions of 3x3 with their norms, two projections of 1x1 with theirs, and the head
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    expected = convolutions + norms + projections + (64 * 10 + 10)
    assert resnet((3, 32, 32), 10, blocks=(3, 3, 3)).parameter_count == expected


def test_parameter_count_of_vit() -> None:
    width, tokens = 64, 64
    embedding = 3 * 4 * 4 * width + width + tokens * width
    attention = (width * 3 * width + 3 * width) + (width * width + width)
    perceptron = (width * 4 * width + 4 * width) + (4 * width * width + width)
    block = attention + perceptron + 2 * 2 * width
    model = vit((3, 32, 32), 10, patch=4, width=width, depth=3, heads=4)
    assert model.parameter_count == embedding + 3 * block + 2 * width + (width * 10 + 10)


def test_parameter_count_leaves_out_what_is_frozen() -> None:
    model = mlp((1, 8, 8), 10, width=16, depth=1)
    model.hidden.requires_grad_(False)
    assert model.parameter_count == 16 * 10 + 10


def test_repr_opens_with_what_matters() -> None:
    assert repr(resnet((1, 8, 8), 10)).splitlines()[0] == "resnet: 1x8x8 -> 10 classes, 77,754 parameters"
    assert "(head): Linear" in repr(vit((1, 8, 8), 10))


# Arithmetic, against references


@pytest.mark.parametrize(("channels", "stride"), [((8, 8), 1), ((8, 16), 2)])
@pytest.mark.parametrize("training", [True, False])
def test_residual_block_is_torchvisions(channels: tuple[int, int], stride: int, training: bool) -> None:
    from torchvision.models.resnet import BasicBlock as TorchvisionBlock  # only after course_lib has mended it

    ours = BasicBlock(*channels, stride=stride).train(training)
    shortcut = None
    if stride == 2:
        shortcut = nn.Sequential(nn.Conv2d(*channels, 1, stride, bias=False), nn.BatchNorm2d(channels[1]))
    theirs = TorchvisionBlock(*channels, stride=stride, downsample=shortcut).train(training)
    renamed = {"bn": "norm", "downsample": "shortcut"}
    copied = theirs.state_dict()
    for old, new in renamed.items():
        copied = {name.replace(old, new): value for name, value in copied.items()}
    ours.load_state_dict(copied)
    x = torch.randn(4, channels[0], 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_resnet_halves_the_image_once_a_stage() -> None:
    model = resnet((3, 32, 32), 10, width=4, blocks=(1, 2, 1))
    x, seen = model.stem(torch.randn(1, 3, 32, 32)), []
    for stage in model.stages:
        x = stage(x)
        seen.append(tuple(x.shape[1:]))
    assert seen == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert [len(stage) for stage in model.stages] == [1, 2, 1]


def test_resnet_convolutions_start_with_hes_variance() -> None:
    model = resnet((3, 32, 32), 10, width=64)
    weight = model.stages[1][0].conv1.weight  # 64 channels in, 128 out: fan_in and fan_out differ
    assert weight.var().item() == pytest.approx(2 / (weight.shape[0] * 9), rel=0.02)


def torch_attention(ours: Attention, width: int) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(width, ours.heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.project.weight)
        theirs.out_proj.bias.copy_(ours.project.bias)
    return theirs


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_torchs(heads: int) -> None:
    ours = Attention(16, heads)
    x = torch.randn(3, 5, 16)
    expected, _ = torch_attention(ours, 16)(x, x, x)
    torch.testing.assert_close(ours(x), expected)


def test_encoder_block_is_torchs_pre_norm_layer() -> None:
    ours = EncoderBlock(16, 4)
    theirs = nn.TransformerEncoderLayer(
        16, 4, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs.self_attn = torch_attention(ours.attention, 16)
    theirs.norm1, theirs.norm2, theirs.linear1, theirs.linear2 = ours.norm1, ours.norm2, ours.mlp[0], ours.mlp[2]
    for norm in (ours.norm1, ours.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_vit_embeds_each_patch_by_one_linear_map() -> None:
    model = vit((3, 8, 12), 10, patch=4, width=8, depth=0, heads=1)
    x = torch.randn(2, 3, 8, 12)
    patches = F.unfold(x, kernel_size=4, stride=4).transpose(1, 2)  # [2, 6 patches, 48], row by row
    tokens = patches @ model.embed.weight.flatten(1).T + model.embed.bias + model.position
    torch.testing.assert_close(model(x), model.head(model.norm(tokens).mean(dim=1)))


@pytest.mark.parametrize(
    ("shape", "patch", "tokens"),
    [((1, 8, 8), 2, 16), ((1, 16, 16), 2, 64), ((1, 28, 28), 4, 49), ((3, 32, 32), 4, 64), ((3, 64, 64), 8, 64)],
)
def test_vit_chooses_a_patch(shape, patch: int, tokens: int) -> None:
    model = vit(shape, 10)
    assert model.patch == patch
    assert len(model.position) == tokens


# What chapters will do with them


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_fx_traces_it(make, shape) -> None:
    model = make(shape, 10).eval()
    traced = torch.fx.symbolic_trace(model)
    for batch in (1, 6):  # traced once for all batch sizes
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)


def fits(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """Accuracy on the images trained on."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("make", MAKERS)
def test_it_learns_32_random_images_by_heart(make) -> None:
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    assert fits(make((1, 8, 8), 10), x, y, steps=60) == 1.0


@pytest.mark.parametrize("make", MAKERS)
def test_bfloat16_autocast(make) -> None:
    model = make((1, 8, 8), 10).eval()
    x = torch.randn(16, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("make", MAKERS)
def test_the_seed_fixes_the_weights(make) -> None:
    torch.manual_seed(5)
    first = make((1, 8, 8), 10).state_dict()
    again_other = make((1, 8, 8), 10).state_dict()
    torch.manual_seed(5)
    again = make((1, 8, 8), 10).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], again_other[name]) for name in first)


@pytest.mark.parametrize("make", MAKERS)
def test_state_dict_round_trip(make, tmp_path) -> None:
    model, other = make((1, 8, 8), 10), make((1, 8, 8), 10)
    model(torch.randn(8, 1, 8, 8))  # batch norm has seen something
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model.eval()(x), other.eval()(x))


# Features before the head, tables, and parts that stay as they are


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_the_head_turns_features_into_logits(make, shape) -> None:
    model, x = make(shape, 7).eval(), torch.randn(3, *shape)
    features = model.embedding(x)
    assert features.shape == (3, model.head.in_features)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: seen.extend(given))
    torch.testing.assert_close(model(x), model.head(features), rtol=0, atol=0)
    torch.testing.assert_close(seen[0], features, rtol=0, atol=0)


def test_names_of_weights_never_change() -> None:
    """Stored weights and recorded runs hang on them."""
    first = {make.__name__: next(iter(make((1, 8, 8), 10).state_dict())) for make in MAKERS}
    assert first == {
        "mlp": "hidden.0.weight",
        "convnet": "features.0.weight",
        "resnet": "stem.0.weight",
        "vit": "position",
    }
    assert "embed.weight" in vit((1, 8, 8), 10).state_dict()


def test_mlp_takes_tables() -> None:
    model = mlp((13,), 3, width=8, depth=1)
    assert model(torch.randn(5, 13)).shape == (5, 3)
    assert (model.input_shape, model.parameter_count) == ((13,), 13 * 8 + 8 + 8 * 3 + 3)
    assert repr(model).startswith("mlp: 13 -> 3 classes, 139 parameters")
    for make in (convnet, resnet, vit):
        with pytest.raises(ValueError, match=r"input_shape must be three positive integers .*, got \(13,\)"):
            make((13,), 3)
    with pytest.raises(ValueError, match="input_shape=0: must be a whole number of at least 1"):
        mlp((0,), 3)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_is_frozen_stays_while_the_rest_is_fitted(copied) -> None:
    data, recipe = load("digits", train_size=100), Recipe(epochs=1)
    model = convnet(data.input_shape, 10, width=4)
    freeze(freeze(model.features))
    model = copied(model)
    before, expected = state(model), model.eval().embedding(torch.ones(2, 1, 8, 8))
    fit(model, data, recipe, seed=0, progress=False)
    assert changed(model, before) == {"head.weight", "head.bias"}
    torch.testing.assert_close(model.train().embedding(torch.ones(2, 1, 8, 8)), expected, rtol=0, atol=0)

    thaw(model.features)
    fit(model, data, recipe, seed=0, progress=False)
    assert changed(model, before) == set(before), "batch norm's statistics too"
    assert 0 <= evaluate(model, data.test).accuracy <= 1


def test_gradients_pass_through_what_is_frozen() -> None:
    model = resnet((1, 8, 8), 10, width=4)
    freeze(model.stages)
    model.train()
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    assert model.stem[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.stages.parameters())
    assert model.parameter_count == sum(p.numel() for p in [*model.stem.parameters(), *model.head.parameters()])


def test_frozen_dropout_lets_all_through_until_it_is_thawed() -> None:
    net = nn.Sequential(freeze(nn.Dropout(0.5)), nn.Dropout(0.0)).train()
    x = torch.ones(1000)
    assert torch.equal(net(x), x)
    thaw(net).train()
    assert not torch.equal(net(x), x)


def test_frozen_parts_compute_as_in_training_for_a_while() -> None:
    layer, seen = freeze(nn.Dropout(0.5)), []
    layer.register_forward_pre_hook(lambda part, _: seen.append(part.training))
    x = torch.ones(1000)
    with as_in_training([layer]):
        assert not torch.equal(layer(x), x)
    assert torch.equal(layer.train()(x), x)
    assert seen == [True, False]


def test_freezing_leaves_the_hooks_of_others_alone() -> None:
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda *_: seen.append(1))
    thaw(freeze(layer))(torch.ones(1, 2))
    assert seen == [1]
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_fx_traces_what_is_frozen(make) -> None:
    model, x = freeze(make((1, 8, 8), 10)), torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model).train()(x), model(x), rtol=0, atol=0)


# Bad arguments


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8, 8), (0, 8, 8), (1, 8.0, 8), (1, -8, 8)], ids=str)
def test_a_bad_input_shape_is_refused(make, shape) -> None:
    with pytest.raises(ValueError, match="input_shape must be three positive integers"):
        make(shape, 10)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["classes", "width"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "8"])
def test_a_bad_size_is_refused(make, name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}: must be a whole number of at least 1"):
        make((1, 8, 8), **{"classes": 10, name: value})


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (mlp, {"depth": -1}, "depth=-1: must be a whole number of at least 0"),
        (vit, {"depth": 1.5}, "depth=1.5: must be a whole number of at least 0"),
        (vit, {"heads": 0}, "heads=0: must be a whole number of at least 1"),
        (vit, {"width": 30, "heads": 4}, r"width must be a multiple of heads \(4\), got 30"),
        (vit, {"patch": 3}, r"patch must divide the image's 8x8 pixels: \[1, 2, 4, 8\], got 3"),
        (vit, {"patch": 0}, "patch must divide"),
        (vit, {"patch": True}, "patch must divide"),
        (resnet, {"blocks": ()}, "blocks must hold one positive integer for each stage"),
        (resnet, {"blocks": (1, 0)}, "blocks must hold one positive integer for each stage"),
        (resnet, {"blocks": (1,) * 5}, "input_shape must be at least 16 pixels"),
    ],
)
def test_other_bad_arguments_are_refused(make, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make((1, 8, 8), 10, **arguments)


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="input_shape must be at least 4 pixels"):
        convnet((1, 3, 8), 10)


@pytest.mark.gpu
@pytest.mark.parametrize("make", MAKERS)
def test_the_gpu_computes_the_same(make) -> None:
    model, x = make((3, 32, 32), 10).eval(), torch.randn(4, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)  # TF32 convolutions
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert model(x.cuda()).dtype == torch.bfloat16
    y = torch.randint(10, (32,), device="cuda")
    assert fits(make((1, 8, 8), 10).cuda(), torch.randn(32, 1, 8, 8, device="cuda"), y, steps=60) == 1.0
