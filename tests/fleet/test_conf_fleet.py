"""Every file of conf/fleet builds a fleet, and opens with the command that uses it."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedsplit.errors import FedsplitError
from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.mapping import from_mapping, to_mapping

FOLDER = Path(__file__).parents[2] / "conf"
FILES = sorted((FOLDER / "fleet").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_builds(file):
    assert file.read_text().startswith(f"# fedsplit plan fleet={file.stem}")
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        values = OmegaConf.to_container(compose(f"fleet/{file.stem}").fleet)
    assert values.pop("data") is None  # what the devices' data are is none of the fleet's
    for of_the_user in ("csv", "server_profile"):
        assert values.pop(of_the_user) is None
    if file.stem == "boards":  # types come from it
        assert values["types"] is None
        values["types"] = ["jetson_nano"]
    spec = from_mapping(FleetSpec, values, "fleet")
    assert set(values) == set(to_mapping(spec))
    assert build_fleet(spec, 0).n_devices == spec.devices


def test_wrong_field_or_type_is_named():
    with pytest.raises(
        FedsplitError, match=r"fleet\.wheels=4: must be a known setting of fleet: devices"
    ):
        from_mapping(FleetSpec, {"wheels": 4}, "fleet")
    with pytest.raises(FedsplitError, match=r"fleet\.devices='many': must be a whole number"):
        from_mapping(FleetSpec, {"devices": "many"}, "fleet")
