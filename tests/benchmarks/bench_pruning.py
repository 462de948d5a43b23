"""How much faster a shrunk network is, in torch's own eager kernels: ``python -m tests.benchmarks.bench_pruning``.

torchvision's ResNet-18 on 64 images of 32×32, 2 threads, inference: half and a quarter of its channels are left,
against all of them, and against what torch-pruning makes of it at the same fraction. All are measured in turns.
"""

import copy

import torch
from torch import nn

import course_lib  # noqa: F401  mends torchvision's import where torch is a CPU-only build
from course_lib.lab.timing import compare_speed
from course_lib.pruning.graph import prune_channels
from course_lib.pruning.masks import make_permanent
from course_lib.pruning.shrinking import shrink

# channels left -> how many times as fast as the whole network, at least
TARGETS = {0.5: 2.6, 0.25: 5.0}
NO_SLOWER = 1.05
THREADS, ROUNDS = 2, 21


def with_torch_pruning(model: nn.Module, x: torch.Tensor, sparsity: float) -> nn.Module:
    """What torch-pruning makes of it: the same fraction of channels in each group, by the same importance."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    with torch.enable_grad():  # it traces by autograd
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=sparsity, ignored_layers=[model.fc]).step()
    return model


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    from torchvision.models import resnet18

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    dense = resnet18(num_classes=10).eval()
    x = torch.randn(64, 3, 32, 32)
    missed = 0
    print(f"ResNet-18 on {len(x)} images of 32x32, {THREADS} threads, medians of {ROUNDS} rounds")
    with torch.no_grad():
        for left, target in TARGETS.items():
            masked = prune_channels(copy.deepcopy(dense), x[:2], 1 - left)
            small = shrink(masked, x[:2])
            difference = float((make_permanent(masked)(x) - small(x)).abs().max())
            theirs = with_torch_pruning(dense, x[:2], 1 - left).eval()
            sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (dense, small, theirs)]
            print(f"{left:.0%} of the channels: {sizes[1]:.2f} of {sizes[0]:.2f} million parameters", end="")
            print(f" (torch-pruning {sizes[2]:.2f}), output within {difference:.0e}")
            speed = compare_speed(lambda: dense(x), lambda: small(x), rounds=ROUNDS, device="cpu")  # noqa: B023
            ok = speed.ratio >= target
            print(f"  dense / shrunk: {speed.ratio:.2f}x (target >= {target}x) {'ok' if ok else 'MISSED'}", end="")
            print(f"  {speed.a.median * 1e3:.1f} ms against {speed.b.median * 1e3:.1f} ms")
            missed += not ok
            against = compare_speed(lambda: small(x), lambda: theirs(x), rounds=ROUNDS, device="cpu")  # noqa: B023
            ok = against.ratio <= NO_SLOWER
            print(f"  shrunk / torch-pruning: {against.ratio:.2f}x (target <= {NO_SLOWER}x) {'ok' if ok else 'MISSED'}")
            missed += not ok
    torch.set_num_threads(threads)
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
