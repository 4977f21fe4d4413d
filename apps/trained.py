"""``fedsplit export`` and ``fedsplit generate``: what to do with the model that a run trained."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from fedsplit.errors import FedsplitError, require
from fedsplit.execution.generation import Generation, generate
from fedsplit.flower.server.checkpoint import load_checkpoint
from fedsplit.models import SplitModel, load, read_tokenizer
from fedsplit.models.lora import adapter_settings
from fedsplit.plan import DEVICE, Segment
from fedsplit.report import RoundRecord, plain_text, read_records
from fedsplit.report.card import write_card
from fedsplit.report.export import save_model, save_trained

from .check import require_folder
from .config import data_spec, model_spec
from .keeper import kept_folder
from .resume import read_config, resumed

LAST = "last"


def export(folder: Path, which: str, output: Path | None, *, merge: bool, console: Console) -> int:
    """Write what the run in `folder` trained for other programs to load; return the exit code.

    Parameters
    ----------
    folder : Path
        The run's output; the run may be under way.
    which : str
        "last", "best", or the number of a round that was kept.
    output : Path or None
        Where to write, a new folder; by default ``exported`` in `folder`.
    merge : bool
        Whether the adapter is merged into its model.

    Raises
    ------
    FedsplitError
        If there is no such run, or nothing of that round was kept.
    """
    target = output if output is not None else folder / "exported"
    model, weights, reached = _trained(folder, which)
    narrow = model.spec.bottleneck
    require(narrow is None, "privacy.bottleneck", str(narrow), "null: no other program has one")
    require(not target.exists(), "--output", str(target), "a folder that is not there yet")
    require_folder(target, "--output")
    if merge:
        save_model(target, weights, model)
    else:
        save_trained(target, weights, model, model.adapters(_whole(model)))
    write_card(target, read_config(folder), _until(folder, reached))
    console.print(plain_text(f"round {reached} of {folder}: written to {target}"), soft_wrap=True)
    return 0


def write_text(folder: Path, which: str, prompt: str, how: Generation, console: Console) -> int:
    """Print what the model of the run in `folder` writes after `prompt`; return the exit code.

    Raises
    ------
    FedsplitError
        As `export`; or if the model writes no text.
    """
    config = resumed(folder, [])
    spec = model_spec(config)
    writes = spec.task == "causal-lm" and spec.source is not None
    require(writes, "model.task", spec.task, "causal-lm with a tokenizer, to write text")
    model, weights, _ = _trained(folder, which)
    data = data_spec(config)
    (text,) = generate(
        model, read_tokenizer(str(spec.source)), data, [prompt], how=how, adapters=weights
    )
    console.print(plain_text(text), soft_wrap=True, highlight=False, emoji=False)
    return 0


def _trained(folder: Path, which: str) -> tuple[SplitModel, dict[str, Tensor], int]:
    """Return the whole model, what was trained of it, and in which round."""
    spec = model_spec(resumed(folder, []))
    if which == LAST:
        try:
            state = load_checkpoint(folder)
        except FedsplitError as error:
            raise FedsplitError(str(error).replace("resume=", "run=", 1)) from error
        return load(spec), state.adapters, state.server_round
    place = kept_folder(folder, which)
    number = int(place.name.partition("_")[2])
    if spec.train == "full":
        return load(replace(spec, source=str(place), model_type=None, config={})), {}, number
    model = load(replace(spec, **adapter_settings(str(place))))
    return model, model.adapters(_whole(model)), number


def _whole(model: SplitModel) -> Segment:
    return Segment(DEVICE, 0, model.n_blocks)


def _until(folder: Path, server_round: int) -> list[RoundRecord]:
    return [record for record in read_records(folder) if record.round <= server_round]
