"""What SFT's operating point costs in accuracy, on a small image classifier that really trains.

A ViT is trained on scikit-learn's digits first, without a cut that compresses, and then fine-tuned
with and without compression at the cut, from the same weights and in the same order.
"""

import numpy as np
from omegaconf import DictConfig
from torch import nn

from fedsplit.arrays import Array
from fedsplit.codec import Loopback
from fedsplit.data import DataSpec, FederatedData, load_data, training_batches
from fedsplit.execution import OptimizerSpec
from fedsplit.models import ModelSpec, SplitModel, load
from fedsplit.plan import Route
from fedsplit.privacy import Defence, PrivacySpec
from fedsplit.seeds import generator

from ..calibrate import IDENTITY, Settings
from ..coded import evaluate_coded, train_coded
from .sft import fedsplit_point
from .study import Values

BLOCKS, BATCH, WARM_UP = 6, 32, 30
ROUTE = Route.two_tier(BLOCKS, 2)
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 10,
}
MODEL = ModelSpec(model_type="vit", task="image-classification", train="full", config=SHAPE)
DATA = DataSpec(source="digits", partition="iid", image_size=8, test_fraction=0.2)
PRETRAINING_STEPS, PRETRAINING_RATE, RATE = 500, 3e-3, 5e-4


def add(config: DictConfig, numbers: dict[str, Values]) -> dict[str, object]:
    """Fine-tune at SFT's operating point and without compression, and compare on test images.

    Every seed draws the split into training and test images, the weights and the order of batches.
    """
    settings = fedsplit_point(config.paper.keep, config.paper.bits)
    seeds, steps = config.paper.accuracy.seeds, config.paper.accuracy.steps
    return judged(numbers, 100 * np.array([_of_seed(settings, n, steps) for n in range(seeds)]))


def judged(numbers: dict[str, Values], found: Array) -> dict[str, object]:
    """Add the loss of accuracy in points, and return how it varies in words.

    `found` has percentages: a row of accuracy without, accuracy with, and bytes for each seed.
    """
    uncompressed, compressed, sent = found.T
    lost = uncompressed - compressed
    numbers["accuracy"] = {"lost": lost}
    return {
        "ratio": sent.mean() - 100,
        "seeds": len(lost),
        "lost": _spread(lost),
        "note": f" Test accuracy on digits, {len(lost)} seeds: uncompressed "
        f"{_spread(uncompressed)} %, compressed {_spread(compressed)} %; one image is 0.28 points.",
    }


def _spread(values: Array) -> str:
    """Return mean, standard deviation and range in words."""
    low, high = values.min(), values.max()
    return f"{values.mean():.1f} +- {values.std(ddof=1):.1f} ({low:.1f} to {high:.1f})"


def _of_seed(settings: Settings, seed: int, steps: int) -> tuple[float, float, float]:
    """Return the shares of images that are right without and with a codec, and of bytes sent."""
    data, model = load_data(DATA, None, 1, seed), load(MODEL)
    _train(model, data, Loopback(IDENTITY, seed), PRETRAINING_STEPS, PRETRAINING_RATE, seed)
    parts = [model.trainable(segment) for segment in ROUTE.segments]
    start = {key: value.detach().clone() for part in parts for key, value in part.items()}
    found = []
    for codec in (IDENTITY, settings):
        model.install({key: nn.Parameter(value.clone()) for key, value in start.items()})
        up = Loopback(codec, seed + 1)
        _train(model, data, up, steps, RATE, seed + 1)
        way = Defence(PrivacySpec(), 0), Loopback(codec, 0)
        found.append(evaluate_coded(model, ROUTE, data.test(0), BATCH, way=way)[1])
    return found[0], found[1], up.n_bytes / up.n_raw_bytes


def _train(
    model: SplitModel, data: FederatedData, up: Loopback, steps: int, rate: float, seed: int
) -> None:
    train_coded(
        model,
        ROUTE,
        training_batches(data.train(0), BATCH, generator(seed, "order"), steps),
        ways=[(up, Loopback(IDENTITY, seed))],
        optimizer=OptimizerSpec(name="adamw", lr=rate),
        rate=lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps),
    )
