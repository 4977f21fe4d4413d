"""Cuts of layer graphs: the best of all possible ones, within limits, or a clear error."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.layergraph import LayerGraph
from fedsplit.planning import CutLimits, CutResult, CutSolver, CutSystem, InfeasibleError
from fedsplit.planning.cut_cost import cut_cost
from fedsplit.profiles import ModelProfile, UnitProfile

EXACT = 2e-6  # integer capacities round the costs of at most a dozen edges


def random_graph(rng: np.random.Generator, n: int) -> LayerGraph:
    """Return a graph whose last vertex is reached by all, with one or two inputs."""
    n_inputs = int(rng.integers(1, 3))
    pairs = {
        (u, v)
        for v in range(n_inputs, n)
        for u in rng.choice(v, size=min(v, int(rng.integers(1, 4))), replace=False)
    }
    with_child = {u for u, _ in pairs}
    pairs |= {(u, n - 1) for u in range(n - 1) if u not in with_child}
    requires = np.zeros((0, 2), dtype=np.int64)
    if rng.random() < 0.3 and n - n_inputs > 2:
        first, second = sorted(rng.choice(np.arange(n_inputs, n), size=2, replace=False))
        requires = np.array([(first, second), (second, first)])[rng.integers(0, 2) :]
    cost = rng.integers(0, 1000, size=(7, n)).astype(float)
    cost[:, rng.random(n) < 0.2] = 0
    cost[[0, 1, 2, 3], :n_inputs] = 0
    return LayerGraph(
        name="random",
        labels=tuple(f"v{i}" for i in range(n)),
        edges=np.array(sorted(pairs)),
        n_inputs=n_inputs,
        forward_flops=cost[0],
        backward_flops=cost[1],
        parameter_bytes=cost[2] + cost[3],
        adapter_bytes=cost[3] * (rng.random() < 0.5),
        activation_bytes=cost[4],
        output_bytes=cost[5] * 10.0 ** rng.integers(-2, 2),
        gradient_bytes=cost[6] * (rng.random(n) < 0.7),
        block=np.sort(rng.integers(-1, 4, size=n)),
        requires=requires,
    )


def random_system(rng: np.random.Generator, n: int) -> CutSystem:
    def scale() -> float:
        return float(10.0 ** rng.uniform(-1, 1))

    ratio = scale() if rng.random() < 0.7 else rng.uniform(0.05, 1, size=n)
    return CutSystem(
        device_flops_per_s=scale(),
        server_flops_per_s=scale() * float(rng.choice([1, 10])),
        uplink_bps=8 * scale(),
        downlink_bps=8 * scale(),
        steps=int(rng.integers(1, 4)),
        batch=int(rng.integers(1, 4)),
        uplink_ratio=ratio,
        downlink_ratio=scale(),
        device_watt=scale(),
        transmit_watt=scale(),
        energy_weight=float(rng.choice([0.0, 0.5])),
    )


def every_cut(graph: LayerGraph) -> np.ndarray:
    """Return every possible device part, bool [cuts, n], by trying all subsets."""
    free = graph.n - graph.n_inputs
    subsets = (np.arange(2**free)[:, None] >> np.arange(free)) & 1 == 1
    device = np.concatenate([np.ones((len(subsets), graph.n_inputs), bool), subsets], axis=1)
    possible = np.ones(len(device), bool)
    for parent, child in graph.edges:
        possible &= device[:, parent] | ~device[:, child]
    for vertex, needed in graph.requires:
        possible &= device[:, needed] | ~device[:, vertex]
    return device[possible]


def objectives(graph: LayerGraph, system: CutSystem, devices: np.ndarray) -> np.ndarray:
    """Return delay + weighted energy of each device part, term by term as the papers write it."""
    steps, batch = system.steps, system.batch
    work = (graph.forward_flops + graph.backward_flops) * batch
    device_s = steps * (devices @ work) / system.device_flops_per_s
    server_s = steps * (~devices @ work) / system.server_flops_per_s
    sent = np.zeros_like(devices)
    for parent, child in graph.edges:
        sent[:, parent] |= devices[:, parent] & ~devices[:, child]
    up = steps * batch * 8 * (sent @ (graph.output_bytes * system.uplink_ratio))
    down = steps * batch * 8 * (sent @ (graph.gradient_bytes * system.downlink_ratio))
    adapters = 8 * (devices @ graph.adapter_bytes)
    up_s, down_s = (up + adapters) / system.uplink_bps, (down + adapters) / system.downlink_bps
    energy = system.device_watt * device_s + system.transmit_watt * up_s
    return device_s + server_s + up_s + down_s + system.energy_weight * energy


def memories(graph: LayerGraph, system: CutSystem, devices: np.ndarray) -> np.ndarray:
    return devices @ (
        graph.parameter_bytes + 3 * graph.adapter_bytes + system.batch * graph.activation_bytes
    )


@pytest.mark.parametrize("part", range(10))
def test_both_methods_equal_brute_force_on_random_graphs(part: int) -> None:
    rng = np.random.default_rng(part)
    for _ in range(550):
        graph = random_graph(rng, int(rng.integers(3, 10)))
        system = random_system(rng, graph.n)
        devices = every_cut(graph)
        best = objectives(graph, system, devices).min()
        solver = CutSolver(graph)
        for method in ("general", "blockwise"):
            result = solver.solve(system, method=method)
            assert result.objective == pytest.approx(best, rel=EXACT)
            weighted = result.cost.delay_s + system.energy_weight * result.cost.device_energy_j
            assert result.objective == pytest.approx(weighted, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 4), st.sampled_from(["general", "blockwise"]))
@example(1098, 0, "blockwise")  # a vertex requires the one at which its block would end
def test_privacy_floor_keeps_the_first_blocks_on_the_device(
    seed: int, floor: int, method: str
) -> None:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, int(rng.integers(3, 10)))
    system = random_system(rng, graph.n)
    floor = min(floor, graph.n_blocks)
    devices = every_cut(graph)
    kept = devices[:, (graph.block < floor) & (floor > 0)].all(axis=1)
    limits = CutLimits(min_blocks=floor)
    result = CutSolver(graph).solve(system, limits, method)
    assert result.n_blocks >= floor
    assert result.objective == pytest.approx(
        objectives(graph, system, devices[kept]).min(), rel=EXACT
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_memory_limit_is_kept_and_the_bound_holds(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, int(rng.integers(3, 10)))
    system = random_system(rng, graph.n)
    devices = every_cut(graph)
    needed = memories(graph, system, devices)
    cap = float(needed.min() + share * (needed.max() - needed.min()))
    best = objectives(graph, system, devices[needed <= cap]).min()
    result = CutSolver(graph).solve(system, CutLimits(device_memory_bytes=cap))
    assert result.cost.device_memory_bytes <= cap * (1 + 1e-12)
    assert result.bound <= best * (1 + EXACT)
    assert result.objective >= best * (1 - EXACT)


def chain(rng: np.random.Generator, n_blocks: int) -> LayerGraph:
    def unit() -> UnitProfile:
        return UnitProfile(*(float(value) for value in rng.uniform(1, 1000, size=7)))

    blocks = tuple(unit() for _ in range(n_blocks))
    return LayerGraph.from_profile(ModelProfile("chain", 8, unit(), blocks, unit()), 50.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 10))
def test_all_three_methods_agree_on_chains(seed: int, n_blocks: int) -> None:
    rng = np.random.default_rng(seed)
    graph = chain(rng, n_blocks)
    system = random_system(rng, graph.n)
    best = objectives(graph, system, every_cut(graph)).min()
    solver = CutSolver(graph)
    for method in ("chain", "blockwise", "general", "auto"):
        assert solver.solve(system, method=method).objective == pytest.approx(best, rel=EXACT)


def test_a_tensor_with_many_readers_is_sent_once() -> None:
    zero, one = np.zeros(4), np.ones(4)
    graph = LayerGraph(
        name="fan",
        labels=("x", "a", "b", "c"),
        edges=np.array([(0, 1), (1, 2), (1, 3), (2, 3)]),
        n_inputs=1,
        forward_flops=zero,
        backward_flops=zero,
        parameter_bytes=zero,
        adapter_bytes=zero,
        activation_bytes=zero,
        output_bytes=10 * one,
        gradient_bytes=zero,
        block=np.array([-1, 0, 1, 2]),
    )
    system = CutSystem(
        device_flops_per_s=1.0, server_flops_per_s=1.0, uplink_bps=8.0, downlink_bps=8.0
    )
    assert cut_cost(graph, system, np.array([True, True, False, False])).uplink_s == 10.0


def solve(limits: CutLimits) -> CutResult:
    graph = chain(np.random.default_rng(0), 4)
    return CutSolver(graph).solve(
        CutSystem(device_flops_per_s=1.0, server_flops_per_s=1.0, uplink_bps=1.0, downlink_bps=1.0),
        limits,
    )


def test_impossible_limits_say_which_and_by_how_much() -> None:
    with pytest.raises(InfeasibleError, match=r"min_blocks of chain: .*off by 2 blocks"):
        solve(CutLimits(min_blocks=6))
    graph = chain(np.random.default_rng(0), 4)
    system = CutSystem(
        device_flops_per_s=1.0, server_flops_per_s=1.0, uplink_bps=1.0, downlink_bps=1.0
    )
    needed = memories(graph, system, (graph.block < 2)[None])[0]
    with pytest.raises(InfeasibleError, match=r"device_memory_bytes for .*, 2 blocks") as caught:
        solve(CutLimits(device_memory_bytes=100.0, min_blocks=2))
    assert caught.value.shortfall == pytest.approx(needed - 100)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0, float("inf")])
@pytest.mark.parametrize(
    "field", ["device_flops_per_s", "server_flops_per_s", "uplink_bps", "downlink_bps", "steps"]
)
def test_systems_without_sense_are_refused(field: str, bad: float) -> None:
    good = dict.fromkeys(
        ("device_flops_per_s", "server_flops_per_s", "uplink_bps", "downlink_bps"), 1.0
    )
    with pytest.raises(FedsplitError, match=field):
        CutSystem(**{**good, field: bad})


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_graphs_and_limits_without_sense_are_refused(bad: float) -> None:
    with pytest.raises(FedsplitError, match="output_bytes"):
        LayerGraph.from_profile(
            ModelProfile("m", 1, UnitProfile(), (UnitProfile(boundary_bytes=bad),), UnitProfile())
        )
    with pytest.raises(FedsplitError, match="energy_weight"):
        CutSystem(
            device_flops_per_s=1.0,
            server_flops_per_s=1.0,
            uplink_bps=1.0,
            downlink_bps=1.0,
            energy_weight=bad,
        )
    with pytest.raises(FedsplitError, match="device_memory_bytes"):
        CutLimits(device_memory_bytes=bad)


def test_ratios_must_fit_the_graph() -> None:
    graph = chain(np.random.default_rng(0), 4)
    system = CutSystem(
        device_flops_per_s=1.0,
        server_flops_per_s=1.0,
        uplink_bps=1.0,
        downlink_bps=1.0,
        uplink_ratio=np.ones(3),
    )
    with pytest.raises(FedsplitError, match="uplink_ratio"):
        CutSolver(graph).solve(system)


def test_a_cut_that_loses_a_parent_is_refused() -> None:
    graph = chain(np.random.default_rng(0), 2)
    with pytest.raises(FedsplitError, match="block 0"):
        cut_cost(
            graph,
            CutSystem(
                device_flops_per_s=1.0, server_flops_per_s=1.0, uplink_bps=1.0, downlink_bps=1.0
            ),
            np.array([True, True, False, True, False]),
        )
