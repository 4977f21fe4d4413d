"""Three ways to compare schemes by what matters, as EdgeFlowerTune (arXiv 2605.08636) names them.

Quality within a budget; cost to a target; quality that is kept under worse conditions. Each works
on any study: groups are what runs differ in but the seed, and are compared seed by seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from fedsplit.errors import SettingsError, require
from fedsplit.figures import named, quantity
from fedsplit.report.studies.frame import COSTS, PEAKS, Study
from fedsplit.report.studies.groups import GROUP, grouped, is_better_high
from fedsplit.report.studies.statistics import half_width, holm, least_p, pairwise

BUDGET, TARGET, ROBUSTNESS = PROTOCOLS = "budget", "target", "robustness"
_SEED = "seed"
_TEST = "exact sign-flip test of the mean difference, paired by seed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What a protocol finds.

    Parameters
    ----------
    title : str
        What was asked.
    table : DataFrame
        A row per group: `GROUP` and the findings, in SI units.
    test : DataFrame
        A row per pair of groups, with p values.
    notes : tuple of str
        How it was found, and what is left out.
    """

    title: str
    table: pd.DataFrame
    test: pd.DataFrame
    notes: tuple[str, ...] = field(default=())


def budget(
    study: Study,
    metric: str = "eval_loss",
    within: Mapping[str, float] | None = None,
    by: Sequence[str] = (),
    where: Sequence[str] = (),
) -> Comparison:
    """Return the best quality that each group reaches within a budget.

    Parameters
    ----------
    metric : str
        The quality.
    within : mapping of str to float
        Limits by metric: of a cost, what a run may spend in all; of a peak, the most at any time.
        By default what every run spends at least of modelled time, so that none is judged by
        rounds that it was not given.
    by, where : sequence of str
        As of `grouped`.

    Raises
    ------
    SettingsError
        If a metric is unknown, or a limit is on something that is no cost.
    """
    rounds, _ = grouped(study, by, where)
    limits = dict(within or {}) or _common(rounds, "delay_s")
    best = _best_within(study, rounds, metric, limits)
    table = _means(rounds, best, study.metric(metric))
    missed = int(best[metric].isna().sum())
    notes = [*_about_test(best), *_about_half()]
    if missed:
        notes.insert(0, f"{missed} runs come to no evaluation within the budget and are left out")
    spent = " and ".join(quantity(name, most) for name, most in limits.items())
    return Comparison(
        title=f"Best {named(metric)[0]} within {spent}",
        table=table,
        test=pairwise(_by_seed(best, metric)),
        notes=tuple(notes),
    )


def target(
    study: Study,
    metric: str = "eval_loss",
    reach: float | None = None,
    costs: Sequence[str] = ("delay_s", "traffic_bytes", "energy_j"),
    by: Sequence[str] = (),
    where: Sequence[str] = (),
) -> Comparison:
    """Return what each group spends until a quality is reached.

    A run that does not reach it is right-censored at what it spent in all: it counts as "more than
    that". Medians are of the Kaplan-Meier estimate; two groups are compared by the sign test over
    seeds of which it is known who was cheaper.

    Parameters
    ----------
    metric : str
        The quality.
    reach : float
        The target; by default the best that the worst group reaches in the mean.
    costs : sequence of str
        What it costs; the first is tested.
    by, where : sequence of str
        As of `grouped`.

    Raises
    ------
    SettingsError
        If a metric is unknown, or a cost is none.
    """
    rounds, _ = grouped(study, by, where)
    quality = study.metric(metric)
    sign = -1.0 if is_better_high(quality) else 1.0
    spent_on = [_cost(study, name) for name in costs]
    if reach is None:
        best = _best_within(study, rounds, quality, {})
        reach = sign * (sign * best.groupby(GROUP, observed=True)[quality].mean()).max()
    there = rounds[sign * rounds[quality] <= sign * reach].groupby("run", sort=False).first()
    ends = rounds.groupby("run", sort=False).last()
    runs = ends[[GROUP, _SEED]].assign(reached=ends.index.isin(there.index))
    for name in spent_on:
        runs[name] = there[name].reindex(runs.index).fillna(ends[name])
    rows = []
    for group, part in runs.groupby(GROUP, observed=True):
        row = {GROUP: group, "runs": len(part), "reached": int(part["reached"].sum())}
        rows.append(row | {name: _median(part[name], part["reached"]) for name in spent_on})
    notes = [
        "a run that does not reach it counts as more than it spent in all (right-censored); "
        "median by Kaplan and Meier, inf where fewer than half reach it",
        f"p: exact sign test of {named(spent_on[0])[0]}, paired by seed, over pairs of which is "
        "known who was cheaper; p_holm: corrected for all pairs by Holm's rule",
        _bound(int(runs.groupby(GROUP, observed=True).size().min())),
    ]
    return Comparison(
        title=f"Cost until {quantity(quality, reach)}",
        table=pd.DataFrame(rows),
        test=_sign_tests(runs, spent_on[0]),
        notes=tuple(notes),
    )


def robustness(
    study: Study,
    metric: str = "eval_loss",
    within: Mapping[str, float] | None = None,
    schemes: Sequence[str] = ("strategy",),
    where: Sequence[str] = (),
) -> Comparison:
    """Return what each scheme loses of its quality under other conditions, seed by seed.

    Conditions are all that is swept over but scheme and seed (a band, a fleet, how data are
    divided); the first one that was named is what the others are compared with.

    Parameters
    ----------
    metric : str
        The quality.
    within : mapping of str to float
        As of `budget`, the same under every condition.
    schemes : sequence of str
        Keys that make a scheme.
    where : sequence of str
        As of `grouped`.

    Raises
    ------
    SettingsError
        If there is only one condition, or a metric is unknown.
    """
    rounds, keys = grouped(study, (), where)
    own = [study.key(name) for name in schemes]
    conditions = [key for key in keys if key not in own]
    varied = rounds[conditions].drop_duplicates() if conditions else pd.DataFrame()
    if len(varied) < 2:
        raise SettingsError("STUDY", str(study.folder), "a study that sweeps over a condition too")
    first = varied.iloc[0]
    usual = rounds[(rounds[conditions] == first).all(axis=1)]
    limits = dict(within or {}) or _common(usual, "delay_s")
    best = _best_within(study, rounds, metric, limits, [*own, *conditions])
    sign = -1.0 if is_better_high(metric) else 1.0
    at_home = best[(best[conditions] == first).all(axis=1)].set_index([*own, _SEED])[metric]
    base = at_home.reindex(pd.MultiIndex.from_frame(best[[*own, _SEED]])).to_numpy()
    best = best.assign(loss=sign * (best[metric].to_numpy() - base))
    away = best[~(best[conditions] == first).all(axis=1)]
    rows = [
        {
            GROUP: ", ".join(map(str, held)),
            "runs": len(part),
            "unfinished": int(part["loss"].isna().sum()),
            "loss": part["loss"].mean(),
            "loss.half_width": half_width(part["loss"]),
        }
        for held, part in away.groupby([*own, *conditions], sort=False)
    ]
    by_scheme = away.assign(**{GROUP: away[own].astype(str).agg(", ".join, axis=1)})
    over_all = by_scheme.groupby([GROUP, _SEED], sort=False)["loss"].mean().unstack(0)
    least = over_all.mean().sort_values()
    words = ", ".join(f"{key}={first[key]}" for key in conditions)
    spent = " and ".join(quantity(name, most) for name, most in limits.items())
    notes = [
        f"loss: how much worse {named(metric)[0]} is than the same scheme's and seed's under "
        f"{words}, the best within {spent}",
        *_about_half(),
        f"p: {_TEST}, of the mean loss over all conditions; p_holm: corrected by Holm's rule",
        _bound(len(over_all)),
    ]
    if least.notna().any():
        notes.insert(0, f"{least.index[0]} loses least in the mean: {least.iloc[0]:.4g}")
    return Comparison(
        title=f"What other conditions cost in {named(metric)[0]}",
        table=pd.DataFrame(rows),
        test=pairwise(over_all),
        notes=tuple(notes),
    )


def _best_within(
    study: Study,
    rounds: pd.DataFrame,
    metric: str,
    limits: Mapping[str, float],
    heads: Sequence[str] = (),
) -> pd.DataFrame:
    """Return a row per run with the best of a metric within limits; NaN where there is none."""
    quality = study.metric(metric)
    kept = pd.Series(True, index=rounds.index)
    for name, most in limits.items():
        # What was added up in another order differs in its last digits.
        kept &= rounds[_cost(study, name)] <= most * (1 + 1e-9)
    best = "max" if is_better_high(quality) else "min"
    found = rounds[kept].groupby("run", sort=False)[quality].agg(best)
    runs = rounds.drop_duplicates("run")[["run", GROUP, _SEED, *heads]]
    return runs.loc[:, ~runs.columns.duplicated()].assign(
        **{quality: found.reindex(runs["run"]).to_numpy()}
    )


def _cost(study: Study, name: str) -> str:
    known = [metric for metric in study.metrics if metric in (*COSTS, *PEAKS)]
    if name not in known:
        raise SettingsError("cost", name, f"one of {', '.join(known)}")
    return name


def _common(rounds: pd.DataFrame, name: str) -> dict[str, float]:
    """Return what every run spends at least."""
    require(name in rounds, "--within", name, "given, as these runs have no modelled time")
    return {name: float(rounds.groupby("run")[name].max().min())}


def _means(rounds: pd.DataFrame, best: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = []
    for group, part in best.groupby(GROUP, observed=True):
        known = part[metric].dropna()
        row = {GROUP: group, "runs": len(part), "within": len(known)}
        rows.append(row | {metric: known.mean(), f"{metric}.half_width": half_width(known)})
    return pd.DataFrame(rows)


def _by_seed(best: pd.DataFrame, metric: str) -> pd.DataFrame:
    # A scheme may appear once per seed only, which `grouped` sees to.
    return best.pivot(index=_SEED, columns=GROUP, values=metric)


def _median(spent: pd.Series, reached: pd.Series) -> float:
    sample = stats.CensoredData.right_censored(spent.to_numpy(), ~reached.to_numpy())
    survival = stats.ecdf(sample).sf
    below = survival.quantiles[survival.probabilities <= 0.5 + 1e-12]
    return float(below[0]) if len(below) else float("inf")


def _sign_tests(runs: pd.DataFrame, cost: str) -> pd.DataFrame:
    held = runs.reset_index().pivot(index=_SEED, columns=GROUP, values=[cost, "reached"])
    names = list(dict.fromkeys(held.columns.get_level_values(1)))
    rows = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            both = held.loc[:, (slice(None), [first, second])].dropna()
            one, other = (_bounds(both, cost, name) for name in (first, second))
            # Cheaper for sure: the one's most is below the other's least.
            wins = int(np.sum(one[1] < other[0]))
            losses = int(np.sum(other[1] < one[0]))
            known = wins + losses
            p = stats.binomtest(wins, known).pvalue if known else float("nan")
            row = {"first": first, "second": second, "pairs": len(both), "known": known}
            rows.append(row | {"first_cheaper": wins, "p": p, "least_p": least_p(known)})
    columns = ["first", "second", "pairs", "known", "first_cheaper", "p", "least_p"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(6, "p_holm", holm(table["p"].tolist()))
    return table


def _bounds(both: pd.DataFrame, cost: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the most that a group may have spent, seed by seed."""
    least = both[cost, name].to_numpy(dtype=float)
    # Just above what it spent, as it went on beyond.
    reached = both["reached", name].to_numpy(dtype=bool)
    return np.where(reached, least, np.nextafter(least, np.inf)), np.where(reached, least, np.inf)


def _about_test(best: pd.DataFrame) -> tuple[str, str]:
    seeds = int(best.groupby(GROUP, observed=True)[_SEED].nunique().min())
    return (
        f"p: {_TEST}; p_holm: corrected for all pairs by Holm's rule",
        _bound(seeds),
    )


def _about_half() -> tuple[str]:
    return ("half_width: of the 95 % confidence interval over seeds, by Student's t",)


def _bound(seeds: int) -> str:
    return (
        f"{seeds} seeds cannot give a p below {least_p(seeds):.4g}, however clear a difference is"
    )
