"""conf/data: one file per source, valid as it stands, opening with the command that uses it."""

from pathlib import Path

import pytest
import yaml

from fedsplit.data import SOURCES, DataSpec
from fedsplit.mapping import from_mapping

FOLDER = Path(__file__).parents[2] / "conf" / "data"


def test_every_source_has_its_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_is_a_data_spec_and_opens_with_its_command(source):
    text = (FOLDER / f"{source}.yaml").read_text()
    values = yaml.safe_load(text)
    given = {name: "given" if value == "???" else value for name, value in values.items()}
    assert from_mapping(DataSpec, given, "data").source == source
    assert text.startswith(f"# fedsplit run data={source}")
    for name, value in values.items():
        assert value != "???" or f"data.{name}=" in text.partition("source:")[0]


def test_the_default_file_is_the_default_spec():
    values = yaml.safe_load((FOLDER / "stdlib.yaml").read_text())
    assert from_mapping(DataSpec, values, "data") == DataSpec()
