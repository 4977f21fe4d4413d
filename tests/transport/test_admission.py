"""Who waits for room in a server's memory."""

import pytest

from fedsplit.transport.admission import Admission, NoRoomError, ServerLimits
from fedsplit.transport.frames import Limits


def test_a_peer_that_left_waits_for_room_no_more() -> None:
    admission = Admission(
        ServerLimits(memory_bytes=100, memory_per_peer_bytes=60, frames=Limits(frame_bytes=60))
    )
    with admission.memory("left", 60, urgent=False, wanted=lambda: True):
        looks = iter([True, False])
        with (
            pytest.raises(NoRoomError, match="the peer left"),
            admission.memory("left", 1, urgent=False, wanted=lambda: next(looks)),
        ):
            pytest.fail("there was no room")
        assert next(looks, None) is None
    with admission.memory("left", 60, urgent=False, wanted=lambda: False):
        pass  # nothing was counted for the one that left
