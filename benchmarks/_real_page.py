"""The figures of `benchmarks.real` in the documentation: a JSON file, and tables made of it."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsplit.report.files import json_text, write_atomically

COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "device_link_bytes": ("link, MB", 1e6, ".1f"),
    "modelled_radio_bytes": ("radio, MB (modelled)", 1e6, ".1f"),
    "device_peak_bytes": ("device, MB", 1e6, ".0f"),
    "modelled_device_bytes": ("device, MB (modelled)", 1e6, ".0f"),
    "modelled_s": ("s (modelled)", 1.0, ".1f"),
    "modelled_j": ("J (modelled)", 1.0, ".0f"),
}
_OTHER = ("loss", "wall_s", "seeds", *COLUMNS)


def members(task: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the members of a task of the JSON object, SplitFed's by name and cut."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, value in task.items():
        if name == "splitfed":
            found |= {f"splitfed, cut {cut}": member for cut, member in value.items()}
        elif name != "size":
            found[name] = value
    return found


def tables(results: Mapping[str, Any]) -> str:
    """Return the tables of a study, in Markdown; every number comes from `results`."""
    said, parts = results["settings"], []
    for name, task in results["tasks"].items():
        rows, size = members(task), task["size"]
        metrics = [key for key in rows["untrained"] if key not in _OTHER]
        heads = ["", "loss", *metrics, *(head for head, _, _ in COLUMNS.values())]
        parts.append(
            f"**{name}**: {said['devices']} devices, {size['rounds']} rounds of {size['steps']} "
            f"steps of {said['batch']}, LoRA of rank {said['r']}, lr {said['lr']:g}, "
            f"{_seeds(said['seeds'])}; judged on {size['n_test']} test items "
            f"({size['n_written']} texts).\n"
        )
        parts += [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
        for label, member in rows.items():
            cells = [label, _figure(member, "loss", ".4f")]
            cells += [_figure(member, metric, ".1f") for metric in metrics]
            for key, (_, unit, form) in COLUMNS.items():
                cells.append(format(member[key] / unit, form) if key in member else "")
            parts.append(_row(cells))
        parts.append("")
    missed = results["missed"]
    parts += ["Floors that were missed:\n", *(f"- {line}" for line in missed), ""] if missed else []
    return "\n".join(parts)


def write_page(
    results: Mapping[str, Any],
    docs: Path,
    name: str,
    shown: Callable[[Mapping[str, Any]], str] = tables,
) -> None:
    """Write `results` beside the page, and what is `shown` of them between its marks for them."""
    (docs / "results").mkdir(exist_ok=True)
    write_atomically(docs / "results" / f"{name}.json", json_text(results))
    page = docs / "results.md"
    begin, end = marks(name)
    block = f"{begin}\n{shown(results)}{end}"
    text, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: block,
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    write_atomically(page, text if count else f"{text.rstrip()}\n\n{block}\n")


def marks(name: str) -> tuple[str, str]:
    """Return what begins and ends the tables of a study on the page."""
    return f"<!-- figures: results/{name}.json -->", "<!-- end of figures -->"


def read_results(file: Path) -> dict[str, Any]:
    """Return what `write_page` wrote."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _figure(member: Mapping[str, Any], key: str, form: str) -> str:
    """Return a mean and, of several seeds, the least and the most."""
    mean = format(member[key], form)
    if "seeds" not in member:
        return mean
    each = [one[key] for one in member["seeds"]]
    return f"{mean} ({min(each):{form}} to {max(each):{form}})"


def _seeds(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"{len(seeds)} seeds (mean, least and most)"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
