"""Data rate of a link from its bandwidth share and signal-to-noise ratio."""

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.errors import require_choice

# Bits per symbol of each channel quality indicator from 1 up: TS 38.214 V16, Table 5.2.2.1-2
# (64QAM) and Table 5.2.2.1-3 (256QAM), column "efficiency".
CQI_64QAM = (
    0.1523, 0.2344, 0.3770, 0.6016, 0.8770, 1.1758, 1.4766, 1.9141,
    2.4063, 2.7305, 3.3223, 3.9023, 4.5234, 5.1152, 5.5547,
)  # fmt: skip
CQI_256QAM = (
    0.1523, 0.3770, 0.8770, 1.4766, 1.9141, 2.4063, 2.7305, 3.3223,
    3.9023, 4.5234, 5.1152, 5.5547, 6.2266, 6.9141, 7.4063,
)  # fmt: skip
RATE_MODELS = {"shannon": None, "cqi_64qam": CQI_64QAM, "cqi_256qam": CQI_256QAM}


def db_to_linear(value_db: ArrayLike) -> Array:
    """Return the power ratio of a value in dB."""
    result: Array = np.power(10.0, np.asarray(value_db, dtype=np.float64) / 10)
    return result


def dbm_to_watt(value_dbm: ArrayLike) -> Array:
    """Return the power in watts of a value in dBm."""
    return db_to_linear(value_dbm) / 1e3


def spectral_efficiency(snr: ArrayLike, model: str = "shannon", gap_db: float = 0.0) -> Array:
    """Return the bits per second and hertz that a link carries.

    Parameters
    ----------
    snr : array_like
        Linear signal-to-noise ratio, any shape.
    model : str
        "shannon": ``log2(1 + snr / gap)``. "cqi_64qam", "cqi_256qam": the largest entry of the
        TS 38.214 table that this does not exceed, and 0 (out of coverage) below the first. The
        standard ties an entry to a block error rate of 0.1, not to an SNR; `gap_db` is the distance
        from capacity at which the receiver reaches it.
    gap_db : float
        Distance from capacity.

    Raises
    ------
    FedsplitError
        If `model` is unknown.
    """
    require_choice("rate", model, RATE_MODELS)
    capacity: Array = np.log1p(np.asarray(snr) / db_to_linear(gap_db)) / np.log(2)
    table = RATE_MODELS[model]
    if table is None:
        return capacity
    levels = np.array([0.0, *table])
    result: Array = levels[np.searchsorted(levels, capacity, side="right") - 1]
    return result


def snr_for_efficiency(efficiency: ArrayLike) -> Array:
    """Return the SNR at which Shannon's formula carries `efficiency` bit/s/Hz: ``2^x - 1``."""
    result: Array = np.expm1(np.asarray(efficiency, dtype=np.float64) * np.log(2))
    return result
