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

    cases = {
        "SplitFed, N copies": cost(*flat, CONCURRENT, COPIES),
        "SplitLLM, K copies": cost(*hierarchy, CONCURRENT, COPIES),
        "SplitLLM, shared weights": cost(*hierarchy, CONCURRENT, SHARED),
        "SplitLLM, shared, one at a time": cost(*hierarchy, LANE, SHARED),
        "SplitFed, shared, one at a time": cost(*flat, LANE, SHARED),
    }
    total = {name: float(case.server_memory_bytes.sum()) for name, case in cases.items()}
    cloud = {name: float(case.server_memory_bytes[0]) for name, case in cases.items()}
    baseline, ours, shared, lane, all_at_once = cases
    rounds = -(-config.fleet.devices // config.fleet.edges)
    pass_s = rounds * cases[ours].delay_s
    return Reproduction(
        PAPER,
        (
            Figure(
                "server peak memory",
                "up to -74 %",
                "SplitFed + LoRA with N concurrent copies",
                change(total[ours], total[baseline]),
                (-76.0, -72.0),
                change(total[all_at_once], total[baseline]),
                "all N users at once on one server: shared weights, one mini-batch at a time",
            ),
            Figure(
                "the same, frozen weights shared",
                "up to -74 %",
                "SplitFed + LoRA with N concurrent copies",
                change(total[shared], total[baseline]),
                (-76.0, -72.0),
                change(total[lane], total[baseline]),
                "one mini-batch at a time on every server",
            ),
            Figure(
                "the cloud alone",
                "none",
                "the one server of SplitFed + LoRA, N copies",
                change(cloud[ours], cloud[baseline]),
                None,
                change(cloud[lane], cloud[baseline]),
                "shared weights, one mini-batch at a time",
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
            f"What it costs: a pass over all {config.fleet.devices} users takes {rounds} rounds, "
            f"{pass_s:.0f} s in all; SplitFed takes {cases[baseline].delay_s:.0f} s.",
        ),
        config.paper.provenance,
    )
