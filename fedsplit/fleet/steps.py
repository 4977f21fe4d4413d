"""What a mini-batch does on its way through a route and back, activity by activity.

It goes through the segments of the route and back: forward on every segment but the last, forward
and backward on the last, backward on the others; between two segments the boundary crosses a link.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.plan import DEVICE, EDGE

COMPUTE, UPLINK, DOWNLINK, BACKHAUL = "compute", "uplink", "downlink", "backhaul"


@dataclass(frozen=True)
class Stage:
    """One activity of a mini-batch, or of the exchange of adapters around a turn.

    Parameters
    ----------
    kind : str
        "compute", "uplink", "downlink" or "backhaul".
    label : str
        "forward", "backward", "forward+backward" or "adapters".
    segment : int
        Segment of the route that computes, or that a boundary comes from when it goes forward.
    tier : str
        Tier that computes; empty for a link.
    """

    kind: str
    label: str
    segment: int
    tier: str = ""

    @property
    def on_server(self) -> bool:
        """Whether a server computes this stage."""
        return self.kind == COMPUTE and self.tier != DEVICE


def step_stages(tiers: Sequence[str], has_edges: bool) -> tuple[Stage, ...]:
    """Return the stages of one mini-batch on a route over `tiers`, in order."""
    last = len(tiers) - 1
    up = [
        stage
        for i in range(last)
        for stage in (
            Stage(COMPUTE, "forward", i, tiers[i]),
            *_hop(tiers[i], tiers[i + 1], i, "forward", has_edges),
        )
    ]
    down = [
        stage
        for i in reversed(range(last))
        for stage in (
            *_hop(tiers[i + 1], tiers[i], i, "backward", has_edges),
            Stage(COMPUTE, "backward", i, tiers[i]),
        )
    ]
    return (*up, Stage(COMPUTE, "forward+backward", last, tiers[last]), *down)


def _hop(
    sender: str, receiver: str, segment: int, label: str, has_edges: bool
) -> tuple[Stage, ...]:
    """Return the links between two tiers; with edges, the radio ends there and wires go on."""
    radio = UPLINK if sender == DEVICE else DOWNLINK
    if EDGE in (sender, receiver):
        wired = DEVICE not in (sender, receiver)
        return (Stage(BACKHAUL if wired else radio, label, segment),)
    if not has_edges:
        return (Stage(radio, label, segment),)
    kinds = (radio, BACKHAUL) if sender == DEVICE else (BACKHAUL, radio)
    return tuple(Stage(kind, label, segment) for kind in kinds)
