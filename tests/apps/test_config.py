"""The configuration: what a user may write, and what comes of a mistake."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fedsplit.apps.config import (
    codec_plan,
    config_dir,
    job,
    load_config,
    local_work,
    output_folder,
    patience,
)
from fedsplit.apps.outputs import EvaluateSettings, KeepSettings, StopSettings
from fedsplit.apps.overrides import PATHS, PATHS_OR_NAMES, groups
from fedsplit.apps.plan import build_scenario
from fedsplit.apps.run_settings import RunSettings, run_settings
from fedsplit.apps.server_app import build_scheme
from fedsplit.apps.values import plain
from fedsplit.strategies.vanilla import Vanilla

from fedsplit.data import DataSpec
from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec
from fedsplit.fleet import FleetSpec
from fedsplit.flower import LinkSettings
from fedsplit.models import ModelSpec
from fedsplit.patience import Patience
from fedsplit.plan import CodecPlan
from fedsplit.privacy import PrivacySpec
from fedsplit.schemes import LocalWork, find_scheme
from fedsplit.transport import ServerLimits
from fedsplit.wireless import ChannelSpec

# Channels, fleets, papers, studies and topologies have tests of their own.
GROUPS = sorted(
    (path.parent.name, path.stem)
    for path in config_dir().glob("*/*.yaml")
    if path.parent.name not in {"channel", "deploy", "fleet", "paper", "study"}
)


def test_the_default_job_is_complete() -> None:
    config = load_config([])
    assert job(config).n_devices == config.fleet.devices
    assert Path(str(job(config).model.source)).is_dir()
    assert local_work(config).batch_size == config.train.batch_size
    assert codec_plan(config).uplink["name"] == "identity"
    build_scheme(config)


NEEDED = {
    ("model", "checkpoint"): ["model.source=x"],
    ("data", "e2e"): ["data.path=x"],
    ("data", "text"): ["data.path=x"],
    ("data", "classification"): ["data.path=x"],
    ("data", "chat"): ["data.path=x"],
    ("data", "hub"): ["data.name=x"],
}


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_file_makes_a_job_and_opens_with_its_command(group: str, name: str) -> None:
    config = load_config([f"{group}={name}", *NEEDED.get((group, name), [])])
    job(config)
    codec_plan(config)
    build_scheme(config)
    first = (config_dir() / group / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# fedsplit run ")
    assert f"{group}=" in first


def test_a_model_can_be_any_name_or_path() -> None:
    assert load_config(["model=org/model-7b"]).model.source == "org/model-7b"
    assert load_config(["model=./some/folder"]).model.source == "./some/folder"


def test_a_scheme_is_chosen_by_name_with_its_settings() -> None:
    scenario = build_scenario(load_config(["strategy=vanilla", "strategy.cut=3"]))
    assert isinstance(scenario.scheme, Vanilla)
    (branch,) = scenario.plan_round(1).branches
    assert {str(turn.route) for turn in branch.turns} == {"device[0:3] -> server[3:6]"}


def build_all(overrides: list[str]) -> None:
    config = load_config(overrides)
    run_settings(config)
    job(config)
    local_work(config)
    build_scheme(config)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("strategy=splitfde", "strategy='splitfde': must be one of .*splitfed"),
        ("train.batch_size=0", "train.batch_size=0: must be at least 1"),
        ("train.optimizer.name=sdg", "name='sdg': must be one of adadelta, adafactor, .*sgd"),
        (
            "train.optimizer.rate=1",
            "train.optimizer.rate=1: must be a known setting",
        ),
        ("+train.optimizer.rate=1", "rate=1: must be a known setting"),
        ("data=nosuch", "nosuch"),
        ("model.train=some", "train='some': must be one of lora, full"),
        ("rounds=0", "rounds=0: must be at least 1"),
        ("rounds=many", "rounds='many': must be a whole number"),
        ("run.concurrency=0", "concurrency=0: must be at least 1"),
        ("fleet.devices=0", "fleet.devices=0: must be a whole number, at least 1"),
        ("roundz=3", "roundz=3: must be a known setting; the nearest is rounds"),
        ("+strategy.cutt=1", "cutt"),
    ],
)
def test_a_mistake_is_one_error_that_names_the_field(override: str, complaint: str) -> None:
    with pytest.raises(FedsplitError, match=f"(?s){complaint}"):
        build_all([override])


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Return the folder of a run that has been."""
    saved = plain(load_config(["rounds=3", "train.steps=5", "aggregator=fedadam"]))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    return tmp_path


def test_resuming_takes_the_configuration_of_the_folder(earlier: Path) -> None:
    config = load_config(
        [f"resume={earlier}", "rounds=7", "train.optimizer.lr=1", "aggregator.eta=2"]
    )
    assert (config.rounds, config.train.steps, config.train.optimizer.lr) == (7, 5, 1)
    assert (config.aggregator.eta, config.aggregator.tau) == (2, 1e-6)
    assert output_folder(config) == earlier


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model=gpt2", "model.source='gpt2': must be 'package:default' as in the run"),
        ("model.r=4", "model.r=4: must be 8 as in the run"),
        ("strategy=vanilla", "strategy.name='vanilla': must be 'splitfed'"),
        ("strategy=sft", "strategy.name='sft': must be 'splitfed'"),
        ("codec=int8", "codec.uplink.name='int8': must be 'identity'"),
        ("data=digits", "data.source='digits': must be 'stdlib'"),
        ("data.seq_len=64", "data.seq_len=64: must be 128"),
        ("fleet.devices=5", "fleet.devices=5: must be 4"),
        ("channel=umi", "channel.path_loss='umi': must be 'papers'"),
        ("seed=7", "seed=7: must be 0"),
        ("aggregator=fedavg", "aggregator._target_=.*FedAvg': must be .*FedAdam'"),
        ("output=elsewhere", "output=.*elsewhere': must be absent with resume="),
        ("round=7", "round=7: must be a known setting; the nearest is rounds"),
        ("+evaluate.evry=2", "evaluate.evry=2: must be a known setting; the nearest"),
    ],
)
def test_what_must_stay_in_a_run_that_goes_on(earlier: Path, override: str, complaint: str) -> None:
    with pytest.raises(FedsplitError, match=complaint):
        load_config([f"resume={earlier}", override])


@pytest.mark.parametrize("same", ["strategy=splitfed", "seed=0", "data=stdlib", "model.r=8"])
def test_what_is_given_again_as_it_was_changes_nothing(earlier: Path, same: str) -> None:
    assert load_config([f"resume={earlier}", same]) == load_config([f"resume={earlier}"])


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "rounds: 3\nfoo: 1", "", "\x00", "&a [*a]", "{1: 2}", "!!python/x y"]
)
def test_a_configuration_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FedsplitError, match=r"config\.yaml"):
        load_config([f"resume={tmp_path}"])
    with pytest.raises(FedsplitError, match="resume="):
        load_config([f"resume={tmp_path / 'missing'}"])


def settings_of(described: Any) -> set[str]:
    """Return the names of what can be set of a dataclass or a class."""
    return set(inspect.signature(described).parameters) - {"inner"}


def test_every_setting_stands_in_the_configuration() -> None:
    """What is not there is refused, so nothing may be missing."""
    config = load_config([])
    link = settings_of(LinkSettings)
    recipe = settings_of(OptimizerSpec) - {"part"}  # each turn's own
    of_train = {*config.train, *config.train.optimizer} - {"optimizer"}
    elsewhere = {"ranks", "averaged"}  # model.r_by_device, aggregator.adapters
    assert of_train == recipe | (settings_of(LocalWork) - elsewhere)
    assert set(config.privacy) == settings_of(PrivacySpec) | {"audit", "bottleneck", "max_read"}
    of_run = {*settings_of(RunSettings), *settings_of(Patience)} - {"rounds", "evaluate_every"}
    assert set(config.evaluate) == {"every"} | settings_of(EvaluateSettings)
    assert set(config.keep) == settings_of(KeepSettings)
    assert set(config.stop) == settings_of(StopSettings)
    room = {"streams", "streams_per_peer", "memory_bytes", "memory_per_peer_bytes", "held_bytes"}
    assert room <= settings_of(ServerLimits)
    assert {*config.run, *config.link} == of_run | link | room
    assert set(config.channel) == settings_of(ChannelSpec)
    assert set(config.fleet) == {"csv", "data", "server_profile", *settings_of(FleetSpec)}
    assert set(config.codec) == settings_of(CodecPlan)
    # How ranks differ is the devices' work; others come with aggregator.adapters=ffa and privacy.
    of_model = settings_of(ModelSpec) - {"freeze_a", "bottleneck"} | {"r_by_device"}
    for name in groups()["model"]:
        given = NEEDED.get(("model", name), [])
        assert set(load_config([f"model={name}", *given]).model) == of_model
    for name in groups()["strategy"]:
        chosen = set(load_config([f"strategy={name}"]).strategy)
        assert chosen - {"name"} == settings_of(find_scheme(name))
    of_data = [
        load_config([f"data={name}", *NEEDED.get(("data", name), [])]).data
        for name in groups()["data"]
    ]
    assert set().union(*of_data) == settings_of(DataSpec)


NO_PATHS = {"channel.path_loss", "data.source", "codec.uplink.key_every"}
PATH_WORDS = {
    *("file", "path", "folder", "table", "certificate", "key", "root"),
    *("source", "output", "resume"),
}


def test_every_setting_that_is_a_path_is_known_as_one() -> None:
    """A new one that is called like a file must be on the list, or here among the others."""
    found = set()
    for group, names in groups().items():
        for name in names if group not in {"paper", "study"} else ():
            config = load_config([f"{group}={name}", *NEEDED.get((group, name), [])])
            found |= set(_leaf_names(plain(config)))
    named = {key for key in found if set(key.rpartition(".")[2].split("_")) & PATH_WORDS}
    named = {
        key
        for key in named - NO_PATHS
        if not key.startswith(("codec.uplink.key", "codec.downlink.key"))
    }
    assert named <= {*PATHS, *PATHS_OR_NAMES}
    assert {*PATHS, *PATHS_OR_NAMES} <= found


def _leaf_names(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaf_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_time_limits_are_those_of_the_library_unless_set() -> None:
    """What a page says of a limit is what the library does by default."""
    assert patience(load_config([])) == Patience(connect_s=120)
    limits = job(load_config([])).limits
    assert limits == ServerLimits(backward_timeout_s=120, supply_timeout_s=600)
    changed = job(load_config(["link.backward_s=7", "link.reply_s=8", "run.last_words_s=0.5"]))
    assert (changed.limits.backward_timeout_s, changed.limits.supply_timeout_s) == (7, 8)
    assert changed.patience.last_words_s == 0.5
