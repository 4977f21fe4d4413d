"""Random fleets, models and channels for the tests of planners."""

import numpy as np
import pytest
from hypothesis import strategies as st

from fedsplit.planning.bandwidth import equal_shares
from fedsplit.planning.codec_table import CodecTable
from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.pools import LinearPool, Pool, ShannonPool
from fedsplit.planning.sft import SftProblem


@st.composite
def shared_pools(draw: st.DrawFn) -> tuple[list[Pool], np.ndarray]:
    """Return one to three pools over many orders of magnitude, and fixed delays."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_users = draw(st.sampled_from([1, 2, 3, 10, 60]))
    idle = draw(st.sampled_from([0.0, 0.3]))
    pools: list[Pool] = []
    for kind in draw(st.lists(st.sampled_from(["band", "server"]), min_size=1, max_size=3)):
        used = rng.random(n_users) >= idle
        if kind == "band":
            bits = used * 10 ** rng.uniform(1, 9) * 10 ** rng.uniform(-2, 2, n_users)
            pools.append(
                ShannonPool(bits, 10 ** rng.uniform(3, 11, n_users), 10 ** rng.uniform(4, 9))
            )
        else:
            work = used * 10 ** rng.uniform(6, 13, n_users)
            pools.append(LinearPool(work, 10 ** rng.uniform(9, 14)))
    return pools, rng.random(n_users) * 10 ** rng.uniform(-6, 6)


def mobile_band(n_users: int, seed: int) -> tuple[ShannonPool, np.ndarray]:
    """Return a 20 MHz band with users of 0.5 to 2 Mbit and very different channels."""
    rng = np.random.default_rng(seed)
    bits = rng.uniform(0.5, 2.0, n_users) * 1e6
    return ShannonPool(bits, 10 ** rng.uniform(5, 8, n_users), 20e6), rng.uniform(0, 2, n_users)


def codec_table(n_settings: int) -> CodecTable:
    """Return settings whose loss falls exponentially with the ratio."""
    ratio = np.geomspace(0.03, 0.6, n_settings)
    return CodecTable(
        ratio,
        0.4 * np.exp(-8 * ratio),
        tuple({"name": "topk", "index": index} for index in range(n_settings)),
    )


def sft_problem(
    n_devices: int,
    seed: int,
    *,
    n_blocks: int = 12,
    n_settings: int = 8,
    equal_blocks: bool = True,
    max_loss_increase: float = 0.1,
) -> SftProblem:
    """Return a fleet at 50 to 250 m that fine-tunes a model of the size of ViT-B/16."""
    rng = np.random.default_rng(seed)
    blocks = np.ones(n_blocks) if equal_blocks else rng.uniform(0.5, 2.0, n_blocks)
    flops = 3 * 2.91e9 * 64 * np.concatenate([[0.1], blocks])
    boundary = np.full(n_blocks + 1, 38.7e6 * 8)
    if not equal_blocks:
        boundary *= rng.uniform(0.5, 1.5, n_blocks + 1)
    costs = CutCosts(
        device_flops=np.cumsum(flops),
        server_flops=1.01 * flops.sum() - np.cumsum(flops),
        uplink_bits=boundary,
        downlink_bits=boundary,
        adapter_bits=np.arange(n_blocks + 1) * 196.6e3 * 32,
        memory_bytes=1e8 + np.arange(n_blocks + 1) * 4e8,
    )
    distance_km = rng.uniform(0.05, 0.25, n_devices)
    gain = 10 ** (-(128.1 + 37.6 * np.log10(distance_km)) / 10)
    return SftProblem(
        costs=costs,
        devices=Devices(
            rng.uniform(0.5, 2.0, n_devices) * 1e12, rng.uniform(3, 8, n_devices) * 1e9, 10
        ),
        table=codec_table(n_settings),
        max_loss_increase=max_loss_increase,
        uplink_snr_hz=gain * 0.2 / 10**-20.4,
        downlink_efficiency=np.log2(1 + rng.uniform(1, 100, n_devices)),
        uplink_hz=20e6,
        downlink_hz=20e6,
        server_flops_per_s=20e12 / n_devices,
        data_weights=rng.integers(50, 500, n_devices),
        compress_gradients=bool(seed % 2),
    )


def conic_longest_s(pools: list[ShannonPool], fixed_s: np.ndarray) -> float:
    """Return the least longest delay over bands by Clarabel, in units of equal shares."""
    cvxpy = pytest.importorskip("cvxpy")
    n_users, unit_s = len(fixed_s), equal_shares(pools, fixed_s).objective_s
    longest, limits, spent = cvxpy.Variable(), [], fixed_s / unit_s
    for pool in pools:
        time_s = cvxpy.Variable(n_users)
        limits += in_time(pool, time_s, unit_s)
        spent = spent + time_s
    problem = cvxpy.Problem(cvxpy.Minimize(longest), [*limits, spent <= longest])
    problem.solve(solver="CLARABEL", tol_gap_rel=1e-10, tol_gap_abs=1e-10, tol_feas=1e-10)
    return float(longest.value) * unit_s


def in_time(pool: ShannonPool, time_s, unit_s: float) -> list:
    """Return conic constraints: the band sends each user's bits within ``time_s unit_s``."""
    cvxpy = pytest.importorskip("cvxpy")
    n_users = len(pool.bits)
    even_hz, share = pool.budget / n_users, cvxpy.Variable(n_users)
    rate = -cvxpy.rel_entr(share, share + pool.snr_hz / even_hz) / np.log(2)
    bits = pool.bits / (even_hz * unit_s)
    return [cvxpy.multiply(bits, cvxpy.inv_pos(time_s)) <= rate, cvxpy.sum(share) <= n_users]
