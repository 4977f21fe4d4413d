"""SplitLLM: how much less memory the servers need when K branches are live instead of N."""

from fedsplit.errors import require

from .study import Case


def add(case: Case) -> dict[str, object]:
    """Cost all members; say how long a pass over all users takes."""
    fleet = case.config.fleet
    require(fleet.edges >= 1, "fleet.edges", fleet.edges, "at least 1")
    case.cost()
    delay, rounds = case.values["delay_s"], -(-fleet.devices // fleet.edges)
    return {
        "saved": 1 - fleet.edges / fleet.devices,
        "rounds": rounds,
        "pass_s": rounds * delay["SplitLLM, K copies"].item(),
        "splitfed_s": delay["SplitFed, N copies"].item(),
    }
