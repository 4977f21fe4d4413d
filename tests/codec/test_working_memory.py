"""What decoding takes beside its result stays below what a codec says, whatever the payload is."""

import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fedsplit.codec import make_codec, registry

CLEAR = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="memory is read from /proc")

INNER = {"name": "topk", "keep": 1.0, "bits": 8, "statistics": "column", "scale": "token"}
DENSE = {"name": "int8", "lossless": "zstd"}
WORST: dict[str, list[Mapping[str, object]]] = {
    "int8": [DENSE],
    "topk": [INNER],
    "low_rank": [{"factors": INNER, "rank": 64}, {"factors": DENSE, "rank": 64}],
    "transform": [{"inner": INNER}, {"inner": DENSE}],
    "temporal": [{"key": INNER, "residual": INNER}, {"key": DENSE, "residual": DENSE}],
    "error_feedback": [{"inner": INNER}, {"inner": DENSE}],
}
CASES = [(name, settings) for name in registry.CODECS for settings in WORST.get(name, [{}])]


def resident_bytes(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(which))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_decoding_takes_no_more_than_it_says(name: str, settings: Mapping[str, object]) -> None:
    sender, receiver = (make_codec({**settings, "name": name}, 0) for _ in range(2))
    tensor = torch.randn(32, 64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    samples = list(range(32))
    took = []
    for _ in range(2):
        payload = bytes(sender.encode(tensor, samples))
        gc.collect()
        CLEAR.write_text("5")  # the peak begins anew
        before = resident_bytes("VmRSS")
        made = receiver.decode(payload, tensor.shape, tensor.dtype, samples)
        took.append(resident_bytes("VmHWM") - before - made.nbytes)
    assert max(took) <= receiver.working_bytes * tensor.numel() + (1 << 20)
