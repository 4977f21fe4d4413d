"""What a study of all schemes found, by the three protocols: the table of docs/results.md.

    fedsplit run -m study=schemes rounds=6 train.steps=2 data.seq_len=64 evaluate.max_samples=5 \
        run.concurrency=1 output=outputs/schemes
    python -m benchmarks.schemes outputs/schemes [--docs docs]

Best evaluation loss within ``--within`` modelled seconds in the narrow band, and by how much it is
below that of the first scheme, seed by seed; seconds and bytes until a loss of ``--reach``; what is
lost from the wide band to the narrow one, within the same time. Intervals: 95 % over seeds, by
Student's t. Prints the table and, last, one JSON object; exit code 1 if a run of the study has not
ended, as then schemes are compared over other seeds.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from benchmarks._real_page import write_page
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.members import DONE
from fedsplit.report.studies.protocols import budget, robustness, target

BAND = "bandwidth_hz"
HEADS = (
    "scheme",
    "seeds",
    "best loss within {within:g} s",
    "below {first}'s, seed by seed",
    "s to a loss of {reach:g}",
    "MB until then",
    "loss lost from the wide band",
)


def findings(study: Study, within_s: float, reach: float) -> dict[str, Any]:
    """Return what the protocols find: a row per scheme of each, and of pairs with the first."""
    narrow = min(study.rounds[study.key(BAND)])
    limits = {"delay_s": within_s}
    where = [f"{BAND}={narrow}"]
    kept = budget(study, within=limits, where=where)
    pairs = kept.test[kept.test["first"] == kept.table["group"].iloc[0]]
    tables = {
        "budget": kept.table,
        "pairs": pairs,
        "target": target(study, reach=reach, where=where).table,
        "robustness": robustness(study, within=limits).table,
    }
    rows = {name: _plain(frame.to_dict("records")) for name, frame in tables.items()}
    return {"within": within_s, "reach": reach, "narrow_hz": narrow, **rows}


def _plain(rows: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    """Return rows with None for what is not known, as of the half that no run reaches."""
    return [
        {
            str(key): None if isinstance(value, float) and not isfinite(value) else value
            for key, value in row.items()
        }
        for row in rows
    ]


def table(found: Mapping[str, Any]) -> str:
    """Return the table, in Markdown; every number comes from `found`."""
    first = found["budget"][0]["group"]
    heads = [head.format(first=first, **found) for head in HEADS]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    beside = {pair["second"]: pair for pair in found["pairs"]}
    lost = {row["group"].partition(",")[0]: row for row in found["robustness"]}
    spent = {row["group"]: row for row in found["target"]}
    for kept in found["budget"]:
        name = kept["group"]
        pair, cost = beside.get(name), spent[name]
        rows.append(
            [
                name,
                str(kept["within"]),
                _interval(kept["eval_loss"], kept["eval_loss.half_width"]),
                "" if pair is None else _interval(pair["difference"], pair["half_width"]),
                f"{_number(cost['delay_s'], '.2f')} ({cost['reached']} of {cost['runs']})",
                _number(cost["traffic_bytes"], ".1f", 1e6),
                _interval(lost[name]["loss"], lost[name]["loss.half_width"]),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _interval(mean: float, half: float | None) -> str:
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


def main() -> int:
    """Print the table; exit 1 if the study has not ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--within", type=float, default=2.0, help="modelled seconds")
    parser.add_argument("--reach", type=float, default=3.85, help="evaluation loss")
    parser.add_argument("--docs", type=Path, help="write the figures into this folder's results.md")
    options = parser.parse_args()
    study = Study.open(options.study)
    found = findings(study, options.within, options.reach)
    print(table(found))
    if options.docs is not None:
        write_page(found, options.docs, "schemes", table)
    unfinished = sum(member.status != DONE for member in study.members)
    if unfinished:
        print(f"{unfinished} runs of the study have not ended")
    print(json.dumps(found))
    return int(unfinished > 0)


if __name__ == "__main__":
    sys.exit(main())
