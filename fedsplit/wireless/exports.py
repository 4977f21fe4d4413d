"""What ray tracers and network simulators write of links."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, require

_CIR = "[num_rx, num_rx_ant, 1, num_tx_ant, num_paths, num_time_steps]"


def read_arrays(path: Path) -> tuple[Array, Array | None]:
    """Return the power gains of the links in a file of arrays, ``[times, devices]``, and the times.

    Receivers that no path reaches, at some time, are left out.

    Notes
    -----
    Sionna RT's ``a``: complex coefficients of paths, ``[num_rx, num_rx_ant, num_tx, num_tx_ant,
    num_paths, num_time_steps]`` (``sionna.rt.Paths.cir``); the gain is the sum of ``|a|^2`` over
    paths, which is the mean over a wide band, in the mean over pairs of antennas. DeepMIMO's
    ``power``: ``10 log10 |a|^2`` of each path, ``[num_rx, num_paths]``, NaN where there is none.

    Raises
    ------
    FedsplitError
        If the file holds neither, or not as said.
    """
    try:
        held: Mapping[str, Any] = loadmat(path) if path.suffix == ".mat" else np.load(path)
        arrays = {name: held[name] for name in ("a", "power", "sampling_frequency") if name in held}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise FedsplitError(f"{path}: cannot be read as arrays: {error}") from error
    times_s: Array | None = None
    if "a" in arrays:
        paths = arrays["a"]
        right = paths.ndim == 6 and paths.shape[2] == 1
        require(right, f"{path}: a", str(paths.shape), f"of shape {_CIR}, of one transmitter")
        gain = (np.abs(paths) ** 2).sum(axis=4).mean(axis=(1, 2, 3)).T
        if len(gain) > 1:
            rate_hz = float(arrays.get("sampling_frequency", 0.0))
            allowed = "given and above 0, for there are several time steps"
            require(rate_hz > 0, f"{path}: sampling_frequency", rate_hz, allowed)
            times_s = np.arange(len(gain)) / rate_hz
    else:
        require("power" in arrays, str(path), list(held), "with an array a (Sionna RT) or power")
        power = np.asarray(arrays["power"], dtype=np.float64)
        require(power.ndim == 2, f"{path}: power", str(power.shape), "of shape [num_rx, num_paths]")
        gain = np.nansum(10 ** (power / 10), axis=1)[None]
    reached = (gain > 0).all(axis=0)
    require(bool(reached.any()), str(path), "no receiver", "one that a path reaches, at least")
    return np.asarray(gain[:, reached], dtype=np.float64), times_s


def read_ns3(path: Path) -> tuple[Array, Array]:
    """Return the signal-to-noise ratios in a file of ns-3's ``PhyStatsCalculator``, and the times.

    Devices are in the order of their IMSI; a ratio holds until the next one is reported, the first
    one before too. Of several component carriers the first counts.

    Notes
    -----
    ``% time cellId IMSI RNTI rsrp sinr ComponentCarrierId`` (down) or ``% time cellId IMSI RNTI
    sinrLinear componentCarrierId`` (up), in seconds and linear.

    Raises
    ------
    FedsplitError
        If columns are missing or a value is no number.
    """
    try:
        with path.open(encoding="utf-8") as file:
            names = file.readline().lstrip("% ").split()
            lines = file.readlines()
        rows = np.loadtxt(lines, ndmin=2) if lines else np.empty((0, 0))
    except (OSError, ValueError) as error:
        raise FedsplitError(f"{path}: cannot be read as a trace of ns-3: {error}") from error
    ratio = next((name for name in ("sinr", "sinrLinear") if name in names), "sinr")
    for name in ("time", "IMSI", ratio):
        require(name in names, f"{path}: columns", " ".join(names), f"with {name}")
    width = rows.shape[1] if rows.size else 0
    require(width == len(names), f"{path}: values in a line", width, f"{len(names)}, as it opens")
    carriers = [column for name, column in zip(names, rows.T, strict=True) if "arrier" in name]
    if carriers:
        rows = rows[carriers[0] == carriers[0].min()]
    time, who, value = (rows[:, names.index(name)] for name in ("time", "IMSI", ratio))
    times_s, at = np.unique(time, return_inverse=True)
    devices, of = np.unique(who, return_inverse=True)
    table = np.full((len(times_s), len(devices)), np.nan)
    table[at, of] = value
    for column in table.T:
        known = np.flatnonzero(~np.isnan(column))
        latest = np.searchsorted(known, np.arange(len(column)), side="right") - 1
        column[:] = column[known[np.maximum(latest, 0)]]
    return table, times_s - times_s[0]
