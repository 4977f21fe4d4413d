"""A scan of a chain finds the cuts that the minimum cut does."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.layergraph import LayerGraph
from fedsplit.planning import (
    CutCosts,
    CutLimits,
    CutSolver,
    CutSystem,
    Devices,
    InfeasibleError,
    fastest_cuts,
)
from fedsplit.profiles import ModelProfile, UnitProfile
from fedsplit.seeds import generator

BATCH, STEPS, N_BLOCKS = 4, 3, 6


def profile(seed: int) -> ModelProfile:
    """Return blocks of random cost; in every other model the embeddings are trained too."""
    rng = generator(seed, "scan")

    def unit(trained: bool) -> UnitProfile:
        adapter = float(rng.uniform(1e4, 1e7)) if trained else 0.0
        return UnitProfile(
            forward_flops=float(rng.uniform(1e8, 1e10)),
            backward_flops=float(rng.uniform(1e8, 1e10)),
            parameter_bytes=adapter + float(rng.uniform(1e6, 1e8)),
            adapter_bytes=adapter,
            optimizer_bytes=2 * adapter,
            activation_bytes=float(rng.uniform(1e5, 1e7)),
            boundary_bytes=float(rng.uniform(1e4, 1e6)),
            workspace_bytes=float(rng.uniform(1e5, 1e7)),
        )

    embed = unit(seed % 2 == 0)
    return ModelProfile("random", 8, embed, tuple(unit(True) for _ in range(N_BLOCKS)), unit(False))


def by_minimum_cut(
    model: ModelProfile, system: CutSystem, memory_bytes: float, floor: int, cuts: list[int]
) -> int:
    """Solve the graph: a server without a block cannot close a route, and some cuts are barred."""
    chain = LayerGraph.from_profile(model)
    pairs = [(chain.n - 2, chain.n - 1)]
    pairs += [(1 + cut, 2 + cut) for cut in range(N_BLOCKS) if cut not in cuts]
    solver = CutSolver(replace(chain, requires=np.array(pairs)))
    return solver.solve(system, CutLimits(memory_bytes, floor, on_device=(1,))).n_blocks


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    floor=st.integers(0, N_BLOCKS),
    cuts=st.lists(st.integers(0, N_BLOCKS - 1), unique=True),
    share=st.one_of(st.just(np.inf), st.floats(0.2, 1.2)),
)
def test_cuts_are_those_of_the_minimum_cut(
    seed: int, floor: int, cuts: list[int], share: float
) -> None:
    model, rng = profile(seed), generator(seed, "system")
    n_devices = 5
    device, up, down = (10 ** rng.uniform(*of, n_devices) for of in ((10, 13), (5, 9), (5, 9)))
    ratio = float(rng.uniform(0.1, 1))
    costs = CutCosts.from_profile(model, BATCH, device_only=True)
    memory = share * float(costs.memory_bytes[-1]) * rng.uniform(0.8, 1.2, n_devices)
    members = Devices(device, memory, STEPS)
    possible = costs.only([*cuts, N_BLOCKS]).compressed(ratio)

    def scan() -> list[int]:
        return fastest_cuts(possible, members, up, down, 2e13, min_cut=floor).tolist()

    def solve() -> list[int]:
        return [
            by_minimum_cut(
                model,
                CutSystem(
                    device_flops_per_s=float(of[0]),
                    server_flops_per_s=2e13,
                    uplink_bps=float(of[1]),
                    downlink_bps=float(of[2]),
                    steps=STEPS,
                    batch=BATCH,
                    uplink_ratio=ratio,
                ),
                float(of[3]),
                floor,
                cuts,
            )
            for of in zip(device, up, down, memory, strict=True)
        ]

    try:
        expected = solve()
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            scan()
        return
    assert scan() == expected
