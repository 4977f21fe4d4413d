"""Odd but right: what a user may write, and what is meant by it."""

from pathlib import Path

import pytest
from fedsplit.apps.config import load_config, output_folder
from fedsplit.apps.overrides import PATHS, PATHS_OR_NAMES, expand_sweeps, parse
from omegaconf import OmegaConf

from .conftest import Typed

NAMES = (
    *(
        "my runs",
        "lr=0.1",
        "run(1)",
        "o'brien",
        "a,b",
        "donn\u00e9es",
        "\U0001f642",
        "[red]",
        "{x}",
    ),
    *(
        "a:b",
        "#1",
        "100%",
        "back\\\\slash",
        'double"quote',
        "$HOME",
        "-x",
        "caf\u00e9 (1) \u00e9=x'",
    ),
)


# Where a path belongs to another choice than the default one.
CHOSEN = {
    "data.path": ["data=text"],
    "data.test_path": ["data=text", "data.path=x"],
    "data.name": ["data=hub"],
    "strategy.codec_table": ["strategy=sft"],
}


@pytest.mark.parametrize("key", sorted({*PATHS, *PATHS_OR_NAMES} - {"resume"}))
@pytest.mark.parametrize("name", NAMES)
def test_every_path_is_taken_as_it_is_written(key: str, name: str, here: Path) -> None:
    (here / name).mkdir()
    chosen = CHOSEN.get(key, [])
    config = load_config([*chosen, f"{key}={name}"])
    assert OmegaConf.select(config, key) == str(here / name)
    config = load_config([*chosen, f"{key}=~/{name}"])
    assert OmegaConf.select(config, key) == str(here / name)


RIGHT = [
    ("rounds=3", "rounds", 3),
    ("+rounds=3", "rounds", 3),
    ("++rounds=3", "rounds", 3),
    ("+train.optimizer.weight_decay=0.1", "train.optimizer.weight_decay", 0.1),
    ("train.optimizer.lr=1e-3", "train.optimizer.lr", 1e-3),
    ("train.steps=null", "train.steps", None),
    ("seed=0", "seed", 0),
    ("seed=9223372036854775807", "seed", 2**63 - 1),
    ("rounds=${fleet.devices}", "rounds", 4),
    ("output=null", "output", None),
    ("strategy='vanilla'", "strategy.name", "vanilla"),
    ("model='gpt2'", "model.source", "gpt2"),
    ("model=org/model-7b", "model.source", "org/model-7b"),
    ("model.config={num_hidden_layers: 2}", "model.config.num_hidden_layers", 2),
    ("model.config.num_hidden_layers=2", "model.config.num_hidden_layers", 2),
    ("strategy.cut={name: fast}", "strategy.cut.name", "fast"),
    ("+aggregator.proximal_mu=1", "aggregator.proximal_mu", 1),
    ("train={steps: 3}", "train.steps", 3),
    ("fleet.types=[a100]", "fleet.types", ["a100"]),
    ("channel=umi", "channel.path_loss", "umi"),
]


@pytest.mark.parametrize(("override", "key", "value"), RIGHT, ids=[row[0] for row in RIGHT])
def test_an_odd_way_of_writing_means_what_it_says(
    override: str, key: str, value: object, here: Path
) -> None:
    assert OmegaConf.select(load_config([override]), key) == value


def test_brackets_are_printed_as_they_are(here: Path, typed: Typed) -> None:
    code, _, error = typed(["run", "resume=/nope[/x][red]"])
    assert code == 2
    assert "/nope[/x][red]" in error


def test_control_characters_of_others_are_not_printed(here: Path, typed: Typed) -> None:
    code, _, error = typed(["run", "resume=/\x1b[31m\x07x"])
    assert code == 2
    assert "\x1b" not in error
    assert "\x07" not in error


def test_a_later_choice_wins(here: Path) -> None:
    config = load_config(["strategy=vanilla", "strategy=gsfl", "output=a", "output=b"])
    assert config.strategy.name == "gsfl"
    assert output_folder(config) == here / "b"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("strategy.codec_table=package:default,null", ["package:default", None]),
        ("strategy.codec_table='null',null", ["null", None]),
        ("model=gpt2,name:tag", ["gpt2", "name:tag"]),
    ],
)
def test_what_a_sweep_goes_through_is_taken_as_it_is_written(
    text: str, values: list[str | None], here: Path
) -> None:
    (swept,) = expand_sweeps([text], multirun=True)
    assert [parse([item])[-1].value for item in swept] == values
