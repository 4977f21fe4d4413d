"""Cuts that an audit forbids are planned by no scheme."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import Scenario, build_scenario
from fedsplit.apps.scenario import build_system

from fedsplit.errors import FedsplitError
from fedsplit.plan import RoundPlan

READ = {1: 0.97, 2: 0.93, 3: 0.6, 4: 0.55}
FOUND = {"codec": "identity", "defence": "none"}


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """Return an audit of the shipped model: later cuts say less."""
    model = build_system(load_config(())).profile.name
    rows = [{**FOUND, "model": model, "cut": cut, "best": share} for cut, share in READ.items()]
    # Of several audits of a cut the worst counts.
    rows.append({**rows[2], "best": 0.3})
    return written(tmp_path, rows)


def written(folder: Path, rows: object) -> Path:
    """Return a file with these audits."""
    path = folder / "audit.json"
    path.write_text(json.dumps({"audits": rows}), encoding="utf-8")
    return path


def scenario(path: Path, most: float, *overrides: str) -> Scenario:
    """Return the scenario of a configuration within an audit."""
    return build_scenario(
        load_config((f"privacy.audit={path}", f"privacy.max_read={most}", *overrides))
    )


def cuts(plan: RoundPlan) -> set[int]:
    """Return the blocks that devices have."""
    turns = [turn for branch in plan.branches for turn in branch.turns]
    return {turn.route.segments[0].stop for turn in turns}


@pytest.mark.parametrize("scheme", ["fast", "card", "joint", "sft", "splitfed"])
@pytest.mark.parametrize(("most", "allowed"), [(0.95, {2, 3, 4}), (0.7, {3, 4}), (0.55, {4})])
def test_schemes_choose_among_the_cuts_that_say_little_enough(
    found: Path, scheme: str, most: float, allowed: set[int]
) -> None:
    rules = {"splitfed": ["strategy.cut=fast"]}
    rules |= {own: ["strategy.codec_table=null"] for own in ("joint", "sft")}
    system = scenario(found, most, f"strategy={scheme}", *rules.get(scheme, ()))
    n_blocks = system.system.profile.n_blocks
    assert cuts(system.plan_round(1)) <= allowed | {n_blocks}
    assert set(system.system.scene(1, {0: 1}).cuts) == {c for c in allowed if c < n_blocks} | {
        n_blocks
    }


def test_a_cut_that_was_told_is_refused_where_it_says_too_much(found: Path) -> None:
    assert cuts(scenario(found, 0.7, "strategy.cut=3").plan_round(1)) == {3}
    with pytest.raises(FedsplitError, match=r"max_read=0.7: must be at least 0.930, for cut 2"):
        scenario(found, 0.7, "strategy.cut=2").plan_round(1)


def test_codecs_that_were_not_audited_are_refused(found: Path) -> None:
    with pytest.raises(FedsplitError, match="a scheme that plans codecs of its own"):
        scenario(found, 0.7, "strategy=sft").plan_round(1)
    with pytest.raises(FedsplitError, match=r"with codec int8.* and defence none"):
        scenario(found, 0.7, "codec=int8")
    with pytest.raises(FedsplitError, match="and defence correlation 1"):
        scenario(found, 0.7, "privacy=nopeek")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{**FOUND, "model": "another", "cut": 1, "best": 0.1}], "privacy.audit=.*of model"),
        ([{**FOUND, "cut": 1, "best": 0.1}], "privacy.audit=.*an audit.json of"),
        ([], "privacy.audit=.*of model"),
        (3, "privacy.audit=.*an audit.json of"),
    ],
)
def test_what_is_no_audit_of_this_model_is_refused(
    tmp_path: Path, rows: list[Mapping[str, object]], told: str
) -> None:
    with pytest.raises(FedsplitError, match=told):
        scenario(written(tmp_path, rows), 0.5)


def test_file_and_share_come_together(found: Path) -> None:
    for lone in (f"privacy.audit={found}", "privacy.max_read=0.5"):
        with pytest.raises(FedsplitError, match="must be given with"):
            build_scenario(load_config((lone,)))
    with pytest.raises(FedsplitError, match=r"max_read=0.1: must be at least 0.550, as"):
        scenario(found, 0.1)
