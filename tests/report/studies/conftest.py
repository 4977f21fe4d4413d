"""Studies made by hand, from figures that a reader can follow."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsplit.plan import Failure
from fedsplit.report import RoundRecord
from fedsplit.report.files import json_text
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.members import DONE, FAILED, MemberRecord, write_members

Losses = Mapping[tuple[Any, ...], list[float]]
SECONDS = {"slow": 4.0, "quick": 1.0}
MEGABYTE = 1e6


def record(number: int, loss: float, delay_s: float) -> RoundRecord:
    """Return a round; round 0 is the evaluation before any training."""
    if number == 0:
        return RoundRecord(0, eval_loss=loss)
    return RoundRecord(
        number,
        train_loss=loss + 0.1,
        eval_loss=loss,
        bytes_up={"device": 1000 * number},
        participants=(0, 1),
        failures=(Failure("device", 2, "train", "<b>link</b> broke"),) if number == 2 else (),
        modelled={
            "delay_s": delay_s,
            "energy_j": 2 * delay_s,
            "uplink_bytes": MEGABYTE,
            "downlink_bytes": 2 * MEGABYTE,
            "backhaul_bytes": 0.0,
            "device_peak_bytes": 5e6 - number,
        },
    )


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Study]:
    """Return a function that makes a study of losses by scheme, seed (and band)."""

    def made(losses: Losses, keys: tuple[str, ...] = ("strategy", "seed")) -> Study:
        members = []
        for held, curve in losses.items():
            swept = dict(zip(keys, held, strict=True))
            name = " ".join(f"{key}={value}" for key, value in swept.items())
            folder = tmp_path / name.replace(" ", ",")
            folder.mkdir()
            scheme, seed = swept["strategy"], swept["seed"]
            delay_s = SECONDS[scheme] + 0.1 * seed
            rounds = [record(number, loss, delay_s) for number, loss in enumerate(curve)]
            results = {
                "rounds": [item.to_json() for item in rounds],
                "data": {"lines": [], "devices": {"0": {"train-samples": 7}}},
                "summary": {},
            }
            (folder / "results.json").write_text(json_text(results))
            config = {"strategy": {"name": scheme}, "seed": seed, "rounds": len(curve) - 1}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            members.append(MemberRecord(name=name, folder=folder.name, swept=swept, status=DONE))
        write_members(tmp_path, members)
        return Study.open(tmp_path)

    return made


@pytest.fixture
def study(make: Callable[..., Study]) -> Study:
    """Return two schemes over three seeds; `quick` needs a fourth of the time and ends higher."""
    made = make(
        {
            ("slow", 0): [4.0, 3.5, 3.0],
            ("slow", 1): [4.1, 3.6, 3.1],
            ("slow", 2): [4.2, 3.7, 3.2],
            ("quick", 0): [4.0, 3.8, 3.4],
            ("quick", 1): [4.1, 3.9, 3.3],
            ("quick", 2): [4.2, 4.0, 3.8],
        }
    )
    lost = MemberRecord(
        name="strategy=quick seed=9",
        folder="nothing",
        swept={"strategy": "quick", "seed": 9},
        status=FAILED,
        reason="it <script>alert(1)</script> broke",
    )
    write_members(made.folder, [*made.members, lost])
    return Study.open(made.folder)
