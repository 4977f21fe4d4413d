"""conf/data: one file per source, valid as it stands, opening with the command that uses it."""

from pathlib import Path

import pytest
import yaml

from fedsplit.data import SOURCES, DataSpec
from fedsplit.mapping import from_mapping

FOLDER = Path(__file__).parents[2] / "conf" / "data"
FILES = {path.stem: path.read_text() for path in FOLDER.glob("*.yaml")}


def test_every_source_has_its_file():
    assert set(FILES) == {*SOURCES, "classification"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_a_data_spec_and_opens_with_its_command(name):
    text = FILES[name]
    values = yaml.safe_load(text)
    given = {name: "given" if value == "???" else value for name, value in values.items()}
    # Labelled texts are a way to read texts.
    source = "text" if name == "classification" else name
    assert from_mapping(DataSpec, given, "data").source == source
    assert text.startswith(f"# fedsplit run data={name}")
    for field, value in values.items():
        assert value != "???" or f"data.{field}=" in text.partition("source:")[0]


def test_the_default_file_is_the_default_spec():
    values = yaml.safe_load((FOLDER / "stdlib.yaml").read_text())
    assert from_mapping(DataSpec, values, "data") == DataSpec()
