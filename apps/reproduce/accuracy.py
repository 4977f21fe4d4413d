"""What SFT's operating point costs in accuracy, on a small image classifier that really trains.

A ViT is trained on scikit-learn's digits first, without a cut that compresses, and then fine-tuned
with and without compression at the cut, from the same weights and in the same order. The number of
seeds and of steps of fine-tuning are in conf/paper/sft.yaml.
"""

from collections.abc import Mapping

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from fedsplit.arrays import Array
from fedsplit.codec import Loopback
from fedsplit.data import DataSpec, FederatedData, batches, load_data, training_batches
from fedsplit.execution import OptimizerSpec
from fedsplit.models import Boundary, ModelSpec, SplitModel, load
from fedsplit.plan import Route
from fedsplit.seeds import generator

from ..coded import first_part, second_part, train_coded
from .sft import fedsplit_point
from .study import Values

Settings = Mapping[str, object]

IDENTITY: Settings = {"name": "identity"}
BLOCKS, CUT, BATCH, WARM_UP = 6, 2, 32, 30
MODEL = ModelSpec(
    model_type="vit",
    task="image-classification",
    train="full",
    config={
        "hidden_size": 64,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 8,
        "patch_size": 2,
        "num_labels": 10,
    },
)
DATA = DataSpec(source="digits", partition="iid", image_size=8, test_fraction=0.2)
PRETRAINING = 500, 3e-3
"""Steps and learning rate."""
RATE = 5e-4


def add(config: DictConfig, numbers: dict[str, Values]) -> dict[str, object]:
    """Fine-tune at SFT's operating point and without compression, and compare on test images.

    Every seed draws the split into training and test images, the weights and the order of batches.
    """
    paper = config.paper
    settings, how = fedsplit_point(paper.keep, paper.bits), paper.accuracy
    found = [_of_seed(settings, seed, how.steps) for seed in range(how.seeds)]
    return judged(numbers, *100 * np.array(found).T)


def judged(
    numbers: dict[str, Values], uncompressed: Array, compressed: Array, ratio: Array
) -> dict[str, object]:
    """Add the mean loss of accuracy, in points, from percentages of each seed; say how it varies."""
    lost = uncompressed - compressed
    numbers["accuracy"] = {"lost": lost}
    return {
        "ratio": ratio.mean() - 100,
        "seeds": len(lost),
        "lost": _spread(lost),
        "note": f" Test accuracy on digits, {len(lost)} seeds: uncompressed "
        f"{_spread(uncompressed)} %, compressed {_spread(compressed)} %; one image is 0.28 points.",
    }


def _spread(values: Array) -> str:
    """Return mean, standard deviation and range in words."""
    return f"{values.mean():.1f} +- {values.std(ddof=1):.1f} ({values.min():.1f} to {values.max():.1f})"


def _of_seed(settings: Settings, seed: int, steps: int) -> tuple[float, float, float]:
    data = load_data(DATA, None, 1, seed)
    model, route = load(MODEL), Route.two_tier(BLOCKS, CUT)
    steps_before, rate = PRETRAINING
    _train(model, route, data, IDENTITY, steps=steps_before, rate=rate, seed=seed)
    start = {
        name: parameter.detach().clone()
        for segment in route.segments
        for name, parameter in model.trainable(segment).items()
    }
    found = {}
    for name, codec in (("without", IDENTITY), ("with", settings)):
        model.install({key: nn.Parameter(value.clone()) for key, value in start.items()})
        ratio = _train(model, route, data, codec, steps=steps, rate=RATE, seed=seed + 1)
        found[name] = _accuracy(model, route, data, codec), ratio
    return found["without"][0], *found["with"]


def _train(
    model: SplitModel,
    route: Route,
    data: FederatedData,
    codec: Settings,
    *,
    steps: int,
    rate: float,
    seed: int,
) -> float:
    """Train with `codec` on the way up; return bytes sent over raw bytes."""
    up = Loopback(codec, seed)
    train_coded(
        model,
        route,
        training_batches(data.train(0), BATCH, generator(seed, "order"), steps),
        up=up,
        down=Loopback(IDENTITY, seed),
        optimizer=OptimizerSpec(name="adamw", lr=rate),
        rate=lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps),
    )
    return up.n_bytes / up.n_raw_bytes


def _accuracy(model: SplitModel, route: Route, data: FederatedData, codec: Settings) -> float:
    """Return the share of test images classified right, compressed at the cut as in training."""
    up, hits, count = Loopback(codec, 0), 0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches(data.test(0), BATCH):
            boundary = first_part(model, route, batch.inputs)
            crossed = tuple(up.send(tensor, batch.samples) for tensor in boundary.tensors)
            received = Boundary(crossed, boundary.layout)
            output = second_part(model, route, batch.inputs, received)
            labels = batch.inputs["labels"]
            assert output.logits is not None
            hits += int((output.logits.argmax(-1) == labels).sum())
            count += len(labels)
    return hits / count
