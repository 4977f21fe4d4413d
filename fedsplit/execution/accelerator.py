"""Where a process computes."""

import torch


def torch_device(accelerator: str) -> torch.device:
    """Return the torch device that `accelerator` names; ``auto`` is a GPU when there is one."""
    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(accelerator)
