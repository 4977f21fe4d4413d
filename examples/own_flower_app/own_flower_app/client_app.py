"""The devices: one call, and a loader of one's own. Whatever it reads stays here."""

from typing import Any

from flwr.app import Context
from transformers import AutoTokenizer

from fedsplit.assets import default_checkpoint
from fedsplit.flower import client_app

LENGTH = 32


def load_data(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return this device's samples to train and to test on: the model's inputs, a mapping each."""
    device = int(context.node_config["partition-id"])
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    text = " ".join(f"Device {device} counts {n} and {n * n}." for n in range(400))
    ids = tokenizer(text, verbose=False).input_ids
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    samples = [{"input_ids": row, "labels": row} for row in rows]
    return samples[8:], samples[:8]


app = client_app(load_data)
