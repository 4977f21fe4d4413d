"""Print the peak memory of a device's training step, measured and modelled, in bytes.

Run in a process of its own: ``python device_peak.py <blocks on the device>``.
"""

import ctypes
import gc
import sys
from pathlib import Path

import torch

from fedsplit.models import ModelSpec, Output, SplitModel, load
from fedsplit.models.profile import example_batch, profile_model
from fedsplit.plan import Segment
from fedsplit.profiles import total

BATCH, TOKENS, BLOCKS = 4, 128, 12


def status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def step(model: SplitModel, segment: Segment, inputs: dict[str, torch.Tensor]) -> None:
    """Run `segment` forward, and backward from gradients of ones."""
    result = model.run(segment, inputs)
    if isinstance(result, Output):
        result.loss.backward()
    else:
        sent = [tensor for tensor in result.tensors if tensor.requires_grad]
        torch.autograd.backward(sent, [torch.ones_like(tensor) for tensor in sent])


def main(cut: int) -> None:
    """Measure the peak over memory held before the step, and print it beside the profile's."""
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    spec = ModelSpec(model_type="gpt2", config=dropout)
    segment = Segment("device", 0, cut)
    model = load(spec, [segment])
    model.train()
    inputs = example_batch(model.config, spec.task, TOKENS, BATCH)
    profile = profile_model(spec, TOKENS, BATCH)
    step(model, segment, {name: value[:1, :8] for name, value in inputs.items()})
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step(model, segment, inputs)
    peak = status("VmHWM") - before
    head = [profile.head] if cut == BLOCKS else []
    unit = total([profile.embed, *profile.blocks[:cut], *head])
    print(peak, BATCH * (unit.activation_bytes + unit.workspace_bytes))


if __name__ == "__main__":
    main(int(sys.argv[1]))
