"""SplitLLM: how much less memory the servers need when K branches are live instead of N."""

from collections.abc import Sequence

from fedsplit.errors import FedsplitError
from fedsplit.fleet import RoundCost

from .common import (
    Chart,
    Figure,
    Reproduction,
    change,
    paper_config,
    paper_scenario,
)

PAPER = "splitllm"
CONCURRENT, LANE = "fleet.serving.discipline=sharing", "fleet.serving.discipline=fifo"
COPIES, SHARED = (f"fleet.serving.private_backbones={choice}" for choice in ("true", "false"))


def reproduce(overrides: Sequence[str]) -> Reproduction:
    """Compare server memory with SplitFed's, whose one server holds a copy for every device.

    The same blocks are on servers in both: SplitLLM's are those of the edges and the cloud
    together. Copies are of the frozen weights, and mini-batches of live branches are concurrent,
    as the abstract describes its benchmark.
    """
    config = paper_config(PAPER, overrides)
    cuts = config.paper.device_cut, config.paper.edge_cut
    if config.fleet.edges < 1:
        raise FedsplitError(f"fleet.edges={config.fleet.edges}: must be at least 1")
    hierarchy = (
        "strategy=splitllm",
        f"strategy.device_cut={cuts[0]}",
        f"strategy.edge_cut={cuts[1]}",
    )
    flat = ("strategy=splitfed", f"strategy.cut={cuts[0]}", "fleet.edges=0")

    def cost(*changes: str) -> RoundCost:
        return paper_scenario(PAPER, overrides, *changes).timeline(1).cost

    users, at_once = config.fleet.devices, config.fleet.edges
    few = f"fleet.devices={at_once}"
    cases = {
        "SplitFed, N copies": cost(*flat, CONCURRENT, COPIES),
        "SplitLLM, K copies": cost(*hierarchy, CONCURRENT, COPIES),
        "SplitLLM, shared weights": cost(*hierarchy, CONCURRENT, SHARED),
        "SplitLLM, shared, one at a time": cost(*hierarchy, LANE, SHARED),
        "SplitFed, shared, one at a time": cost(*flat, LANE, SHARED),
        "SplitFed, K copies": cost(*flat, CONCURRENT, COPIES, few),
    }
    total = {name: float(case.server_memory_bytes.sum()) for name, case in cases.items()}
    cloud = {name: float(case.server_memory_bytes[0]) for name, case in cases.items()}
    baseline, ours, shared, lane, all_at_once, few_at_once = cases
    rounds = -(-users // at_once)
    pass_s = rounds * cases[ours].delay_s
    return Reproduction(
        PAPER,
        (
            Figure(
                name="server peak memory",
                claim="up to -74 %",
                versus="SplitFed + LoRA with N concurrent copies",
                ours=change(total[ours], total[baseline]),
                strongest=f"SplitFed that serves K = {at_once} users at a time too",
                against_strongest=change(total[ours], total[few_at_once]),
                gain=f"1 - K / N = {1 - at_once / users:.0%}: fewer users at a time, not tiers",
                accepted=(-76.0, -72.0),
                ours_better=change(total[all_at_once], total[baseline]),
                better="all N users on one server: shared weights, one mini-batch at a time",
            ),
            Figure(
                name="the same, frozen weights shared",
                claim="up to -74 %",
                versus="SplitFed + LoRA with N concurrent copies",
                ours=change(total[shared], total[baseline]),
                strongest="SplitFed, N users, weights shared, one mini-batch at a time",
                against_strongest=change(total[shared], total[all_at_once]),
                gain="shared weights; a server that takes one mini-batch at a time needs less",
                accepted=(-76.0, -72.0),
                ours_better=change(total[lane], total[baseline]),
                better="one mini-batch at a time on every server",
            ),
            Figure(
                name="the cloud alone",
                claim="none",
                versus="the one server of SplitFed + LoRA, N copies",
                ours=change(cloud[ours], cloud[baseline]),
                strongest="SplitFed, N users, weights shared, one mini-batch at a time",
                against_strongest=change(cloud[ours], cloud[all_at_once]),
                gain="1 - K / N, and blocks that are on the edges in place of the cloud",
                ours_better=change(cloud[lane], cloud[baseline]),
                better="shared weights, one mini-batch at a time",
            ),
        ),
        (
            Chart(
                "Memory of all servers",
                "",
                "peak, GB",
                tuple(cases),
                {
                    "edges": [(total[name] - cloud[name]) / 1e9 for name in cases],
                    "cloud or server": [cloud[name] / 1e9 for name in cases],
                },
                stacked=True,
            ),
        ),
        (
            f"A pass over all {users} users takes {rounds} rounds, {pass_s:.0f} s in all; SplitFed "
            f"takes {cases[baseline].delay_s:.0f} s (first seed). Memory does not depend on the "
            "seed.",
        ),
        config.paper.provenance,
    )
