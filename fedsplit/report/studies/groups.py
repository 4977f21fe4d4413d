"""Which runs are compared with which: those that differ in their seed alone are one group."""

from collections.abc import Sequence

import pandas as pd

from fedsplit.errors import SettingsError
from fedsplit.figures import label
from fedsplit.report.studies.frame import Study

GROUP = "group"
_SEED = "seed"
_HIGH = ("accuracy", "bleu", "rouge", "meteor", "nist", "cider", "f1", "mcc", "exact_match")


def is_better_high(metric: str) -> bool:
    """Return whether more of a metric is better."""
    return metric.rpartition(".")[2].lower().startswith(_HIGH)


def grouped(
    study: Study, by: Sequence[str] = (), where: Sequence[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Return the rounds of a study with a column `GROUP`, and the keys that it is made of.

    Parameters
    ----------
    study : Study
        The runs.
    by : sequence of str
        Keys that make groups; all that runs differ in but the seed, by default.
    where : sequence of str
        As KEY=VALUE: only such runs.

    Raises
    ------
    SettingsError
        If a key is unknown, no run is left, or runs of one group differ in more than the seed.
    """
    rounds = study.rounds
    for text in where:
        name, _, value = text.partition("=")
        key = study.key(name)
        rounds = rounds[[_is(held, value) for held in rounds[key]]]
        if rounds.empty:
            held = ", ".join(map(str, study.rounds[key].unique()))
            raise SettingsError("--where", text, f"of a run, which have {held}")
    varied = [key for key in study.keys if key != _SEED and rounds[key].nunique(dropna=False) > 1]
    keys = [study.key(name) for name in by] or varied or ["strategy"]
    mixed = [key for key in varied if key not in keys]
    if mixed:
        given = ",".join(by)
        allowed = (
            f"with {', '.join(mixed)} too, in which runs differ, or with --where {mixed[0]}=VALUE"
        )
        raise SettingsError("--by", given, allowed)
    names = [_name(keys, row) for _, row in rounds[keys].iterrows()]
    # In the order of the members everywhere, so that a group looks the same in every figure.
    return rounds.assign(**{GROUP: pd.Categorical(names, list(dict.fromkeys(names)))}), keys


def finals(rounds: pd.DataFrame, metrics: Sequence[str], keys: Sequence[str]) -> pd.DataFrame:
    """Return a row per run: its group, keys, seed, and the last known value of each metric."""
    heads = [GROUP, *keys, _SEED]
    by_run = rounds.sort_values("round").groupby("run", sort=False)
    # `last` skips what is not known.
    return by_run[list(dict.fromkeys([*heads, *metrics]))].last().reset_index()


def _name(keys: Sequence[str], row: pd.Series) -> str:
    if len(keys) == 1 and isinstance(row.iloc[0], str):
        return str(row.iloc[0])
    return ", ".join(f"{_shown(key)} {_short(row[key])}" for key in keys).removeprefix("strategy ")


def _shown(key: str) -> str:
    return label(key.rpartition(".")[2])


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is(held: object, text: str) -> bool:
    try:
        return float(str(held)) == float(text)
    except ValueError:
        return str(held) == text
