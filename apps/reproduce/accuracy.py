"""What SFT's operating point costs in accuracy, on a small image classifier that really trains.

A ViT is trained on scikit-learn's digits first, without a cut that compresses, and then fine-tuned
with and without compression at the cut, from the same weights and in the same order.
"""

import numpy as np
from omegaconf import DictConfig
from torch import nn

from fedsplit.arrays import Array
from fedsplit.codec import Loopback
from fedsplit.data import DataSpec, load_data, training_batches
from fedsplit.execution import OptimizerSpec
from fedsplit.models import load
from fedsplit.plan import Route
from fedsplit.privacy import Defence, PrivacySpec
from fedsplit.seeds import generator

from ..calibrate import IDENTITY, Settings
from ..coded import evaluate_coded, train_coded
from .sft import fedsplit_point
from .study import Case, Values, extent, model, spread_text

BATCH, WARM_UP = 32, 30
DATA = DataSpec(source="digits", partition="iid", image_size=8, test_fraction=0.2)
PRETRAINING_STEPS, PRETRAINING_RATE, RATE = 500, 3e-3, 5e-4


def add(case: Case, numbers: dict[str, Values]) -> None:
    """Fine-tune at SFT's operating point and without compression, and compare on test images.

    Every seed draws the split into training and test images and the order of batches.
    """
    seeds = range(case.config.paper.accuracy.seeds)
    found = [_of_seed(case.config, seed) for seed in seeds]
    case.words |= judged(numbers, 100 * np.array(found))


def judged(numbers: dict[str, Values], found: Array) -> dict[str, object]:
    """Add the loss of accuracy in points, and return how it varies in words.

    `found` has percentages: a row of accuracy without, accuracy with, and bytes for each seed.
    """
    uncompressed, compressed, sent = found.T
    lost = uncompressed - compressed
    numbers["accuracy"] = {"uncompressed": uncompressed, "compressed": compressed, "lost": lost}
    said = {name: spread_text(*extent(held)) for name, held in numbers["accuracy"].items()}
    return {"ratio": sent.mean() - 100, "seeds": len(found), **said}


def _of_seed(config: DictConfig, seed: int) -> tuple[float, float, float]:
    """Return the shares of images that are right without and with a codec, and of bytes sent."""
    data, vit = load_data(DATA, None, 1, seed), load(model(config, "digits"))
    route = Route.two_tier(vit.n_blocks, 2)

    def trained(codec: Settings, seed: int, steps: int, rate: float) -> Loopback:
        up = Loopback(codec, seed)
        train_coded(
            vit,
            route,
            training_batches(data.train(0), BATCH, generator(seed, "order"), steps),
            ways=[(up, Loopback(IDENTITY, seed))],
            optimizer=OptimizerSpec(name="adamw", lr=rate),
            rate=lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps),
        )
        return up

    trained(IDENTITY, seed, PRETRAINING_STEPS, PRETRAINING_RATE)
    parts = [vit.trainable(segment) for segment in route.segments]
    start = {key: value.detach().clone() for part in parts for key, value in part.items()}
    found = []
    for codec in (IDENTITY, fedsplit_point(config.paper.keep, config.paper.bits)):
        vit.install({key: nn.Parameter(value.clone()) for key, value in start.items()})
        up = trained(codec, seed + 1, config.paper.accuracy.steps, RATE)
        way = Defence(PrivacySpec(), 0), Loopback(codec, 0)
        found.append(evaluate_coded(vit, route, data.test(0), BATCH, way=way)[1])
    return found[0], found[1], up.n_bytes / up.n_raw_bytes
