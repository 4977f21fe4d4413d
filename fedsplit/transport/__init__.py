"""The link between tiers: frames, codecs, an in-process and a gRPC connection."""

from fedsplit.transport.frames import FrameError, Limits
from fedsplit.transport.in_process import InProcessLink
from fedsplit.transport.link import (
    EvalReply,
    Gradients,
    Host,
    Link,
    LinkError,
    LinkStats,
    OpenRequest,
    StepReply,
    Visit,
    new_token,
)

__all__ = [
    "EvalReply",
    "FrameError",
    "Gradients",
    "Host",
    "InProcessLink",
    "Limits",
    "Link",
    "LinkError",
    "LinkStats",
    "OpenRequest",
    "StepReply",
    "Visit",
    "new_token",
]
