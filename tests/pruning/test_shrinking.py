"""Groups of channels against torch-pruning, shrunk networks against the masked ones, costs against torch's counters."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import course_lib  # noqa: F401  before torchvision
from course_lib.lab import tracing
from course_lib.lab.costs import cost
from course_lib.lab.models import ConvNet, convnet, mlp, resnet, vit
from course_lib.lab.tracing import CannotShrink, ChannelGroup, Labelling, open_attention
from course_lib.pruning import known
from course_lib.pruning.graph import channel_groups, group_scores, prune_channels, prune_units
from course_lib.pruning.masks import apply_masks, get_masks, is_masked, make_permanent
from course_lib.pruning.savings import is_2_of_4, semi_structured
from course_lib.pruning.shrinking import shrink
from course_lib.pruning.silencing import drop_blocks, silence

SHAPE = (1, 8, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 3, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64)


# --- Networks with what there is in networks --------------------------------------------------------------------------


class Net(nn.Module):
    """A network made of layers and a forward pass, ``(layers, x) -> y``."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        self.steps = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def conv(a: int, b: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **settings)


def flat() -> nn.Module:
    return nn.Sequential(conv(1, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 5))


def written_sizes() -> nn.Module:
    """LeNet as tutorials write it, with the number of channels in ``forward``."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc2(F.relu(net.fc1(F.max_pool2d(F.relu(net.conv(x)), 2).view(-1, 6 * 4 * 4))))

    return Net(forward, conv=conv(1, 6), fc1=nn.Linear(96, 12), fc2=nn.Linear(12, 5))


def read_sizes() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        n, c, h, w = (y := net.conv(x)).shape
        return net.fc(F.gelu(y).reshape(n, c * h, w).transpose(1, 2).mean(1).view(n, -1))

    return Net(forward, conv=conv(1, 6), fc=nn.Linear(48, 5))


def grouped() -> nn.Module:
    return nn.Sequential(
        conv(1, 8), nn.ReLU(), conv(8, 12, groups=4), nn.BatchNorm2d(12), nn.Hardswish(), nn.Conv2d(12, 4, 1),
        nn.Flatten(), nn.Linear(256, 5)
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(1, 6), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 12, groups=6), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )  # fmt: skip


def concatenation() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x), F.relu(net.norm(net.b(x)))
        both = torch.cat([a, b, F.avg_pool2d(a, 3, 1, 1)], dim=1)
        return net.head(net.c(both).mean((2, 3)))

    return Net(forward, a=conv(1, 4), b=conv(1, 6), norm=nn.BatchNorm2d(6), c=conv(14, 6), head=nn.Linear(6, 5))


def squeeze_excitation() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.silu(net.conv(x))
        gate = net.up(F.relu(net.down(y.mean((2, 3), keepdim=True)))).sigmoid()
        return net.head((y * gate * net.scale).amax((-1, -2)))

    return Net(
        forward, conv=conv(1, 8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), head=nn.Linear(8, 5),
        scale=nn.Parameter(torch.rand(8, 1, 1, generator=generator()) + 0.5),
    )  # fmt: skip


def group_norms() -> nn.Module:
    return nn.Sequential(
        conv(1, 8), nn.GroupNorm(4, 8), nn.PReLU(8), conv(8, 6), nn.InstanceNorm2d(6, affine=True), nn.PReLU(),
        conv(6, 4), nn.GroupNorm(1, 4), nn.Upsample(scale_factor=2), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def u_net() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        skip = F.relu(net.enter(x))
        deep = F.relu(net.up(F.relu(net.down(skip))))
        wide = F.pixel_shuffle(net.wide(torch.cat((skip, deep), 1)), 2)
        return net.leave(wide)

    return Net(
        forward, enter=conv(1, 4), down=conv(4, 8, stride=2), up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        wide=conv(10, 12), leave=conv(3, 2),
    )  # fmt: skip


def gated() -> nn.Module:
    """A gated linear unit by ``chunk``, a layer used twice, and a residual sum of both."""

    def forward(net: Any, x: Tensor) -> Tensor:
        a, b = net.both(x.flatten(1)).chunk(2, dim=-1)
        h = a * torch.sigmoid(b)
        h += F.relu(net.twice(F.relu(net.twice(h))))
        left, right = net.parts(h).split([4, 6], dim=1)
        return net.head(torch.cat([left[:, 1:], right[:, None, :3].squeeze(1), h], 1))

    return Net(
        forward, both=nn.Linear(64, 16), twice=nn.Linear(8, 8), parts=nn.Linear(8, 10), head=nn.Linear(14, 5)
    )  # fmt: skip


def shuffled_channels() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        n, c, h, w = y.shape
        left, right = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
        return net.head(torch.cat([net.b(left), right], 1).mean((2, 3)))

    return Net(forward, a=conv(1, 8), b=conv(4, 6), head=nn.Linear(10, 5))


class HandmadeAttention(nn.Module):
    """As in many repositories: three layers, sizes in attributes, the products written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_size, self.all_size, self.depth = heads, width // heads, width, heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, self.num_heads, self.head_size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = F.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.head_size), dim=-1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape[0], -1, self.all_size))


def language_model() -> nn.Module:
    """Words, positions, attention by hand, and a head tied to the embedding."""
    net = Net(
        lambda net, x: net.head(F.relu(net.mlp(net.norm(e := net.embed(x) + net.position) + net.attention(e)))),
        embed=nn.Embedding(11, 12), position=nn.Parameter(torch.randn(7, 12, generator=generator())),
        norm=nn.LayerNorm(12), attention=HandmadeAttention(12, 4), mlp=nn.Linear(12, 12), head=nn.Linear(12, 11),
    )  # fmt: skip
    net.head.weight = net.embed.weight
    return net


WORDS = torch.randint(11, (3, 7), generator=generator())

MODELS: dict[str, Callable[[], Any]] = {
    "mlp": partial(mlp, SHAPE, 5, width=12),
    "convnet": partial(convnet, SHAPE, 5, width=4),
    "resnet": partial(resnet, SHAPE, 5, width=4, blocks=(2, 1)),
    "vit": partial(vit, SHAPE, 5, width=16, depth=2, heads=4),
    "flat": flat,
    "read_sizes": read_sizes,
    "grouped": grouped,
    "depthwise": depthwise,
    "concatenation": concatenation,
    "squeeze_excitation": squeeze_excitation,
    "group_norms": group_norms,
    "u_net": u_net,
    "gated": gated,
    "shuffled_channels": shuffled_channels,
    "language_model": language_model,
    "written_sizes": written_sizes,
}


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """One of the networks, with batch norms that have seen data."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, tracing.BATCH_NORMS):
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, 0, 0.3)
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 2)
    return model.to(dtype).eval()


def example(name: str) -> Tensor:
    return WORDS if name == "language_model" else images()


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def widest_gap(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        one, other = a(x), b(x)
    assert one.shape == other.shape
    assert one.std() > 1e-3  # a network that says nothing would prove nothing
    return float((one - other).abs().max())


# --- Groups against torch-pruning -------------------------------------------------------------------------------------


def torchvision_model(name: str) -> Any:
    from torchvision import models

    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


AGAINST_TORCH_PRUNING = {
    "resnet18": (lambda: torchvision_model("resnet18"), (3, 32, 32)),
    "mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), (3, 32, 32)),
    "resnet": (lambda: make("resnet", dtype=torch.float32), SHAPE),
    "convnet": (lambda: make("convnet", dtype=torch.float32), SHAPE),
    "mlp": (lambda: make("mlp", dtype=torch.float32), SHAPE),
    "flat": (lambda: make("flat", dtype=torch.float32), SHAPE),
}


def theirs(model: Any, x: Tensor) -> dict[frozenset[tuple[str, bool]], Any]:
    """torch-pruning's groups by their members: (layer, is it its output channels)."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        members = {(names.get(dep.target.module), "out" in dep.handler.__name__) for dep, _ in group}
        found[frozenset(member for member in members if member[0] is not None)] = group
    return found


def members(group: ChannelGroup) -> frozenset[tuple[str, bool]]:
    return frozenset((member.layer, member.dim == 0) for member in group.members)


@pytest.mark.parametrize("name", AGAINST_TORCH_PRUNING)
def test_groups_and_their_importance_are_torch_prunings(name: str) -> None:
    build, shape = AGAINST_TORCH_PRUNING[name]
    model, x = build(), torch.randn(1, *shape, generator=generator())
    groups = channel_groups(model, x)
    expected = theirs(model, x)
    assert {members(group) for group in groups} == set(expected)
    prunable = [group for group in groups if group.why_not is None]
    assert len(prunable) == len(groups) - 1
    for group in prunable:
        # It leaves depthwise filters out.
        heard = tuple(m for m in group.members if getattr(model.get_submodule(m.layer), "groups", 1) == 1)
        counted = replace(group, members=heard)
        importance = tp.importance.GroupMagnitudeImportance(p=2)(expected[members(group)])
        assert group.units == len(importance) > 1
        torch.testing.assert_close(group_scores(model, [counted])[group.name], importance, rtol=2e-5, atol=0)


def test_units_of_attention_are_heads() -> None:
    groups = {group.name: group for group in channel_groups(make("vit"), images())}
    heads = groups["blocks.0.attention.qkv"]
    assert heads.units == 4
    qkv, _, project = heads.members
    assert (qkv.name, project.name, project.dim) == (
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.project.weight",
        1,
    )
    assert qkv.indices[1].tolist() == [*range(4, 8), *range(20, 24), *range(36, 40)]
    assert project.indices[1].tolist() == [4, 5, 6, 7]
    assert groups["blocks.0.mlp.0"].units == 64
    assert groups["embed"].why_not == "blocks.0.norm1 mixes all of it"
    assert groups["head"].why_not == "it is the model's output"


def vision_transformer() -> nn.Module:
    """torchvision's, as its ``vit_b_16`` is made, but small."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=40, num_classes=5)
    for parameter in model.parameters():  # its head begins with zeros
        parameter.data.normal_(std=0.3)
    return model.double().eval()


def test_torchvisions_transformer_loses_whole_heads_and_hidden_units() -> None:
    model, x = vision_transformer(), torch.randn(2, 3, 16, 16, generator=generator(), dtype=torch.float64)
    as_it_came = model(x)
    masked = prune_channels(copy.deepcopy(model), x, 0.5)
    small = shrink(masked, x)
    assert widest_gap(masked, small, x) <= 1e-12
    assert (small(x) - as_it_came).abs().max() > 1e-2
    assert type(small) is type(model)
    for block in small.encoder.layers:
        attention = block.self_attention
        assert (attention.heads, attention.query.out_features, attention.project.in_features) == (2, 12, 12)
        assert (block.mlp[0].out_features, block.mlp[3].in_features) == (20, 20)
    assert widest_gap(model, shrink(model, x), x) <= 1e-12  # nothing to cut
    assert count(shrink(model, x)) == count(model)


def test_torchvisions_transformer_is_cut_as_torch_pruning_cuts_it() -> None:
    """Hidden units from its own class, and heads where its attention is open (as torch's, it has no fewer heads)."""
    model, x = vision_transformer(), torch.randn(2, 3, 16, 16, generator=generator(), dtype=torch.float64)
    weak = "encoder.layers.encoder_layer_1"
    groups = {group.name: group for group in channel_groups(model, x)}
    hidden, heads = groups[f"{weak}.mlp.0"], groups[f"{weak}.self_attention.query"]
    assert (hidden.units, heads.units, heads.why_not) == (40, 4, None)
    units = {hidden.name: torch.tensor([1, 5, 38]), heads.name: torch.tensor([0, 2])}
    small = shrink(prune_units(open_attention(copy.deepcopy(model)), [hidden, heads], units), x)

    theirs = open_attention(copy.deepcopy(model))
    block = theirs.get_submodule(weak)
    rows = [*range(6), *range(12, 18)]
    for layer, indices in ((block.mlp[0], [1, 5, 38]), (block.self_attention.query, rows)):
        graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
        graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=indices).prune()
    block.self_attention.heads = 2
    assert [p.shape for p in small.parameters()] == [p.shape for p in theirs.parameters()]
    assert widest_gap(theirs, small, x) <= 1e-12

    untouched = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(untouched, example_inputs=x)
    first = untouched.get_submodule(weak).mlp[0]
    graph.get_pruning_group(first, tp.prune_linear_out_channels, idxs=[1, 5, 38]).prune()
    only_hidden = shrink(prune_units(open_attention(copy.deepcopy(model)), [hidden], units), x)
    assert widest_gap(untouched, only_hidden, x) <= 1e-12


def test_a_head_of_torchs_attention_that_nobody_hears_is_cut() -> None:
    model, x = vision_transformer(), torch.randn(2, 3, 16, 16, generator=generator(), dtype=torch.float64)
    attention = model.encoder.layers[0].self_attention
    attention.out_proj.weight.data[:, 6:12] = 0  # head 1
    small = shrink(model, x)
    assert [block.self_attention.heads for block in small.encoder.layers] == [3, 4]
    torch.testing.assert_close(small.encoder.layers[0].self_attention.query.weight[6:], attention.in_proj_weight[12:24])
    assert isinstance(attention, nn.MultiheadAttention)  # the model itself is left alone
    assert widest_gap(model, small, x) <= 1e-12


def test_a_flattened_channel_is_all_its_pixels() -> None:
    group = channel_groups(make("flat"), images())[0]
    assert {member.name for member in group.members} >= {"0.weight", "0.bias", "1.weight", "1.running_mean", "5.weight"}
    last = next(member for member in group.members if member.name == "5.weight")
    assert last.indices[2].tolist() == list(range(32, 48))


def test_a_group_through_cat_has_the_columns_of_its_own_part() -> None:
    groups = {group.name: group for group in channel_groups(make("concatenation"), images())}
    columns = {name: next(m for m in groups[name].members if m.name == "c.weight").indices.tolist() for name in "ab"}
    assert columns["a"] == [[0, 10], [1, 11], [2, 12], [3, 13]]
    assert columns["b"] == [[i] for i in range(4, 10)]


# --- Shrinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", MODELS)
def test_the_shrunk_network_computes_what_the_masked_one_does(name: str, scope: Any) -> None:
    model, x = make(name), example(name)
    prune_channels(model, x, 0.5, scope=scope)
    small = shrink(model, x)
    assert widest_gap(model, small, images(5, seed=1) if x.is_floating_point() else x.flip(0)) <= 1e-12
    assert count(small) < 0.75 * count(model)
    assert not any(is_masked(module) for module in small.modules())
    assert (type(small) is type(model)) == (name not in ("written_sizes", "gated"))  # sizes written in their code
    for group in channel_groups(small, x):  # nothing dead is left
        assert group.why_not is not None or (group_scores(small, [group])[group.name] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "vit"])
def test_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    model, x = make(name, dtype=dtype), images().to(dtype)
    small = shrink(prune_channels(model, x, 0.5), x)
    assert widest_gap(model, small, x) <= (1e-5 if dtype == torch.float32 else 0.1)
    assert {tensor.dtype for tensor in small.state_dict().values()} <= {dtype, torch.int64}


@pytest.mark.parametrize(
    ("name", "pixels"), [("resnet18", 32), ("mobilenet_v2", 32), ("squeezenet1_1", 64), ("shufflenet_v2_x0_5", 32)]
)
def test_on_torchvision_models(name: str, pixels: int) -> None:
    model, x = torchvision_model(name), torch.randn(2, 3, pixels, pixels, generator=generator())
    prune_channels(model, x, 0.5)
    small = shrink(model, x)
    with torch.no_grad():
        a, b = model(x), small(x)
    assert (a - b).abs().max() <= 1e-5
    assert type(small) is type(model)
    # a layer between two halved groups keeps a quarter; shufflenet's shuffles hold some channels back
    assert 0.2 < count(small) / count(model) < (0.6 if "shuffle" in name else 0.28)


def test_half_of_a_convnet_is_a_convnet_of_half_the_width() -> None:
    model = make("convnet")
    small = shrink(prune_channels(model, images(), 0.5), images())
    expected = convnet(SHAPE, 5, width=2)
    assert str(small) == str(expected)
    assert [(k, v.shape) for k, v in small.state_dict().items()] == [
        (k, v.shape) for k, v in expected.state_dict().items()
    ]
    # and it holds the original's numbers
    kept = [f for f in range(4) if model.features[0].weight[f].any()]
    torch.testing.assert_close(small.features[0].weight, model.features[0].weight[kept], rtol=0, atol=0)
    torch.testing.assert_close(small.features[1].running_var, model.features[1].running_var[kept], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet", "convnet"])
def test_both_train_alike(name: str) -> None:
    """After steps with momentum and weight decay in training mode, the masked network still is the shrunk one."""
    masked, x, y = make(name), images(16), torch.arange(16) % 5
    prune_channels(masked, x, 0.5)
    small = shrink(masked, x)
    before = copy.deepcopy(small)
    for model in (masked, small):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert widest_gap(masked, small, x) <= 1e-12  # in training mode
    assert widest_gap(masked.eval(), small.eval(), x) <= 1e-12
    assert widest_gap(before, small, x) > 1e-3
    again = shrink(masked, x)
    for a, b in zip(again.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_model_is_left_alone_and_the_copy_takes_after_it() -> None:
    model, x = make("resnet"), images()
    prune_channels(model, x, 0.5)
    model.stem.requires_grad_(False)
    model.train()
    model.stem[1].eval()
    state, masks, random = copy.deepcopy(model.state_dict()), get_masks(model), torch.get_rng_state()
    small = shrink(model, x)
    assert torch.equal(random, torch.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(torch.equal(mask, masks[name]) for name, mask in get_masks(model).items())
    assert [m.training for m in small.modules()] == [m.training for m in make_permanent(copy.deepcopy(model)).modules()]
    assert not small.stem[0].weight.requires_grad
    assert small.head.weight.requires_grad
    assert {id(p) for p in small.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    torch.save(small.state_dict(), io.BytesIO())
    copy.deepcopy(small)
    assert widest_gap(shrink(small.eval(), x), small, x) == 0  # nothing more to cut: once is enough
    assert count(shrink(small, x)) == count(small)


def test_sizes_in_attributes_follow() -> None:
    model, x = make("vit"), images()
    small = shrink(prune_channels(model, x, 0.5), x)
    assert [block.attention.heads for block in small.blocks] == [2, 2]
    assert [block.attention.heads for block in model.blocks] == [4, 4]
    assert small.patch == model.patch
    text = make("language_model")
    attention = shrink(prune_channels(text, WORDS, 0.5), WORDS).attention
    # of the two attributes that are 4, only the one that forward uses
    assert (attention.num_heads, attention.head_size, attention.all_size, attention.depth) == (2, 3, 6, 4)


def test_sizes_in_the_code_make_it_a_graph_module() -> None:
    model, x = make("written_sizes"), images()
    small = shrink(prune_channels(model, x, 0.5), x)
    assert isinstance(small, fx.GraphModule)
    assert "view(-1, 48)" in small.code
    assert small.conv.out_channels == 3


def test_tied_weights_stay_tied() -> None:
    net = Net(
        lambda net, x: net.b(F.relu(net.a(F.relu(net.first(x.flatten(1)))))), a=nn.Linear(6, 6), b=nn.Linear(6, 6)
    )
    net.first = nn.Linear(64, 6)
    net.b.weight = net.a.weight
    net.double().eval()
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
    # Rows of `a` are rows of the output layer `b`: they stay, and so do its columns' partners in the other dimension.
    small = shrink(net, images())
    assert small.b.weight is small.a.weight
    assert small.first.out_features == small.a.in_features == small.b.in_features
    assert widest_gap(net, small, images()) <= 1e-12


# --- What counts as dead ----------------------------------------------------------------------------------------------


def zero(*tensors: Tensor) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()


def test_a_channel_that_nobody_reads_is_dead() -> None:
    model, x = make("mlp"), images()
    zero(model.hidden[2].weight[:, 3], model.head.weight[:, 5])
    small = shrink(model, x)
    assert (small.hidden[0].out_features, small.hidden[2].out_features) == (11, 11)
    assert widest_gap(model, small, x) <= 1e-12


def test_what_only_the_dead_read_is_dead() -> None:
    model, x = make("mlp"), images()
    zero(model.head.weight[:, 2:])  # two units of the second layer are read …
    zero(model.hidden[2].weight[:2, 7:])  # … and they read seven of the first
    small = shrink(model, x)
    assert (small.hidden[0].out_features, small.hidden[2].out_features) == (7, 2)
    assert widest_gap(model, small, x) <= 1e-12


def test_a_channel_that_relu_always_stops_is_dead_and_a_constant_is_not() -> None:
    model, x = make("convnet"), images()
    convolution, norm = model.features[0], model.features[1]
    zero(convolution.weight[:2])
    with torch.no_grad():
        silent = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias[0] -= silent[0] + 1  # always -1 before the ReLU
        norm.bias[1] -= silent[1] - 1  # always 1
    small = shrink(model, x)
    assert small.features[0].out_channels == 3
    assert widest_gap(model, small, x) <= 1e-12


def test_a_dead_sum_needs_both_sides_dead() -> None:
    model, x = make("resnet"), images()
    stream = [
        model.stem,
        (model.stages[0][0].conv2, model.stages[0][0].norm2),
        (model.stages[0][1].conv2, model.stages[0][1].norm2),
    ]
    for layer, norm, *_ in stream[:2]:
        zero(layer.weight[1], norm.weight[1], norm.bias[1])
    assert shrink(model, x).stem[0].out_channels == 4
    layer, norm = stream[2]
    zero(layer.weight[1], norm.weight[1], norm.bias[1])
    small = shrink(model, x)
    assert small.stem[0].out_channels == 3
    assert widest_gap(model, small, x) <= 1e-12


def test_a_layer_keeps_one_unit_when_all_are_dead() -> None:
    for name in ("mlp", "convnet", "resnet", "vit", "gated", "concatenation"):
        model, x = make(name), images()
        groups = [group for group in channel_groups(model, x) if group.why_not is None]
        prune_units(model, groups[:1], {groups[0].name: torch.arange(groups[0].units)})
        small = shrink(model, x)
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
        first = next(group for group in channel_groups(small, x) if group.name == groups[0].name)
        assert first.units == 1, name


@pytest.mark.parametrize("name", ["convnet", "resnet", "vit", "squeeze_excitation", "grouped", "group_norms", "u_net"])
def test_what_is_known_holds_for_every_input(name: str) -> None:
    """Zeros at random: where running on NaN says what a layer hears, so it is, and where it does not, it varies."""
    model = make(name)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            rows = torch.rand(len(parameter), generator=generator(i)) < 0.5
            parameter[rows] = 0
    labelling = Labelling(model, (images(2),))

    class Kept(known.Known):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            found[n] = result.clone() if isinstance(result, Tensor) else result
            return result

    class Real(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            real.setdefault(n, []).append(result.clone() if isinstance(result, Tensor) else result)
            return result

    found: dict[fx.Node, Any] = {}
    real: dict[fx.Node, list[Any]] = {}
    with torch.no_grad():
        Kept(labelling).look((images(2),))
        for seed in range(4):
            Real(labelling.traced).run(images(2, seed=seed) * 3)
    certain = varying = 0
    for node, value in found.items():
        if node.op == "output" or not isinstance(value, Tensor):
            continue
        values = torch.stack(real[node])
        sure = ~value.isnan()
        torch.testing.assert_close(values[:, sure], value[sure].expand(4, -1), rtol=0, atol=1e-12)
        certain += int(sure.sum())
        varying += int((values[:, ~sure].amax(0) > values[:, ~sure].amin(0)).sum())
    assert certain > 50
    assert varying > 50


def test_zero_times_unknown_is_zero() -> None:
    nan = math.nan
    a, b = torch.tensor([0, 2.0, nan, nan, 3.0, nan]), torch.tensor([nan, nan, 0, 4.0, 5.0, nan])
    expected = torch.tensor([0, nan, 0, nan, 15.0, nan])
    torch.testing.assert_close(known.times(torch.mul, a, b), expected, equal_nan=True)
    left = torch.tensor([[nan, 0.0], [1.0, 2.0]])
    right = torch.tensor([[0.0, 1.0, nan], [nan, 2.0, 3.0]])
    expected = torch.tensor([[0, nan, nan], [nan, 5.0, nan]])
    torch.testing.assert_close(known.times(torch.matmul, left, right), expected, equal_nan=True)


@pytest.mark.parametrize("operation", sorted(tracing.ELEMENTWISE - {"stochastic_depth"}))
def test_elementwise_operations_keep_nan_and_places(operation: str) -> None:
    """Their table promises it; labels and what is known rest on it."""
    names = (operation, operation.replace("floordiv", "floor_divide").replace("truediv", "true_divide").lstrip("i"))
    at = [getattr(place, n, None) for n in names for place in (torch, F, Tensor)]
    function = next(f for f in at if callable(f))
    x = torch.tensor([0.5, math.nan, 2.0])
    extra: dict[str, tuple[Any, ...]] = dict.fromkeys(
        ("add", "div", "iadd", "imul", "isub", "mul", "multiply", "sub", "subtract", "divide", "maximum", "minimum"),
        (torch.tensor([2.0, 2.0, 2.0]),),
    )
    extra |= dict.fromkeys(
        ("itruediv", "truediv", "true_divide", "floordiv", "pow", "type_as"), (torch.full((3,), 2.0),)
    )
    extra |= {"clamp": (-1.0, 1.0), "clip": (-1.0, 1.0), "clamp_min": (0.0,), "clamp_max": (1.0,)}
    extra |= {"threshold": (0.1, 0.0), "to": (torch.float64,)}
    extra |= {n: (0.5, False) for n in tracing.ELEMENTWISE if "dropout" in n}
    x = x[None, :, None, None, None].expand(2, 3, 1, 1, 1) if operation == "dropout3d" else x
    x = (
        x.view(1, 3, 1, 1)
        if operation in ("dropout2d", "feature_dropout")
        else x.view(1, 3, 1)
        if operation == "dropout1d"
        else x
    )
    result = function(x, *extra.get(operation, ()))
    assert result.shape == x.shape
    assert torch.equal(result.isnan(), x.isnan())


def test_integers_of_the_example_are_no_knowledge() -> None:
    """Black example images: what the network says to them, it need not say to others."""
    layers = make("convnet")
    model = Net(lambda net, x: net.layers(x.to(torch.float64) / 255), layers=layers).eval()
    prune_channels(model, torch.zeros(2, *SHAPE, dtype=torch.uint8), 0.5)
    small = shrink(model, torch.zeros(2, *SHAPE, dtype=torch.uint8))
    assert [small.layers.features[i].out_channels for i in (0, 4, 8)] == [2, 4, 8]
    x = torch.randint(256, (3, *SHAPE), generator=generator(), dtype=torch.uint8)
    assert widest_gap(model, small, x) <= 1e-12


def test_parameters_that_forward_hands_to_functions_stay() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = F.layer_norm(net.a(x.flatten(1)), (8,), net.scale, net.shift)
        return net.head(F.relu(net.b(h)))

    torch.manual_seed(0)
    model = Net(
        forward, a=nn.Linear(64, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 5),
        scale=nn.Parameter(torch.rand(8) + 1), shift=nn.Parameter(torch.rand(8)),
    ).double().eval()  # fmt: skip
    prune_channels(model, images(), 0.5)
    small = shrink(model, images())
    assert (small.a.out_features, small.b.out_features, len(small.scale)) == (8, 3, 8)
    assert widest_gap(model, small, images()) <= 1e-12


# --- Masks on filters alone -------------------------------------------------------------------------------------------


def drop_filters(model: Any, layers: dict[str, list[int]]) -> None:
    masks = {}
    for name, rows in layers.items():
        masks[name] = torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool)
        masks[name][rows] = False
    apply_masks(model, masks)


def test_silence_ends_what_masks_on_filters_began() -> None:
    model, x = make("convnet"), images()
    drop_filters(model, {"features.0": [0, 2], "features.4": [1, 5, 6], "features.8": [3], "head": [4]})
    bias = model.head.bias.clone()
    loud = shrink(model, x)
    assert widest_gap(model, loud, x) <= 1e-12
    silent = silence(copy.deepcopy(model), x)
    assert (silent.features[1].bias[[0, 2]] == 0).all()
    assert torch.equal(silent.features[1].bias[[1, 3]], model.features[1].bias[[1, 3]])
    assert torch.equal(silent.head.bias, bias)  # the class that is never said keeps its bias: it is the output
    small = shrink(silent, x)
    assert widest_gap(silent, small, x) <= 1e-12
    assert [small.features[i].out_channels for i in (0, 4, 8)] == [2, 5, 15]
    hidden = make("mlp")
    drop_filters(hidden, {"hidden.0": [0, 1, 2], "hidden.2": [5]})
    small = shrink(silence(hidden, x), x)
    assert [small.hidden[i].out_features for i in (0, 2)] == [9, 11]


def test_blocks_without_a_branch_are_dropped() -> None:
    for name, layers in (
        ("resnet", ["stages.0.1.conv1", "stages.0.1.conv2"]),
        ("vit", ["blocks.1.attention.qkv", "blocks.1.attention.project", "blocks.1.mlp.0", "blocks.1.mlp.2"]),
    ):
        model, x = make(name), images()
        drop_filters(model, {layer: list(range(len(model.get_submodule(layer).weight))) for layer in layers})
        assert not any(
            isinstance(m, nn.Identity)
            for m in drop_blocks(model, x).get_submodule(layers[0].rpartition(".")[0].split(".")[0])
        )
        silence(model, x)
        small = drop_blocks(model.train(), x)
        block = "stages.0.1" if name == "resnet" else "blocks.1"
        assert isinstance(small.get_submodule(block), nn.Identity)
        assert isinstance(small.get_submodule(block[:-1] + "0"), type(model.get_submodule(block)))
        assert small.training
        assert widest_gap(model.eval(), small.eval(), x) <= 1e-12
        assert count(shrink(small, x)) <= count(small) < count(model)


def test_a_block_that_rectifies_what_it_gets_is_not_idle() -> None:
    torch.manual_seed(0)
    block = Net(lambda net, x: F.relu(net.b(F.relu(net.a(x))) + x), a=conv(4, 4), b=conv(4, 4))
    model = nn.Sequential(conv(1, 4), block, copy.deepcopy(block), nn.Flatten(), nn.Linear(256, 5)).double().eval()
    for inner in (model[1], model[2]):
        zero(*inner.parameters())
    small = drop_blocks(model, images())
    assert [type(layer) for layer in small] == [nn.Conv2d, Net, nn.Identity, nn.Flatten, nn.Linear]
    assert widest_gap(model, small, images()) == 0


# --- prune_channels ---------------------------------------------------------------------------------------------------


def test_prune_channels_takes_the_weakest() -> None:
    model, x = make("resnet"), images()
    groups = [group for group in channel_groups(model, x) if group.why_not is None]
    before = group_scores(model, groups)
    prune_channels(model, x, 0.25)
    after = group_scores(model, groups)
    for group in groups:
        gone = after[group.name] == 0
        assert gone.sum() == group.units // 4
        assert before[group.name][gone].max() < before[group.name][~gone].min()


def test_global_scope_compares_groups() -> None:
    model, x = make("convnet"), images()
    groups = [group for group in channel_groups(model, x) if group.why_not is None]
    before = torch.cat(list(group_scores(model, groups).values()))
    prune_channels(model, x, 0.5, scope="global")
    gone = torch.cat(list(group_scores(model, groups).values())) == 0
    assert gone.sum() == len(gone) // 2
    assert before[gone].max() < before[~gone].min()


def test_no_group_loses_all_its_units() -> None:
    model, x = make("convnet"), images()
    with torch.no_grad():
        for parameter in model.features[:4].parameters():
            parameter *= 1
    scores = {
        name: torch.ones_like(model.get_submodule(name).weight) for name in ("features.0", "features.4", "features.8")
    }
    scores["features.0"] *= 1e-6
    prune_channels(model, x, 0.9, scope="global", scores={**scores, "head": torch.ones_like(model.head.weight)})
    assert [group.units for group in channel_groups(shrink(model, x), x)][:3] >= [1, 1, 1]
    assert widest_gap(model, shrink(model, x), x) <= 1e-12


def test_scores_of_a_criterion_decide() -> None:
    model, x = make("mlp"), images()
    scores = {"hidden.0": torch.ones_like(model.hidden[0].weight), "hidden.2": torch.ones_like(model.hidden[2].weight)}
    scores["hidden.0"][[3, 8]] = 0
    scores["hidden.2"][[0, 1]] = 0
    prune_channels(model, x, 2 / 12, scores=scores)
    masks = get_masks(model)
    assert (~masks["hidden.0"].any(1)).nonzero().flatten().tolist() == [3, 8]
    assert (~masks["head"].any(0)).nonzero().flatten().tolist() == [0, 1]


def test_round_to_groups_and_repetition() -> None:
    model, x = convnet(SHAPE, 5, width=16).double(), images()
    prune_channels(model, x, 0.4, round_to=8)
    assert [shrink(model, x).features[i].out_channels for i in (0, 4, 8)] == [8, 16, 40]  # of 9.6, 19.2, 38.4
    prune_channels(model, x, 0.75, round_to=8)
    assert [shrink(model, x).features[i].out_channels for i in (0, 4, 8)] == [
        8,
        8,
        16,
    ]  # the fraction of all, not of the rest
    model = convnet(SHAPE, 5, width=16).double()
    prune_channels(model, x, 0.5, groups=["features.4"])
    assert [shrink(model, x).features[i].out_channels for i in (0, 4, 8)] == [16, 16, 64]
    model = vit(SHAPE, 5, width=32, heads=4).double()
    prune_channels(model, x, 0.25, round_to=8)  # a head of 8 channels is a multiple of 8 by itself
    assert shrink(model, x).blocks[0].attention.heads == 3


def test_masks_that_were_there_stay() -> None:
    model, x = make("mlp"), images()
    mask = torch.rand(model.hidden[0].weight.shape, generator=generator()) < 0.5
    apply_masks(model, {"hidden.0": mask})
    prune_channels(model, x, 0.5)
    assert not (get_masks(model)["hidden.0"] & ~mask).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.2}, "sparsity=1.2: must be at least 0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"sparsity": 0.5, "scope": "all"}, "scope='all'"),
        ({"sparsity": 0.5, "round_to": 0}, "round_to=0"),
        ({"sparsity": 0.5, "groups": ["no"]}, "groups names 'no': must be among hidden.0, hidden.2"),
        ({"sparsity": 0.5, "keep": ["no"]}, "keep names 'no'"),
        ({"sparsity": 0.5, "scores": {"x": torch.ones(1)}}, "scores has none of the layers of 'hidden.0'"),
        ({"sparsity": 0.5, "example_input": [1]}, "example_input is a list"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_channels(make("mlp"), **{"example_input": images(), **arguments})


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="no group of channels"):
        prune_channels(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double(), images(), 0.5)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def between(forward: Callable[[Any, Tensor], Tensor], **layers: Any) -> Any:
    """A module with a peculiarity, inside a network."""
    inner = Net(forward, **layers)
    return nn.Sequential(conv(1, 4), inner, nn.Flatten(), nn.LazyLinear(5))


class WithAttention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.hidden = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.hidden(x)).mean(1)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = conv(1, 4), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).mean((2, 3))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def weight_norm() -> nn.Module:
    model = make("convnet")
    nn.utils.parametrizations.weight_norm(model.features[4])
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "control flow": (
        lambda: between(lambda net, x: x if x.sum() > 0 else -x),
        r"^1 \(Net\) cannot be traced: .*control flow.*keep=\['1'\]",
    ),
    "control flow, deeper": (
        lambda: nn.Sequential(conv(1, 4), nn.Sequential(conv(4, 4), Net(lambda net, x: x if x.sum() > 0 else -x))),
        r"^1\.1 \(Net\) cannot be traced: .*keep=\['1\.1'\]",
    ),
    "sort": (lambda: between(lambda net, x: x.sort(1)[0]), "^sort in 1: channels cannot be followed through sort"),
    "cumsum": (lambda: between(lambda net, x: x.cumsum(1)), "cumsum in 1"),
    "shuffle by index": (
        lambda: between(lambda net, x: x[:, net.order], order=torch.tensor([2, 0, 1, 3])),
        "getitem in 1",
    ),
    "recurrent": (lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(1), nn.LSTM(64, 4)), "^2: .*through LSTM; keep"),
    "attention with more keys": (
        partial(WithAttention, add_bias_kv=True),
        "^attention: channels cannot be followed through MultiheadAttention",
    ),
    "torch's own layer": (
        lambda: nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        "^1: channels cannot be followed through TransformerEncoderLayer; keep=",
    ),
    "parametrization": (weight_norm, "^features.4: "),
    "training only": (Auxiliary, "^auxiliary works in training only"),
    "functional": (
        lambda: between(lambda net, x: F.conv2d(x, net.w), w=nn.Parameter(torch.randn(3, 4, 1, 1))),
        "conv2d in 1",
    ),
    "one-dimensional product": (lambda: between(lambda net, x: x @ x.new_ones(8)), "matmul in 1|new_ones in 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(case: str) -> None:
    build, message = REFUSED[case]
    model, x = build().double(), images()
    model.eval()(x)
    state = copy.deepcopy(model.state_dict())
    for function in (shrink, channel_groups, partial(prune_channels, sparsity=0.5)):
        with pytest.raises(CannotShrink, match=message):
            function(model, x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_number_of_channels_in_the_arithmetic_is_noticed() -> None:
    """No rule forbids it, but the result is not the same: the last check finds it."""
    model = between(lambda net, x: x / x.shape[1]).double().eval()
    model(images())
    prune_channels(model, images(), 0.5)
    with pytest.raises(CannotShrink, match="with fewer channels, the network computes something else"):
        shrink(model, images())


def test_keep_leaves_modules_alone() -> None:
    torch.manual_seed(0)
    model, x = WithAttention().double().eval(), images()
    tied = nn.Linear(16, 8).double()
    model.spare, tied.weight = tied, model.hidden[2].weight  # a module that shares its weight is not to change, either
    assert [g.name for g in channel_groups(model, x, keep=["attention", "spare"]) if g.why_not is None] == []
    del model.spare
    prune_channels(model, x, 0.5, keep=["attention"])
    small = shrink(model, x, keep=["attention"])
    assert small.hidden[0].out_features == 8
    assert small.embed.out_features == 8
    assert widest_gap(model, small, x) <= 1e-12
    torch.manual_seed(0)
    branching = nn.Sequential(
        conv(1, 4), nn.ReLU(), conv(4, 6), between(lambda net, x: x if x.sum() > 0 else -x)[1], conv(6, 2)
    )
    branching = branching.double().eval()
    prune_channels(branching, x, 0.5, keep=["3"])
    small = shrink(branching, x, keep=["3"])
    assert [small[i].out_channels for i in (0, 2, 4)] == [2, 6, 2]
    assert widest_gap(branching, small, x) <= 1e-12


def test_outputs_and_inputs_of_fixed_size_stay() -> None:
    """Residual sums with the input, zeros in new channels, an output in the middle."""

    def forward(net: Any, x: Tensor) -> Any:
        y = net.a(x) + x  # the input has 4 channels
        z = net.b(y)
        padded = F.pad(z, (0, 0, 0, 0, 1, 1)) + net.c(z)  # 6 channels, the outer two from c alone
        return {"maps": z, "logits": net.head(padded.mean((2, 3)))}

    torch.manual_seed(0)
    model = Net(forward, a=conv(4, 4), b=conv(4, 4), c=conv(4, 6), head=nn.Linear(6, 5)).double().eval()
    x = images(2, (4, 8, 8))
    groups = channel_groups(model, x)
    assert all(group.why_not is not None for group in groups)
    assert any("fixed size" in str(group.why_not) for group in groups)
    for layer in (model.a, model.b, model.c):
        zero(layer.weight[0], layer.bias[0])
    small = shrink(model, x)
    assert count(small) == count(model)
    assert torch.equal(small(x)["logits"], model(x)["logits"])


def test_a_tuple_of_inputs_and_arguments_with_defaults() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
            h = self.a(x) * scale
            return self.head(F.relu(h if y is None else h + self.b(y)))

    torch.manual_seed(0)
    model, x, y = Two().double().eval(), images(2, (4,)), images(2, (3,))
    prune_channels(model, (x, y), 0.5)
    small = shrink(model, (x, y))
    assert small.a.out_features == small.b.out_features == 3
    torch.testing.assert_close(small(x, y, 2.0), model(x, y, 2.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(shrink(model, (x,))(x), model(x), rtol=0, atol=1e-12)


# --- 2:4 ------------------------------------------------------------------------------------------------------------


def test_the_2_of_4_pattern() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4], [0, 0, 0, 1, 1, 0, 1, 0]])
    assert is_2_of_4(weight)
    weight[0, 1] = 1
    assert not is_2_of_4(weight)
    assert not is_2_of_4(torch.zeros(2, 6))


def test_semi_structured_needs_the_pattern_and_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="no linear layer with at most 2 of 4"):
        semi_structured(model)
    apply_masks(model, {"0": torch.tensor([True, False, False, True]).repeat(64, 16)})
    with pytest.raises(ValueError, match="'0' is on cpu: must be on cuda"):
        semi_structured(model)


@pytest.mark.gpu(emulated=False)
def test_semi_structured_on_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).half().cuda()
    apply_masks(model, {"0": torch.tensor([True, False, False, True]).repeat(256, 32)})
    x = torch.randn(64, 128, device="cuda", dtype=torch.half)
    small = semi_structured(model)
    assert "SparseSemiStructured" in type(small[0].weight).__name__
    torch.testing.assert_close(small(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["convnet", "resnet", "vit", "grouped"])
def test_shrinking_on_the_gpu(name: str) -> None:
    model, x = make(name).cuda(), images().cuda()
    small = shrink(prune_channels(model, x, 0.5), x)
    assert widest_gap(model, small, x) <= 1e-12
    assert {tensor.device.type for tensor in small.state_dict().values()} == {"cuda"}


@pytest.mark.gpu(emulated=False)
@pytest.mark.parametrize("name", ["convnet", "resnet", "vit", "grouped"])
def test_shrinking_frees_memory_of_the_gpu(name: str) -> None:
    model, x = make(name).cuda(), images().cuda()
    assert cost(shrink(prune_channels(model, x, 0.5), x), x).peak_bytes < cost(model, x).peak_bytes


def test_the_models_own_words() -> None:
    """A masked network is traced through its masks being made permanent, and stays masked itself."""
    model, x = make("convnet"), images()
    assert isinstance(model, ConvNet)
    prune_channels(model, x, 0.5)
    assert parametrize.is_parametrized(model.features[0], "weight")
    assert [g.name for g in channel_groups(model, x)] == ["features.0", "features.4", "features.8", "head"]
