"""A link within one process: the same frames, codecs and checks, without a connection."""

from collections.abc import Callable

from fedsplit.transport.client import FrameLink
from fedsplit.transport.frames import Limits
from fedsplit.transport.link import Host
from fedsplit.transport.session import Session


class InProcessLink(FrameLink):
    """A `Link` to a tier in the same process.

    Parameters
    ----------
    host : Host
        The tier (`fedsplit.execution.Stage`).
    limits : Limits
        Upper bounds of a frame.
    """

    def __init__(self, host: Host, limits: Limits | None = None) -> None:
        super().__init__(limits or Limits())
        self._session = Session(host, self._limits)

    def _send(self, frame: bytes) -> Callable[[], bytes]:
        reply = self._exchange(frame)
        return lambda: reply

    def _exchange(self, frame: bytes) -> bytes:
        reply = self._session.handle(frame)
        self._session.settle()
        return reply

    def _hang_up(self) -> None:
        self._session.hang_up("the other end hung up")
