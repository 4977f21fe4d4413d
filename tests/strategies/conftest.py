"""Schemes that really train: the federation of tiny language models, and one of tiny images."""

import pytest

from fedsplit.data import DataSpec
from fedsplit.models import ModelSpec
from tests.flower.conftest import Federation, fedavg, federation

__all__ = ["fedavg", "federation"]

TINY_VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 10,
}
TINY_RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 10,
}


@pytest.fixture(scope="session", params=["vit", "resnet"])
def digits(request: pytest.FixtureRequest) -> Federation:
    """Return a federation whose devices classify handwritten digits: LoRA, then whole segments."""
    pytest.importorskip("sklearn")
    task = "image-classification"
    models = {
        "vit": ModelSpec(
            model_type="vit", config=TINY_VIT, task=task, r=2, target_modules="all-linear"
        ),
        "resnet": ModelSpec(model_type="resnet", config=TINY_RESNET, task=task, train="full"),
    }
    data = DataSpec(source="digits", image_size=8, max_samples=80, partition="iid", min_samples=4)
    return Federation(models[request.param], data)
