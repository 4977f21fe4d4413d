"""Every file of conf/channel makes a channel, and opens with the command that uses it."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedsplit.errors import FedsplitError
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.wireless import Channel, ChannelSpec, uplink_bps

FOLDER = Path(__file__).parents[2] / "conf"
FILES = sorted((FOLDER / "channel").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_makes_a_channel(file, tmp_path):
    assert file.read_text().startswith(f"# fedsplit plan channel={file.stem}")
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        values = OmegaConf.to_container(compose(f"channel/{file.stem}").channel)
    if file.stem == "trace":
        with pytest.raises(FedsplitError, match="channel.trace_file=None: must be a CSV file"):
            from_mapping(ChannelSpec, values, "channel")
        rates = tmp_path / "rates.csv"
        rates.write_text("round,device,uplink_bps,downlink_bps\n0,0,5e6,2e7\n")
        values["trace_file"] = str(rates)
    spec = from_mapping(ChannelSpec, values, "channel")
    assert set(values) == set(to_mapping(spec))
    state = Channel(spec, np.array([[30.0, 10.0], [80.0, -20.0]])).realise(1)
    assert np.all(uplink_bps(state, 1e6) > 0)


def test_wrong_field_is_named():
    with pytest.raises(
        FedsplitError, match=r"channel\.antennas=4: must be a known setting of channel"
    ):
        from_mapping(ChannelSpec, {"antennas": 4}, "channel")
