"""What the world of a run looks like: who has which labels, and who stands where."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from fedsplit.data import FederatedData, load_data
from fedsplit.data.partition import LOCAL
from fedsplit.errors import require, require_choice
from fedsplit.fleet import Fleet
from fedsplit.models.check import read_tokenizer
from fedsplit.models.names import CLASSIFIERS, SEQUENCES
from fedsplit.report.studies.charts import BAR, HEAT, MAP, Chart
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.groups import GROUP, grouped
from fedsplit.wireless import Channel

from .config import data_spec, model_spec
from .resume import resumed
from .scenario import build_system

LABELS = "labels"
WORLDS = LABELS, MAP
_SAMPLES = "data.train-samples"


def world(study: Study, kind: str, where: Sequence[str] = ()) -> Chart:
    """Return what a figure of the world of a run shows: of the first run, of several.

    Parameters
    ----------
    study : Study
        The runs.
    kind : str
        ``labels``: training examples of each class and device, as `data.partition` divides them;
        where nothing is classified, or devices have data of their own, training samples of each.
        ``map``: devices and stations in the plane, and the mean gain of each device's link.
    where : sequence of str
        As of `grouped`.

    Raises
    ------
    FedsplitError
        If there is no such run, or its data cannot be read again.
    """
    require_choice("--kind", kind, WORLDS)
    first = grouped(study, where=where)[0]["run"].iloc[0]
    member = next(one for one in study.members if one.name == first)
    config = resumed(study.folder / member.folder, [])
    if kind == MAP:
        system = build_system(config)
        return gain_map(system.fleet, system.channel)
    spec = model_spec(config)
    if spec.task in CLASSIFIERS and config.data.partition != LOCAL:
        return label_counts(_divided(config))
    held = study.frame[(study.frame["run"] == first) & (study.frame["metric"] == _SAMPLES)]
    require(len(held) > 0, "--kind", kind, "of a run that wrote down what its devices hold")
    names = [f"device {device}" for device in held["device"]]
    data = pd.DataFrame({GROUP: names, "samples": held["value"].astype(int).tolist()})
    return Chart(kind=BAR, names=("samples",), data=data, ci=False)


def label_counts(data: FederatedData) -> Chart:
    """Return how many training examples of each class each device holds."""
    assert data.n_labels is not None
    labels = np.arange(data.n_labels)
    parts = [
        pd.DataFrame({"device": device, "label": labels, "examples": counts})
        for device, counts in enumerate(data.groups(data.n_labels))
    ]
    names = ("device", "label", "examples")
    return Chart(kind=HEAT, names=names, data=pd.concat(parts, ignore_index=True), ci=False)


def gain_map(fleet: Fleet, channel: Channel) -> Chart:
    """Return where devices and stations stand, and the mean gain of each device's uplink in dB.

    It is that of the start, with path loss and shadowing, without fading.
    """
    stations = fleet.stations_m
    at = np.concatenate([fleet.devices.positions_m, stations])
    gain = channel.mean(0).gain_up
    data = pd.DataFrame(
        {
            "node": ["device"] * fleet.n_devices + ["station"] * len(stations),
            "index": [*range(fleet.n_devices), *range(len(stations))],
            "x_m": at[:, 0],
            "y_m": at[:, 1],
            "station": [*fleet.home.tolist(), *range(len(stations))],
            "gain_db": [*(10 * np.log10(gain)), *[np.nan] * len(stations)],
        }
    )
    return Chart(kind=MAP, names=("x_m", "y_m", "gain_db"), data=data, ci=False)


def _divided(config: DictConfig) -> FederatedData:
    spec = model_spec(config)
    tokenizer = read_tokenizer(str(spec.source)) if spec.task == SEQUENCES else None
    return load_data(data_spec(config), tokenizer, config.fleet.devices, config.seed)
