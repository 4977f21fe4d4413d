"""The timeline against the papers' closed forms, and what any round conserves."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.fleet import RoundCost, timeline
from fedsplit.plan import Branch, CodecPlan, RoundPlan, Route, Turn
from fedsplit.testing.scenes import make_scene
from fedsplit.wireless import Channel, ChannelSpec, FadingSpec
from tests.fleet.fleet_scenarios import N_BLOCKS, random_fleet, random_profile, random_state, rounds

BATCH = 8
seeds = st.integers(0, 10_000)
cuts = st.integers(0, N_BLOCKS)
steps = st.integers(1, 20)
few = settings(max_examples=40, deadline=None)


class Papers:
    """The delay and energy formulas of the six papers, written down for one device at a time.

    `n_sharing` devices share the band; by default one of each branch does.
    """

    def __init__(self, profile, fleet, state, n_branches, n_sharing=None):
        self.units = [profile.embed, *profile.blocks, profile.head]
        self.fleet, self.state, self.n_branches = fleet, state, n_branches
        self.n_sharing = n_sharing or n_branches

    def flops(self, which, first, last):
        return BATCH * sum(getattr(unit, f"{which}_flops") for unit in self.units[first:last])

    def adapters(self, first, last):
        return 8 * sum(unit.adapter_bytes for unit in self.units[first:last])

    def boundary(self, cut):
        return 8 * BATCH * self.units[cut].boundary_bytes

    def device_speed(self, n):
        return self.fleet.devices.clock_hz[n] * self.fleet.devices.flops_per_cycle[n]

    def server_speed(self, k=0):
        return self.fleet.servers.clock_hz[k] * self.fleet.servers.flops_per_cycle[k]

    def up(self, n):
        band, noise = self.state.uplink_hz / self.n_sharing, self.state.noise_w_hz
        snr = self.state.power_up_w[n] * self.state.gain_up[n] / (noise * band)
        return band * np.log2(1 + snr)

    def down(self, n):
        whole, noise = self.state.downlink_hz, self.state.noise_w_hz
        snr = self.state.power_down_w * self.state.gain_down[n] / (noise * whole)
        return whole / self.n_sharing * np.log2(1 + snr)

    def two_tier(self, n, cut, count, server_speed):
        """D(c) of CARD; without the adapters it is one iteration of SFT, times `count`."""
        device = self.flops("forward", 0, cut + 1) + self.flops("backward", 0, cut + 1)
        server = self.flops("forward", cut + 1, None) + self.flops("backward", cut + 1, None)
        adapters, boundary = self.adapters(0, cut + 1), self.boundary(cut)
        return (
            adapters / self.down(n)
            + count
            * (
                device / self.device_speed(n)
                + boundary / self.up(n)
                + server / server_speed
                + boundary / self.down(n)
            )
            + adapters / self.up(n)
        )

    def whole_model(self, n, count):
        """Federated learning: all compute on the device, the whole adapter set both ways."""
        work = self.flops("forward", 0, None) + self.flops("backward", 0, None)
        adapters = self.adapters(0, None)
        return adapters / self.down(n) + count * work / self.device_speed(n) + adapters / self.up(n)

    def u_shaped(self, n, first, last, count):
        """The two boundaries of a U cross the radio in both directions."""
        home = self.flops("forward", 0, first + 1) + self.flops("backward", 0, first + 1)
        home += self.flops("forward", last + 1, None) + self.flops("backward", last + 1, None)
        server = sum(self.flops(which, first + 1, last + 1) for which in ("forward", "backward"))
        crossing = self.boundary(first) + self.boundary(last)
        adapters = self.adapters(0, first + 1) + self.adapters(last + 1, None)
        step = home / self.device_speed(n) + server / self.server_speed()
        step += crossing * (1 / self.up(n) + 1 / self.down(n))
        return adapters / self.down(n) + count * step + adapters / self.up(n)

    def three_tier(self, n, edge, first, last, count, exchange=True):
        """SplitLLM's tau_k times E, with the adapters of user and edge on wire and radio."""
        user, middle, top = (0, first + 1), (first + 1, last + 1), (last + 1, None)
        total = {
            name: self.flops("forward", *part) + self.flops("backward", *part)
            for name, part in (("user", user), ("middle", middle), ("top", top))
        }
        wire = self.fleet.backhaul_bps
        step = (
            total["user"] / self.device_speed(n)
            + self.boundary(first) * (1 / self.up(n) + 1 / self.down(n))
            + total["middle"] / self.server_speed(1 + edge)
            + 2 * self.boundary(last) / wire
            + total["top"] / self.server_speed()
        )
        own = self.adapters(*user)
        there_and_back = 2 * self.adapters(0, last + 1) / wire if exchange else 0.0
        return count * step + own * (1 / self.up(n) + 1 / self.down(n)) + there_and_back

    def edge_rounds(self, users, edge, first, last, count, times):
        """The slowest user of an edge, and averaging, `times` over; the wire carries two sets."""
        slowest = max(self.three_tier(n, edge, first, last, count, exchange=False) for n in users)
        averaging = max(
            self.mean_of(len(users), 0, last + 1, 1 + edge),
            self.mean_of(len(users), last + 1, None, 0),
        )
        kept = self.adapters(0, last + 1)
        exchange = 2 * kept / self.fleet.backhaul_bps
        # The edge does not wait for the cloud to average what is the cloud's.
        left = self.mean_of(len(users), 0, last + 1, 1 + edge) + exchange / 2
        ending = max(left, averaging) - averaging
        return exchange / 2 + times * (slowest + averaging) + ending

    def mean_of(self, n_sets, first, last, server):
        """Two FLOPs for each 4-byte adapter value of each set, if there are several."""
        values = self.adapters(first, last) / 32
        return 2 * values * n_sets / self.server_speed(server) if n_sets > 1 else 0.0

    def averaging(self):
        return self.mean_of(self.n_branches, 0, None, 0)


def turn(n, route, count, **more):
    return Turn(n, route, count, **more)


def scene(seed, n_branches, n_devices=5, edges=0, discipline="fifo"):
    profile, fleet = random_profile(seed), random_fleet(seed, n_devices, edges, discipline)
    state = random_state(seed, fleet)
    return profile, fleet, state, Papers(profile, fleet, state, n_branches)


def delay(plan, profile, fleet, state):
    return timeline(plan, profile, fleet, state, BATCH).cost.delay_s


def close(value):
    return pytest.approx(value, rel=1e-9)


@few
@given(seed=seeds, cut=cuts, count=steps)
def test_sequential_devices_add_up(seed, cut, count):
    """Vanilla split learning, CARD, Fast: one branch, the sum over devices."""
    profile, fleet, state, papers = scene(seed, 1)
    route = Route.two_tier(N_BLOCKS, cut)
    plan = RoundPlan((Branch(tuple(turn(n, route, count) for n in range(5))),))
    speed = papers.server_speed()
    expected = sum(papers.two_tier(n, cut, count, speed) for n in range(5))
    assert delay(plan, profile, fleet, state) == close(expected)


@few
@given(seed=seeds, count=steps, each=st.lists(cuts, min_size=5, max_size=5))
def test_parallel_devices_take_as_long_as_the_slowest(seed, count, each):
    """SFT, SplitFed, FedsLLM: one branch per device, an own cut for each, B/N of the band."""
    profile, fleet, state, papers = scene(seed, 5, discipline="unlimited")
    plan = RoundPlan(
        tuple(
            Branch((turn(n, Route.two_tier(N_BLOCKS, cut), count),)) for n, cut in enumerate(each)
        )
    )
    speed = papers.server_speed()
    slowest = max(papers.two_tier(n, cut, count, speed) for n, cut in enumerate(each))
    assert delay(plan, profile, fleet, state) == close(slowest + papers.averaging())


@few
@given(seed=seeds, cut=cuts, count=steps)
def test_groups_share_band_and_server(seed, cut, count):
    """GSFL: groups in parallel, each with 1/M of the band and C_s/M of the server."""
    profile, fleet, state, papers = scene(seed, 3, n_devices=6, discipline="partition")
    route = Route.two_tier(N_BLOCKS, cut)
    members = ((0, 1), (2, 3), (4, 5))
    plan = RoundPlan(
        tuple(Branch(tuple(turn(n, route, count) for n in group)) for group in members)
    )
    speed = papers.server_speed() / 3
    slowest = max(sum(papers.two_tier(n, cut, count, speed) for n in g) for g in members)
    assert delay(plan, profile, fleet, state) == close(slowest + papers.averaging())


@few
@given(seed=seeds, both=st.tuples(cuts, cuts), count=steps)
def test_three_tiers_follow_splitllm(seed, both, count):
    profile, fleet, state, papers = scene(seed, 2, edges=2, discipline="unlimited")
    first, last = sorted(both)
    route = Route.three_tier(N_BLOCKS, first, last)
    plan = RoundPlan(tuple(Branch((turn(n, route, count, edge=n),)) for n in range(2)))
    slowest = max(papers.three_tier(n, n, first, last, count) for n in range(2))
    assert delay(plan, profile, fleet, state) == close(slowest + papers.averaging())


@few
@given(
    seed=seeds,
    both=st.tuples(cuts, cuts),
    count=steps,
    times=st.integers(1, 3),
    users=st.permutations(range(5)),
    split=st.integers(1, 4),
)
def test_edge_rounds_cross_the_backhaul_once_each_way(seed, both, count, times, users, split):
    """The users of an edge train side by side; nothing but boundaries leaves it in between."""
    profile, fleet, state, _ = scene(seed, 2, edges=2, discipline="unlimited")
    groups = users[:split], users[split:]
    there = state.over([int(n in groups[1]) for n in range(5)])
    papers = Papers(profile, fleet, there, n_branches=2, n_sharing=5)
    first, last = sorted(both)
    route = Route.three_tier(N_BLOCKS, first, last)
    plan = RoundPlan.hierarchical(
        [[turn(n, route, count, edge=k) for n in group] for k, group in enumerate(groups)], times
    )
    cost = timeline(plan, profile, fleet, state, BATCH).cost
    slowest = max(
        papers.edge_rounds(group, k, first, last, count, times) for k, group in enumerate(groups)
    )
    assert cost.delay_s == close(slowest + papers.averaging())
    kept, own = papers.adapters(0, last + 1) / 8, papers.adapters(0, first + 1) / 8
    for k, group in enumerate(groups):
        boundaries = 2 * papers.boundary(last) / 8 * count * times * len(group)
        assert cost.backhaul_bytes[k] == close(boundaries + 2 * kept)
        for n in group:
            radio = times * (count * papers.boundary(first) / 8 + own)
            assert cost.uplink_bytes[n] == cost.downlink_bytes[n] == close(radio)


def test_the_edges_pay_for_averaging():
    """Their processors average what they keep, the cloud's the rest."""
    profile, fleet, state, _ = scene(4, 1, edges=2, discipline="unlimited")
    papers = Papers(profile, fleet, state, n_branches=1, n_sharing=5)
    route = Route.three_tier(N_BLOCKS, 1, 3)
    flat = RoundPlan.parallel(turn(n, route, 2, edge=0) for n in range(5))
    joint = RoundPlan.hierarchical([[turn(n, route, 2, edge=0) for n in range(5)]], 1)
    before, after = (timeline(plan, profile, fleet, state, BATCH).cost for plan in (flat, joint))
    extra = after.server_compute_s - before.server_compute_s
    assert extra[1] == pytest.approx(papers.mean_of(5, 0, 4, 1))
    assert extra[0] == pytest.approx(papers.mean_of(5, 4, None, 0) - papers.mean_of(5, 0, None, 0))
    assert np.all(after.server_compute_j[:2] > 0)
    assert after.backhaul_bytes[0] < before.backhaul_bytes[0]


@few
@given(seed=seeds, cut=cuts, count=steps, width=st.integers(1, 5))
def test_waves_follow_each_other(seed, cut, count, width):
    """Without an edge the server averages, and adapters travel in every wave."""
    profile, fleet, state, _ = scene(seed, 1, discipline="unlimited")
    papers = Papers(profile, fleet, state, n_branches=1, n_sharing=width)
    route = Route.two_tier(N_BLOCKS, cut)
    plan = RoundPlan((Branch(tuple(turn(n, route, count) for n in range(5)), width),))
    speed = papers.server_speed()
    waves = [range(start, min(start + width, 5)) for start in range(0, 5, width)]
    expected = sum(
        max(papers.two_tier(n, cut, count, speed) for n in wave)
        + papers.mean_of(len(wave), 0, None, 0)
        for wave in waves
    )
    assert delay(plan, profile, fleet, state) == close(expected)


@few
@given(seed=seeds, both=st.tuples(cuts, cuts), count=steps)
def test_u_shape_crosses_the_radio_twice_each_way(seed, both, count):
    profile, fleet, state, papers = scene(seed, 1)
    first, last = sorted(both)
    plan = RoundPlan((Branch((turn(3, Route.u_shaped(N_BLOCKS, first, last), count),)),))
    assert delay(plan, profile, fleet, state) == close(papers.u_shaped(3, first, last, count))


@few
@given(seed=seeds, count=steps)
def test_device_only_is_federated_learning(seed, count):
    profile, fleet, state, papers = scene(seed, 5)
    route = Route.device_only(N_BLOCKS)
    plan = RoundPlan(tuple(Branch((turn(n, route, count),)) for n in range(5)))
    slowest = max(papers.whole_model(n, count) for n in range(5))
    assert delay(plan, profile, fleet, state) == close(slowest + papers.averaging())


@few
@given(seed=seeds, cut=cuts, fraction=st.floats(0.1, 1))
def test_server_clock_trades_delay_for_energy_as_in_card(seed, cut, fraction):
    profile, fleet, state, papers = scene(seed, 1)
    clock = fraction * fleet.servers.clock_hz[0]
    plan = RoundPlan((Branch((turn(0, Route.two_tier(N_BLOCKS, cut), 3, server_hz=clock),)),))
    cost = timeline(plan, profile, fleet, state, BATCH).cost
    speed = papers.server_speed() * fraction
    assert cost.delay_s == close(papers.two_tier(0, cut, 3, speed))
    work = papers.flops("forward", cut + 1, None) + papers.flops("backward", cut + 1, None)
    cycles = 3 * work / fleet.servers.flops_per_cycle[0]
    xi = fleet.servers.energy_coefficient[0]
    assert cost.server_compute_j[0] == close(xi * clock**2 * cycles)


@few
@given(seed=seeds, clock=st.floats(0.1, 1), power=st.floats(0.01, 1))
def test_a_device_s_clock_and_power_trade_delay_for_energy(seed, clock, power):
    profile, fleet, state, _ = scene(seed, 1)
    plain = turn(0, Route.two_tier(N_BLOCKS, 2), 3)
    slower = replace(
        plain,
        device_hz=clock * fleet.devices.clock_hz[0],
        uplink_w=power * state.power_up_w[0],
    )
    fast, slow = (
        timeline(RoundPlan((Branch((one,)),)), profile, fleet, state, BATCH).cost
        for one in (plain, slower)
    )
    assert slow.device_compute_s == close(fast.device_compute_s / clock)
    assert slow.device_compute_j == close(fast.device_compute_j * clock**2)
    weaker = replace(state, power_up_w=power * state.power_up_w)
    same = timeline(RoundPlan((Branch((plain,)),)), profile, fleet, weaker, BATCH).cost
    assert slow.uplink_s == close(same.uplink_s)
    assert slow.device_transmit_j == close(same.device_transmit_j)
    assert slow.downlink_s == close(fast.downlink_s)


@settings(max_examples=120, deadline=None)
@given(scenario=rounds())
def test_time_energy_and_bytes_are_conserved(scenario):
    line = timeline(*scenario, BATCH)
    cost = line.cost
    for detail in (False, True):
        activities = line.activities(detail)

        def total(field, kinds, activities=activities):
            return sum(getattr(a, field) for a in activities if a.kind in kinds)

        assert not detail or len(activities) == line.n_activities
        moved = cost.uplink_bytes.sum() + cost.downlink_bytes.sum() + cost.backhaul_bytes.sum()
        links = ("uplink", "downlink", "backhaul")
        assert total("sent_bytes", links) == pytest.approx(moved, rel=1e-9, abs=1e-9)
        everything = (*links, "compute", "aggregate")
        assert total("energy_j", everything) == pytest.approx(cost.energy_j, rel=1e-9, abs=1e-12)
        busy = cost.device_compute_s.sum() + cost.server_compute_s.sum()
        assert total("busy_s", ("compute", "aggregate")) == close(busy)
        assert max(a.end_s for a in activities) == close(cost.delay_s)
        assert min(a.start_s for a in activities) >= -1e-12
        assert all(a.end_s >= a.start_s - 1e-9 for a in activities)


@settings(max_examples=120, deadline=None)
@given(scenario=rounds(), n_states=st.integers(1, 3))
def test_summed_up_is_what_the_details_add_up_to(scenario, n_states):
    """From the first to the last of each turn, entity and kind."""
    plan, profile, fleet, state = scenario
    states = [state, *(random_state(9, fleet, round_) for round_ in range(1, n_states))]
    line = timeline(plan, profile, fleet, states, BATCH)
    expected = {}
    for a in line.activities(detail=True):
        if a.kind != "aggregate" and a.turn >= 0:
            expected.setdefault((a.branch, a.turn, a.entity, a.kind), []).append(a)
    found = [a for a in line.activities() if a.kind != "aggregate" and a.turn >= 0]
    assert [(a.branch, a.turn, a.entity, a.kind) for a in found] == list(expected)
    for a, each in zip(found, expected.values(), strict=True):
        assert a.start_s == pytest.approx(min(one.start_s for one in each), abs=1e-9)
        assert a.end_s == pytest.approx(max(one.end_s for one in each), abs=1e-9)
        assert a.label == ", ".join(dict.fromkeys(one.label for one in each))
        for name in ("busy_s", "sent_bytes", "energy_j"):
            assert getattr(a, name) == pytest.approx(sum(getattr(one, name) for one in each))


@settings(max_examples=80, deadline=None)
@given(scenario=rounds())
def test_activities_of_a_turn_follow_each_other(scenario):
    plan, *_ = scenario
    line = timeline(*scenario, BATCH)
    chains = {}
    for activity in line.activities(detail=True):
        if activity.turn >= 0:
            chains.setdefault((activity.branch, activity.member), []).append(activity)
    assert len(chains) == sum(branch.width for branch in plan.branches)
    for chain in chains.values():
        for before, after in pairwise(chain):
            assert (before.turn, before.step) <= (after.turn, after.step) or after.step == -1
            assert after.start_s >= before.end_s - 1e-9


@settings(max_examples=80, deadline=None)
@given(scenario=rounds())
def test_a_wave_starts_together_when_the_one_before_is_over(scenario):
    plan, *_ = scenario
    line = timeline(*scenario, BATCH)
    first = 0
    for branch in plan.branches:
        done = 0.0
        for wave in branch.waves:
            which = slice(first, first + len(wave))
            assert np.ptp(line.turn_start_s[which]) == pytest.approx(0, abs=1e-12)
            assert line.turn_start_s[first] >= done - 1e-12
            done, first = line.turn_end_s[which].max(), first + len(wave)


@settings(max_examples=80, deadline=None)
@given(scenario=rounds(disciplines=("fifo",)))
def test_a_queueing_server_does_one_thing_at_a_time(scenario):
    line = timeline(*scenario, BATCH)
    served = {}
    for a in line.activities(detail=True):
        if a.kind == "compute" and not a.entity.startswith("device"):
            served.setdefault(a.entity, []).append((a.start_s, a.end_s))
    for spans in served.values():
        spans.sort()
        assert all(b[0] >= a[1] - 1e-9 for a, b in pairwise(spans))


@settings(max_examples=60, deadline=None)
@given(scenario=rounds())
def test_a_private_server_for_each_branch_is_never_slower(scenario):
    plan, profile, fleet, state = scenario
    private = replace(fleet, serving=replace(fleet.serving, discipline="unlimited"))
    alone = timeline(plan, profile, private, state, BATCH).cost
    shared = timeline(plan, profile, fleet, state, BATCH).cost
    assert alone.delay_s <= shared.delay_s + 1e-9
    assert alone.energy_j == close(shared.energy_j)
    assert alone.waiting_s == pytest.approx(0, abs=1e-9)
    assert shared.waiting_s >= -1e-9


@few
@given(seed=seeds, count=st.integers(1, 4))
def test_steps_can_see_their_own_channel_state(seed, count):
    """With one state per step, a turn takes what each step takes in its state."""
    profile, fleet, _, papers = scene(seed, 1)
    states = [random_state(seed, fleet, round_) for round_ in range(count)]
    plan = RoundPlan((Branch((turn(0, Route.two_tier(N_BLOCKS, 2), count),)),))
    found = timeline(plan, profile, fleet, states, BATCH).cost.delay_s
    per_state = [Papers(profile, fleet, s, 1) for s in states]
    speed, expected = papers.server_speed(), 0.0
    for one in per_state:
        adapters = one.adapters(0, 3)
        expected += one.two_tier(0, 2, 1, speed) - adapters * (1 / one.up(0) + 1 / one.down(0))
    expected += papers.adapters(0, 3) * (1 / per_state[0].down(0) + 1 / per_state[-1].up(0))
    assert found == close(expected)


@few
@given(seed=seeds, up=st.floats(0.01, 1), down=st.floats(0.01, 1))
def test_codecs_shrink_boundaries_but_not_adapters(seed, up, down):
    profile, fleet, state, papers = scene(seed, 1)
    codec = CodecPlan({"name": "a"}, {"name": "b"})
    plan = RoundPlan((Branch((turn(0, Route.two_tier(N_BLOCKS, 2), 4, codec=codec),)),))
    ratios = {"a": up, "b": down}
    line = timeline(plan, profile, fleet, state, BATCH, codec_ratio=lambda s: ratios[s["name"]])
    raw, adapters = 4 * papers.boundary(2) / 8, papers.adapters(0, 3) / 8
    assert line.cost.uplink_bytes[0] == close(up * raw + adapters)
    assert line.cost.downlink_bytes[0] == close(down * raw + adapters)


def test_no_gradient_returns_to_a_device_that_trains_nothing():
    profile, fleet, state, _ = scene(3, 1)
    frozen = replace(profile, embed=replace(profile.embed, adapter_bytes=0.0))
    for cut, returns in ((0, False), (1, True)):
        plan = RoundPlan((Branch((turn(0, Route.two_tier(N_BLOCKS, cut), 4),)),))
        cost = timeline(plan, frozen, fleet, state, BATCH).cost
        assert cost.uplink_bytes[0] > 0
        assert (cost.downlink_bytes[0] > 0) == returns


def test_bytes_of_a_real_run_replace_the_estimate():
    profile, fleet, state, papers = scene(3, 2)
    route = Route.two_tier(N_BLOCKS, 2)
    plan = RoundPlan((Branch((turn(0, route, 4),)), Branch((turn(1, route, 4),))))
    line = timeline(plan, profile, fleet, state, BATCH, sent={(1, 0, 0): (1000.0, 2000.0)})
    adapters, raw = papers.adapters(0, 3) / 8, 4 * papers.boundary(2) / 8
    assert line.cost.uplink_bytes[:2] == pytest.approx([raw + adapters, 1000 + adapters])
    assert line.cost.downlink_bytes[:2] == pytest.approx([raw + adapters, 2000 + adapters])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": 5}, "turn.device=5: must be from 0 to 4"),
        ({"edge": 1}, "turn.edge=1: must be from 0 to 0"),
        ({"steps": -1}, "turn.steps=-1: must be at least 0"),
        ({"uplink_hz": 0.0}, "turn.uplink_hz=0.0: must be above 0"),
        ({"uplink_hz": 1e9}, "sum of turn.uplink_hz=1000000000.0: must be at most 2e\\+07"),
        ({"server_hz": 1e12}, "turn.server_hz=1000000000000.0: must be above 0 and at most"),
        ({"server_hz": float("nan")}, "turn.server_hz=nan"),
        ({"device_hz": 1e12}, "turn.device_hz=1000000000000.0: must be above 0 and at most"),
        ({"uplink_w": 0.0}, "turn.uplink_w=0.0: must be above 0"),
        ({"route": Route.two_tier(3, 1)}, "route=.*must be of 5 blocks"),
        ({"route": Route.three_tier(5, 1, 2)}, "fleet.edges=0: must be at least 1"),
    ],
)
def test_plans_that_do_not_fit_are_refused(change, named):
    profile, fleet, state, _ = scene(0, 1)
    good = turn(0, Route.two_tier(N_BLOCKS, 2), 1)
    with pytest.raises(FedsplitError, match=named):
        timeline(RoundPlan((Branch((replace(good, **change),)),)), profile, fleet, state, BATCH)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_a_turn_takes_the_link_to_the_edge_that_it_names(seed, edges):
    """As in a fleet whose devices belong to those edges; without shadowing and fading."""
    fleet, profile = random_fleet(seed, 5, edges=3), random_profile(seed)
    moved = replace(fleet, home=np.array(edges))
    spec = ChannelSpec(shadowing_db=0.0, fading=FadingSpec(kind="none"))

    def state(of):
        places = of.devices.positions_m
        return Channel(spec, places, of.stations_m, seed, of.home).realise(1)

    route = Route.three_tier(N_BLOCKS, 1, 3)
    named = RoundPlan.parallel(Turn(n, route, 2, edge=edge) for n, edge in enumerate(edges))
    own = RoundPlan.parallel(Turn(n, route, 2) for n in range(5))
    found = timeline(named, profile, fleet, state(fleet), 4).cost
    expected = timeline(own, profile, moved, state(moved), 4).cost
    assert found.delay_s == close(expected.delay_s)
    assert found.uplink_s == close(expected.uplink_s)
    assert found.backhaul_bytes == close(expected.backhaul_bytes)


def test_a_device_out_of_coverage_is_named():
    profile, fleet, state, _ = scene(0, 1)
    faint = replace(state, rate="cqi_64qam", gain_up=state.gain_up * 1e-12)
    plan = RoundPlan((Branch((turn(2, Route.two_tier(N_BLOCKS, 2), 1),)),))
    with pytest.raises(FedsplitError, match=r"device=2: uplink rate=0.0 bit/s"):
        timeline(plan, profile, fleet, faint, BATCH)


def test_fleet_and_channel_must_be_of_one_size():
    profile, fleet, _, _ = scene(0, 1)
    other = random_state(0, random_fleet(0, 3))
    plan = RoundPlan((Branch((turn(0, Route.two_tier(N_BLOCKS, 2), 1),)),))
    with pytest.raises(FedsplitError, match="channel devices=3: must be 5"):
        timeline(plan, profile, fleet, other, BATCH)


def test_a_device_that_only_infers_sends_a_sample_once() -> None:
    """First epoch: all boundaries up, bare replies, no backward pass; later: none of either."""
    scene = make_scene(1)
    cut = Route.two_tier(scene.n_blocks, 2)
    turn = replace(scene.turn(0, cut), steps=4)

    def cost(**changes: object) -> RoundCost:
        return scene.timeline(RoundPlan.parallel([replace(turn, **changes)])).cost

    trained = cost()
    first, later = cost(frozen=True), cost(frozen=True, fresh=0.0)
    boundary = 4 * scene.work.batch_size * scene.profile.blocks[1].boundary_bytes
    adapters = scene.profile.segments(cut)[0].adapter_bytes
    assert trained.uplink_bytes[0] - first.uplink_bytes[0] == pytest.approx(adapters)
    assert first.uplink_bytes[0] - later.uplink_bytes[0] == pytest.approx(boundary)
    assert later.uplink_bytes[0] == pytest.approx(0)
    assert trained.downlink_bytes[0] - first.downlink_bytes[0] == pytest.approx(boundary)
    forward, backward = (
        getattr(scene.profile.segments(cut)[0], name)
        for name in ("forward_flops", "backward_flops")
    )
    share = forward / (forward + backward)
    assert first.device_compute_s[0] == pytest.approx(share * trained.device_compute_s[0])
    assert later.device_compute_s[0] == 0
    assert first.device_memory_bytes[0] < trained.device_memory_bytes[0]


def test_a_lower_rank_has_less_to_carry_and_to_keep() -> None:
    scene = make_scene(1)
    scene = replace(scene, profile=replace(scene.profile, rank=8))
    turn = scene.turn(0, Route.two_tier(scene.n_blocks, 2))
    whole, part = (
        scene.timeline(RoundPlan.parallel([replace(turn, rank=rank)])).cost for rank in (None, 2)
    )
    adapters = scene.profile.segments(turn.route)[0].adapter_bytes
    for name in ("uplink_bytes", "downlink_bytes"):
        less = getattr(whole, name)[0] - getattr(part, name)[0]
        assert less == pytest.approx(0.75 * adapters)
    assert part.device_memory_bytes[0] < whole.device_memory_bytes[0]
    assert part.server_memory_bytes[0] < whole.server_memory_bytes[0]
