"""The data path against a ``DataLoader`` with per-image transforms: ``python -m tests.benchmarks.bench_data``.

One pass over 10,000 images of 28×28 in shuffled batches of 128, each image shifted at random by up to 2 pixels and
normalised. The images are MNIST's where they lie in the data folder, else glyphs: the work is the same.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

import course_lib  # noqa: F401  mends torchvision's import where torch is a CPU-only build
from course_lib.lab import glyphs
from course_lib.lab.data import DataUnavailable, Split, batches, load, random_shift
from course_lib.lab.timing import compare_speed

IMAGES, BATCH, PIXELS, TARGET = 10_000, 128, 2, 15.0


class PerImage(TorchDataset[tuple[Tensor, int]]):
    """As torchvision's ``MNIST`` does it: each image becomes a PIL image, then passes through the transforms."""

    def __init__(self, split: Split) -> None:
        from torchvision import transforms

        self.images, self.labels = split.images[:, 0].numpy(), split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(28, padding=PIXELS),
                transforms.ToTensor(),
                transforms.Normalize(split.mean, split.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def consume(source: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(len(y) for _, y in source)


def images() -> tuple[str, Split]:
    try:
        return "MNIST", load("mnist").train.subset(torch.arange(IMAGES))
    except DataUnavailable:
        drawn, labels = glyphs.generate(IMAGES)
        return "glyphs", Split(torch.from_numpy(drawn), torch.from_numpy(labels), (0.5,), (0.25,))


def main() -> int:
    """Prints the table and the ratio; returns how many targets were missed."""
    what, split = images()
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(PerImage(split), batch_size=BATCH, shuffle=True, generator=generator)

    def whole_tensor() -> int:
        shift = lambda x, g: random_shift(x, g, PIXELS)  # noqa: E731
        return consume(batches(split, BATCH, generator=generator, augment=shift))

    assert consume(loader) == whole_tensor() == IMAGES
    speed = compare_speed(lambda: consume(loader), whole_tensor, rounds=7, warmup=1, device="cpu")
    print(
        f"data path: {IMAGES:,} images of {what}, batch {BATCH}, random shift of {PIXELS} px, "
        f"{torch.get_num_threads()} threads, median of {speed.rounds} rounds"
    )
    print(f"{'':34}{'seconds':>10}{'images/s':>12}")
    for name, timing in (("DataLoader, per-image transforms", speed.a), ("batches, whole tensors", speed.b)):
        print(f"{name:34}{timing.median:10.3f}{IMAGES / timing.median:12,.0f}")
    verdict = "ok" if speed.ratio >= TARGET else "MISSED"
    print(f"data path against DataLoader: ratio {speed.ratio:.1f}x (target >= {TARGET:.0f}x) {verdict}")
    return int(speed.ratio < TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
