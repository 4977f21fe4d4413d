"""The model card beside exported weights: what they are, made of what, and how good."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fedsplit.models.spec import TASKS
from fedsplit.report.files import write_atomically
from fedsplit.report.records import RoundRecord

CARD = "README.md"
_PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
}
_ADAPTER = "adapter_config.json"


def write_card(folder: Path, config: Mapping[str, Any], records: Sequence[RoundRecord]) -> None:
    """Write README.md into `folder`, which holds an adapter or a whole model.

    No path of the machine that trained it is in it: neither the data's nor the model's.

    Parameters
    ----------
    folder : Path
        Where the weights are.
    config : mapping
        The run's configuration.
    records : sequence of RoundRecord
        Its rounds, up to the one whose weights these are.
    """
    adapter = (folder / _ADAPTER).exists()
    base, local = _base(config["model"])
    data = ModelCardData(
        base_model=None if local else base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_PIPELINES.get(config["model"]["task"]),
        tags=["fedsplit", "federated-learning", "split-learning"],
    )
    what = "A PEFT adapter for" if adapter else "A model fine-tuned from"
    text = f"""---
{data.to_yaml()}
---

# {folder.resolve().name}

{what} {base}, trained by split learning over {config["fleet"]["devices"]} devices with
fedsplit {version("fedsplit")}: each device held a part of the
model and its own data, servers held the rest.

| | |
|---|---|
{_table(_facts(config, records))}

The loss is the mean per target, in nats, on test data that no device trained on.

## Use

```python
{_usage(base, local, config["model"]["task"], adapter=adapter)}
```
"""
    write_atomically(folder / CARD, text)


def _base(model: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the name of the model that was trained, and whether no hub knows it."""
    source = model.get("source")
    if source is None:
        return f"{model['model_type']} (random weights)", True
    if str(source).startswith("package:"):
        return "the small model that comes with fedsplit", True
    local = Path(str(source)).is_absolute()
    return (Path(str(source)).name if local else str(source)), local


def _facts(config: Mapping[str, Any], records: Sequence[RoundRecord]) -> dict[str, object]:
    strategy = {k: v for k, v in config["strategy"].items() if isinstance(v, int | str | float)}
    path = str(Path(str(strategy.get("codec_table", ""))).name)
    strategy |= {"codec_table": path} if "codec_table" in strategy else {}
    losses = [record.eval_loss for record in records if record.eval_loss is not None]
    train = config["train"]
    facts: dict[str, object] = {
        "scheme": ", ".join(f"{name}={value}" for name, value in strategy.items()),
        "data": config["data"]["source"],
        "rounds": records[-1].round if records else 0,
        "turns": f"batch {train['batch_size']}, steps {train['steps']}, epochs {train['epochs']}",
        "optimizer": f"{train['optimizer']['name']}, lr {train['optimizer']['lr']}",
        "seed": config["seed"],
    }
    if losses:
        facts |= {"loss before": f"{losses[0]:.4f}", "loss after": f"{losses[-1]:.4f}"}
    return facts


def _table(facts: Mapping[str, object]) -> str:
    cells = ((name, str(value).replace("|", "\\|")) for name, value in facts.items())
    return "\n".join(f"| {name} | {value} |" for name, value in cells)


def _usage(base: str, local: bool, task: str, *, adapter: bool) -> str:
    kind = TASKS[task].__name__
    if not adapter:
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER")'
    where = f"FOLDER OF {base}" if local else base
    return (
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("{where}")\n'
        'model = PeftModel.from_pretrained(model, "FOLDER OF THIS ADAPTER")'
    )
