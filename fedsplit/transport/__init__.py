"""The link between tiers: frames, codecs, in-process and gRPC connections; presence of nodes."""

from fedsplit.transport.admission import ServerLimits
from fedsplit.transport.connection import Tls
from fedsplit.transport.frames import FrameError, Limits
from fedsplit.transport.grpc_link import GrpcLink
from fedsplit.transport.grpc_server import GrpcServer
from fedsplit.transport.held import Held
from fedsplit.transport.in_process import InProcessLink
from fedsplit.transport.link import (
    BackwardReply,
    EvalReply,
    Gradients,
    Host,
    Link,
    LinkError,
    LinkStats,
    OpenRequest,
    StepReply,
    Steps,
    TurnBounds,
    Visit,
    new_token,
)
from fedsplit.transport.messages import with_messages
from fedsplit.transport.presence import Attendance, Attention, Presence
from fedsplit.transport.tensors import take_adapters

__all__ = [
    "Attendance",
    "Attention",
    "BackwardReply",
    "EvalReply",
    "FrameError",
    "Gradients",
    "GrpcLink",
    "GrpcServer",
    "Held",
    "Host",
    "InProcessLink",
    "Limits",
    "Link",
    "LinkError",
    "LinkStats",
    "OpenRequest",
    "Presence",
    "ServerLimits",
    "StepReply",
    "Steps",
    "Tls",
    "TurnBounds",
    "Visit",
    "new_token",
    "take_adapters",
    "with_messages",
]
