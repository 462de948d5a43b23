"""Chapter 2's study: which optimizer, on a convolutional network and real images, each at its best rate?

Seven optimizers, each tuned over five learning rates a factor of about three apart, with two seeds, on the validation
split; the best rate of each is then trained with five other seeds and measured on the test split. All with a cosine
schedule, weight decay 0, float32. MNIST with 2,000 labels and CIFAR-10 with 10,000: few enough that it matters how
well a run of this length uses them. (Muon is not among them: it takes
matrices, and the weights of convolutions have four dimensions.)
"""

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from course_lib import optimizers
from course_lib.lab.data import Dataset
from course_lib.lab.models import convnet
from course_lib.lab.studies import Part, Study, Tuned
from course_lib.lab.training import Recipe
from course_lib.studies import cifar10, mnist

TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)


def cosine(optimizer: Optimizer, steps: int) -> CosineAnnealingLR:
    """From the peak to zero along half a cosine."""
    return CosineAnnealingLR(optimizer, steps)


MAKERS: dict[str, tuple[Callable[..., Optimizer], tuple[float, ...]]] = {
    "SGD": (optimizers.SGD, (0.1, 0.3, 1.0, 3.0, 10.0)),
    "momentum": (partial(optimizers.SGD, momentum=0.9), (0.03, 0.1, 0.3, 1.0, 3.0)),
    "Adagrad": (optimizers.Adagrad, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "RMSprop": (optimizers.RMSprop, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "Adam": (optimizers.Adam, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "Lion": (optimizers.Lion, (0.0003, 0.001, 0.003, 0.01, 0.03)),
    "LAMB": (partial(optimizers.LAMB, weight_decay=0.0), (0.01, 0.03, 0.1, 0.3, 1.0)),
}


def arms(epochs: int, batch_size: int) -> dict[str, Tuned]:
    """Each optimizer with its five rates."""
    recipe = partial(Recipe, epochs=epochs, batch_size=batch_size, schedule=cosine, validate_every=epochs)
    return {
        name: Tuned({f"lr {lr:g}": recipe(optimizer=partial(make, lr=lr)) for lr in rates}, TUNING)
        for name, (make, rates) in MAKERS.items()
    }


def small_mnist() -> Dataset:
    """2,000 labels."""
    return mnist(2000)


def small_cifar10() -> Dataset:
    """10,000 labels."""
    return cifar10(10_000)


def mnist_network() -> nn.Module:
    """A convolutional network of 8, 16 and 32 channels."""
    return convnet((1, 28, 28), 10, width=8)


def cifar_network() -> nn.Module:
    """The same for colour images."""
    return convnet((3, 32, 32), 10, width=8)


STUDY = Study(
    "02",
    "Which optimizer is best on a convolutional network, each at its best of five rates?",
    {
        "mnist": Part("MNIST, 2,000 labels, 12 epochs", small_mnist, arms(12, 50), SEEDS, mnist_network),
        "cifar10": Part("CIFAR-10, 10,000 labels, 10 epochs", small_cifar10, arms(10, 100), SEEDS, cifar_network),
    },
)
