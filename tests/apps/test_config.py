"""The configuration: what a user may write, and what comes of a mistake."""

from pathlib import Path

import pytest
import yaml
from fedsplit.apps.config import codec_plan, config_dir, job, load_config, local_work, run_settings
from fedsplit.apps.plan import build_scenario
from fedsplit.apps.server_app import build_strategy
from fedsplit.strategies.vanilla import Vanilla

from fedsplit.errors import FedsplitError

# Channels, fleets, papers and topologies have tests of their own.
GROUPS = sorted(
    (path.parent.name, path.stem)
    for path in config_dir().glob("*/*.yaml")
    if path.parent.name not in {"channel", "deploy", "fleet", "paper"}
)


def test_the_default_job_is_complete() -> None:
    config = load_config([])
    assert job(config).n_devices == config.fleet.devices
    assert Path(str(job(config).model.source)).is_dir()
    assert local_work(config).batch_size == config.train.batch_size
    assert codec_plan(config).uplink["name"] == "identity"
    build_strategy(config)


NEEDED = {
    ("model", "checkpoint"): ["model.source=x"],
    ("data", "e2e"): ["data.path=x"],
    ("data", "text"): ["data.path=x"],
    ("data", "chat"): ["data.path=x"],
    ("data", "hub"): ["data.name=x"],
}


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_file_makes_a_job_and_opens_with_its_command(group: str, name: str) -> None:
    config = load_config([f"{group}={name}", *NEEDED.get((group, name), [])])
    job(config)
    codec_plan(config)
    build_strategy(config)
    first = (config_dir() / group / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# fedsplit run ")
    assert f"{group}=" in first


def test_a_model_can_be_any_name_or_path() -> None:
    assert load_config(["model=org/model-7b"]).model.source == "org/model-7b"
    assert load_config(["model=./some/folder"]).model.source == "./some/folder"


def test_a_scheme_is_chosen_by_name_with_its_settings() -> None:
    scenario = build_scenario(load_config(["strategy=vanilla", "strategy.cut=3"]))
    assert isinstance(scenario.strategy, Vanilla)
    (branch,) = scenario.plan_round(1).branches
    assert {str(turn.route) for turn in branch.turns} == {"device[0:3] -> server[3:6]"}


def build_all(overrides: list[str]) -> None:
    config = load_config(overrides)
    run_settings(config)
    job(config)
    local_work(config)
    build_strategy(config)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("strategy=splitfde", "strategy='splitfde': must be one of .*splitfed"),
        ("train.batch_size=0", "batch_size=0: must be at least 1"),
        ("train.optimizer.name=sdg", "name='sdg': must be one of adamw, adam, sgd"),
        ("train.optimizer.rate=1", "configuration: .*rate"),
        ("+train.optimizer.rate=1", "rate.*known fields: name, lr"),
        ("data=nosuch", "nosuch"),
        ("model.train=some", "train='some': must be one of lora, full"),
        ("rounds=0", "rounds=0: must be at least 1"),
        ("rounds=many", 'run: .*rounds.*"int"'),
        ("run.concurrency=0", "concurrency=0: must be at least 1"),
        ("fleet.devices=0", "n_devices=0: must be at least 1"),
        ("roundz=3", "configuration: .*roundz"),
        ("+strategy.cutt=1", "cutt"),
    ],
)
def test_a_mistake_is_one_error_that_names_the_field(override: str, complaint: str) -> None:
    with pytest.raises(FedsplitError, match=f"(?s){complaint}"):
        build_all([override])


def test_resuming_takes_the_configuration_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rounds": 3, "train": {"steps": 5}}))
    config = load_config([f"resume={tmp_path}", "rounds=7"])
    assert (config.rounds, config.train.steps) == (7, 5)
    assert config.output == str(tmp_path)
    with pytest.raises(FedsplitError, match="resume="):
        load_config([f"resume={tmp_path / 'missing'}"])
