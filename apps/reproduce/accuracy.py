"""What SFT's operating point costs in accuracy, on a small image classifier that really trains.

    python -m fedsplit.apps.reproduce.accuracy --steps 120 --seeds 3

A ViT is trained on scikit-learn's digits first, without a cut that compresses, and then fine-tuned
with and without compression at the cut, from the same weights and in the same order.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedsplit.arrays import Array
from fedsplit.codec import Loopback
from fedsplit.data import DataSpec, FederatedData, batches, load_data, training_batches
from fedsplit.execution import OptimizerSpec
from fedsplit.models import Boundary, ModelSpec, SplitModel, load
from fedsplit.plan import Route
from fedsplit.seeds import generator

from ..coded import first_part, second_part, train_coded
from .common import paper_config
from .sft import PAPER, fedsplit_point

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
PRETRAINING, FINE_TUNING = (500, 3e-3), (600, 5e-4)
"""Steps and learning rate; with 120 steps of fine-tuning accuracy still rises."""
SEEDS = 5


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Test accuracy without and with compression, and bytes sent over raw bytes.

    Arrays have one value for each seed: of the split into training and test images, the weights
    and the order of batches.
    """

    uncompressed: Array
    compressed: Array
    ratio: Array

    @property
    def drop_points(self) -> Array:
        """Percentage points that compression costs; negative where it helps."""
        return 100 * (self.uncompressed - self.compressed)


def measure_accuracy(seeds: int = SEEDS, steps: int = FINE_TUNING[0]) -> Accuracy:
    """Fine-tune at SFT's operating point and without compression, and compare on test images."""
    paper = paper_config(PAPER, ()).paper
    settings = fedsplit_point(paper.keep, paper.bits)
    return Accuracy(*np.array([_of_seed(settings, seed, steps) for seed in range(seeds)]).T)


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
        ratio = _train(model, route, data, codec, steps=steps, rate=FINE_TUNING[1], seed=seed + 1)
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


def main() -> int:
    """Print the accuracies of every seed as one JSON object; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=FINE_TUNING[0], help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure_accuracy(options.seeds, options.steps)
    figures = {**vars(found), "drop_points": found.drop_points}
    print(json.dumps({name: values.round(4).tolist() for name, values in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
