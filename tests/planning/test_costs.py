"""Costs per cut are those of the model's profile; a device holds only what fits."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.plan import Route
from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.errors import InfeasibleError
from fedsplit.profiles import ModelProfile, SharedWeights, UnitProfile

_UNITS = st.builds(
    UnitProfile,
    *(st.floats(0, 1e12) for _ in range(8)),
)


@given(_UNITS, st.lists(_UNITS, min_size=1, max_size=6), _UNITS, st.integers(1, 64))
def test_costs_are_the_segments_of_the_profile(embed, blocks, head, batch: int) -> None:
    profile = ModelProfile("random", 8, embed, tuple(blocks), head)
    costs = CutCosts.from_profile(profile, batch)
    for cut in range(len(blocks) + 1):
        device, server = profile.segments(Route.two_tier(len(blocks), cut))
        assert costs.device_flops[cut] == pytest.approx(
            batch * (device.forward_flops + device.backward_flops)
        )
        whole = costs.device_flops[cut] + costs.server_flops[cut]
        assert costs.server_flops[cut] == pytest.approx(
            batch * (server.forward_flops + server.backward_flops), rel=1e-9, abs=1e-9 * whole
        )
        assert costs.uplink_bits[cut] == 8 * batch * device.boundary_bytes
        trained = device.adapter_bytes > 0
        assert costs.downlink_bits[cut] == (costs.uplink_bits[cut] if trained else 0)
        assert costs.adapter_bits[cut] == pytest.approx(8 * device.adapter_bytes)
        assert costs.memory_bytes[cut] == pytest.approx(
            device.parameter_bytes
            + batch * device.activation_bytes
            + device.adapter_bytes  # their gradients
            + device.optimizer_bytes
            + batch * device.workspace_bytes
        )


@given(_UNITS, st.lists(_UNITS, min_size=1, max_size=6), _UNITS, st.integers(1, 64))
def test_the_last_cut_can_stand_for_the_whole_model(embed, blocks, head, batch: int) -> None:
    profile = ModelProfile("random", 8, embed, tuple(blocks), head)
    usual = CutCosts.from_profile(profile, batch)
    costs = CutCosts.from_profile(profile, batch, device_only=True)
    (whole,) = profile.segments(Route.device_only(len(blocks)))
    assert costs.device_flops[-1] == pytest.approx(
        batch * (whole.forward_flops + whole.backward_flops)
    )
    assert costs.server_flops[-1] == costs.uplink_bits[-1] == costs.downlink_bits[-1] == 0
    assert costs.adapter_bits[-1] == pytest.approx(8 * whole.adapter_bytes)
    assert costs.memory_bytes[-1] == pytest.approx(
        whole.parameter_bytes
        + batch * (whole.activation_bytes + whole.workspace_bytes)
        + whole.adapter_bytes
        + whole.optimizer_bytes
    )
    assert usual.possible is costs.possible is None
    for field in fields(costs)[:-1]:
        before, after = (getattr(each, field.name)[:-1] for each in (usual, costs))
        assert after == pytest.approx(before)


def _costs(**changes) -> CutCosts:
    values = {"uplink_bits": 8.0, "downlink_bits": 8.0, "adapter_bits": 1.0, "memory_bytes": 1.0}
    return CutCosts(
        device_flops=np.arange(4.0), server_flops=np.arange(4.0)[::-1], **{**values, **changes}
    )


def test_a_codec_scales_each_direction() -> None:
    costs = _costs().compressed(0.25, [1.0, 0.5, 0.5, 0.5])
    assert costs.uplink_bits.tolist() == [2.0] * 4
    assert costs.downlink_bits.tolist() == [8.0, 4.0, 4.0, 4.0]


def test_devices_hold_the_cuts_that_fit() -> None:
    devices = Devices([1.0, 1.0], [25.0, np.inf])
    allowed = devices.allowed_cuts(_costs(memory_bytes=[0, 10, 20, 30]), min_cut=1)
    assert allowed.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_a_device_too_small_for_one_block_is_named_with_what_it_lacks() -> None:
    with pytest.raises(InfeasibleError, match=r"memory of device 1 .*off by 7 bytes") as caught:
        Devices([1.0, 1.0], [99.0, 3.0]).allowed_cuts(_costs(memory_bytes=[1, 10, 20, 30]), 1)
    assert (caught.value.needed, caught.value.available) == (10, 3)


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
def test_bad_numbers_are_refused_by_name(bad: float) -> None:
    with pytest.raises(FedsplitError, match=r"uplink_bits\[2\]"):
        _costs(uplink_bits=[1.0, 1.0, bad, 1.0])
    with pytest.raises(FedsplitError, match="flops_per_s"):
        Devices([bad])
    with pytest.raises(FedsplitError, match="steps"):
        Devices([1.0], steps=bad)


def test_a_model_may_allow_some_cuts_only() -> None:
    costs, device = _costs().only([0, 2]), Devices([1.0])
    assert device.allowed_cuts(costs).tolist() == [[True, False, True, False]]
    assert device.allowed_cuts(costs, 1, 2).tolist() == [[False, False, True, False]]
    with pytest.raises(FedsplitError, match="min_cut=3: must leave a cut that the model allows: 0"):
        device.allowed_cuts(costs, 3)


def test_wrong_shapes_and_ranges_are_refused() -> None:
    with pytest.raises(FedsplitError, match="memory_bytes shape"):
        _costs(memory_bytes=[1.0, 2.0])
    with pytest.raises(FedsplitError, match="min_cut=4"):
        Devices([1.0]).allowed_cuts(_costs(), 4)
    with pytest.raises(FedsplitError, match="batch"):
        CutCosts.from_profile(ModelProfile("m", 1, UnitProfile(), (), UnitProfile()), 0)


@given(
    st.lists(
        st.builds(UnitProfile, *(st.floats(0, 1e3) for _ in range(8))), min_size=2, max_size=6
    ),
    st.lists(st.integers(0, 7), min_size=2, max_size=4, unique=True),
    st.booleans(),
)
def test_shared_weights_count_once_on_a_device(blocks, users, device_only: bool) -> None:
    """Against the segments of the same profile, at every cut; tied embeddings are 0 and last."""
    last = len(blocks) + 1
    shared = SharedWeights(tuple(sorted({min(user, last) for user in users})), 100.0, 10.0, 20.0)
    more = {"parameter_bytes": 100.0, "adapter_bytes": 10.0, "optimizer_bytes": 20.0}
    units = [
        replace(unit, **{name: getattr(unit, name) + v for name, v in more.items()})
        if place in shared.units
        else unit
        for place, unit in enumerate([UnitProfile(), *blocks, UnitProfile()])
    ]
    profile = ModelProfile("m", 8, units[0], tuple(units[1:-1]), units[-1], shared=(shared,))
    costs = CutCosts.from_profile(profile, 1, device_only=device_only)
    for cut in range(len(blocks) + 1):
        whole = device_only and cut == len(blocks)
        route = Route.device_only(cut) if whole else Route.two_tier(len(blocks), cut)
        device = profile.segments(route)[0]
        assert costs.adapter_bits[cut] == pytest.approx(8 * device.adapter_bytes)
        assert costs.memory_bytes[cut] == pytest.approx(
            device.parameter_bytes
            + device.adapter_bytes
            + device.optimizer_bytes
            + device.activation_bytes
            + device.workspace_bytes
        )
