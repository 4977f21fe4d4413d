"""``fedsplit measure``: how long this machine takes for a model, as a file for its node."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fedsplit.errors import require
from fedsplit.models import check_model
from fedsplit.models.profile import profile_model
from fedsplit.models.profile_measured import measure_machine
from fedsplit.report import plain_text

from .config import data_spec, load_config, model_spec
from .run_settings import run_settings
from .work import local_work


def measure(overrides: Sequence[str], output: Path, repeats: int, console: Console) -> int:
    """Time training steps of the configured model here, write the file, and say what it holds.

    Raises
    ------
    FedsplitError
        If the configuration is wrong, or the file cannot be written.
    """
    require(output.parent.is_dir(), "--output", str(output), "a file in a folder that exists")
    config = load_config(overrides)
    spec, batch = model_spec(config), local_work(config).batch_size
    seq_len = data_spec(config).seq_len if spec.task == "causal-lm" else 1
    check_model(spec, seq_len if spec.task == "causal-lm" else None)
    torch.set_num_threads(run_settings(config).threads)
    found = measure_machine(spec, seq_len, batch, repeats)
    found.write(output)
    speed = found.flops_per_s(profile_model(spec, seq_len, batch))
    power = "" if found.power_w is None else f", {found.power_w:.3g} W"
    console.print(
        f"{found.model}, {batch} x {seq_len}: forward {1e3 * sum(found.forward_s):.1f} ms, "
        f"backward {1e3 * sum(found.backward_s):.1f} ms, {speed / 1e9:.3g} GFLOP/s{power}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"[bold]{plain_text(output)}[/bold]", highlight=False, soft_wrap=True)
    return 0
