"""Rates from SNR: Shannon's formula and the tables of TS 38.214."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.wireless import RATE_MODELS, db_to_linear, dbm_to_watt, spectral_efficiency
from fedsplit.wireless.rate import CQI_64QAM, CQI_256QAM, snr_for_efficiency


def test_decibels():
    assert db_to_linear([0, 10, -30]).tolist() == pytest.approx([1, 10, 1e-3])
    assert dbm_to_watt(30) == pytest.approx(1)


def test_shannon_doubles_snr_plus_one_per_bit():
    assert spectral_efficiency([0, 1, 3, 255]).tolist() == pytest.approx([0, 1, 2, 8])


@given(st.floats(1e-6, 60))
def test_the_snr_of_a_rate_gives_the_rate_back(efficiency):
    found = spectral_efficiency(snr_for_efficiency(efficiency))
    assert found == pytest.approx(efficiency, rel=1e-12)


@given(snr_db=st.floats(-40, 60), gap_db=st.floats(0, 6))
def test_table_rate_is_the_largest_entry_below_capacity(snr_db, gap_db):
    snr = 10 ** (snr_db / 10)
    capacity = np.log2(1 + snr / 10 ** (gap_db / 10))
    for model, table in (("cqi_64qam", CQI_64QAM), ("cqi_256qam", CQI_256QAM)):
        below = [entry for entry in (0.0, *table) if entry <= capacity]
        assert spectral_efficiency(snr, model, gap_db) == below[-1]


@pytest.mark.parametrize(("table", "bits"), [(CQI_64QAM, 6), (CQI_256QAM, 8)])
def test_table_entries_are_the_modulation_times_a_code_rate_of_1024ths(table, bits):
    # Efficiency = modulation order x code rate; the standard lists code rates x 1024 as integers.
    modulations = {2, 4, 6, bits}
    assert len(table) == 15
    assert list(table) == sorted(table)
    for entry in table:
        rates = [1024 * entry / order for order in modulations]
        assert any(rate < 1024 and abs(rate - round(rate)) < 0.03 for rate in rates)


def test_unknown_model_lists_the_known():
    with pytest.raises(FedsplitError, match="rate='qam': must be one of shannon, cqi_64qam"):
        spectral_efficiency(1.0, "qam")
    assert len(RATE_MODELS) == 3
