"""How many components averaging leaves beside adapters as residuals (`fedsplit.models.ranks`)."""

from collections.abc import Mapping, Sequence

from fedsplit.errors import require

FEDEX, STACKING = "fedex", "stacking"
LEAVE_RESIDUALS = (FEDEX, STACKING)
"""The ways of making one adapter of several that leave any."""


def growth(how: str, ranks: Sequence[int], whole: int) -> int:
    """Return by how many components a residual grows where adapters of `ranks` become one.

    Parameters
    ----------
    how : str
        The way (`fedsplit.execution.aggregate`).
    ranks : sequence of int
        Components that each of them has trained.
    whole : int
        Components that all have; those that nobody trained count to each.
    """
    idle = whole - max(ranks)
    own = [rank + idle for rank in ranks]
    # What differs from a mean adds up to zero: of components that all have, one part's follow.
    return {STACKING: sum(own), FEDEX: sum(own) - min(own)}.get(how, 0)


def require_room(how: str, *, train: str, lora: Mapping[str, object], edge_nodes: bool) -> None:
    """Refuse a way that leaves residuals where nothing holds them.

    Parameters
    ----------
    how : str
        The way.
    train, lora : str, mapping
        As in `fedsplit.models.ModelSpec`.
    edge_nodes : bool
        Whether edge servers are nodes.

    Raises
    ------
    SettingsError
        Naming what it does not go with.
    """
    for fits, name in (
        (train == "lora", "model.train=full"),
        (not lora.get("use_dora"), "model.lora.use_dora, which scales what it adds to"),
        (not edge_nodes, "edge servers that are nodes (run.edge_nodes)"),
    ):
        allowed = f"another one with {name}"
        require(fits or how not in LEAVE_RESIDUALS, "aggregator.adapters", how, allowed)
