"""Model specs are plain settings, checked before anything is built."""

import dataclasses
import json
from pathlib import Path

import pytest

from fedsplit.errors import FedsplitError
from fedsplit.mapping import from_mapping
from fedsplit.models import ModelSpec


def test_specs_travel_as_json() -> None:
    spec = ModelSpec(model_type="gpt2", config={"n_layer": 2}, target_modules=("c_attn",), r=4)
    text = json.dumps(dataclasses.asdict(spec))
    assert from_mapping(ModelSpec, json.loads(text), "model") == spec


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "source"),
        ({"source": "a", "model_type": "gpt2"}, "source"),
        ({"model_type": "gpt2", "task": "poetry"}, "task"),
        ({"model_type": "gpt2", "dtype": "int8"}, "dtype"),
        ({"model_type": "gpt2", "train": "some"}, "train"),
        ({"model_type": "gpt2", "r": 0}, "r="),
        ({"model_type": "gpt2", "alpha": float("nan")}, "alpha"),
        ({"model_type": "gpt2", "alpha": -1.0}, "alpha"),
        ({"model_type": "gpt2", "dropout": 1.0}, "dropout"),
        ({"model_type": "gpt2", "dropout": float("nan")}, "dropout"),
    ],
)
def test_bad_settings_are_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(FedsplitError, match=named):
        ModelSpec(**fields)  # type: ignore[arg-type]


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedsplitError, match="no-such-type"):
        ModelSpec(model_type="no-such-type").load_config()
    with pytest.raises(FedsplitError, match=tmp_path.name):
        ModelSpec(source=str(tmp_path)).load_config()


def test_a_model_without_the_task_is_refused() -> None:
    with pytest.raises(FedsplitError, match="image-classification"):
        ModelSpec(model_type="gpt2", task="image-classification").load_config()


def test_blocks_that_are_left_out_at_random_are_refused() -> None:
    spec = ModelSpec(model_type="opt", config={"layerdrop": 0.1})
    with pytest.raises(FedsplitError, match=r"^config\.layerdrop=0\.1: must be 0"):
        spec.load_config()
