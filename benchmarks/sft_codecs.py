"""Measure the codec settings that SFT chooses from by default.

    python -m benchmarks.sft_codecs --output fedsplit/assets/sft_codecs.csv

Trains the default job once for each setting, some 15 minutes on one core.
"""

import argparse
import json
from pathlib import Path

from fedsplit.apps.calibrate import Settings, calibrate
from rich.console import Console

from fedsplit.planning import CodecTable


def topk(keep: float, bits: int, **more: str) -> Settings:
    """Return top-k with the textbook's unbiased quantiser."""
    return {"name": "topk", "keep": keep, "bits": bits, **more}


GRID: tuple[Settings, ...] = (
    {"name": "identity"},
    topk(0.1, 3, scale="token"),
    topk(0.2, 4, scale="token"),
    topk(0.4, 4, scale="token"),
    topk(0.6, 4, scale="token"),
    topk(0.6, 6, scale="token"),
    topk(0.8, 6, scale="token"),
    {"name": "int8", "lossless": "zstd"},
    topk(0.3, 4),
    topk(0.5, 8),
    topk(0.8, 8),
    topk(0.2, 3, scale="token"),
    topk(0.4, 3, scale="token"),
)
STEPS = 60


def main() -> int:
    """Measure, write the table, print which settings are worth using."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("outputs/sft_codecs.csv"))
    options = parser.parse_args()
    calibrate([], output=options.output, console=Console(), grid=GRID, steps=STEPS)
    best = CodecTable.read_csv(options.output).envelope()
    rows = zip(best.ratio.tolist(), best.loss_increase.tolist(), best.settings, strict=True)
    print(json.dumps([{"ratio": r, "loss_increase": rise, **s} for r, rise, s in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
