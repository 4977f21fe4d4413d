"""Both ends of a stream in one place: what compression does to training, without a network."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedsplit.codec.registry import make_codec


class Loopback:
    """Encodes and decodes with two codecs, as sender and receiver do, and counts the bytes.

    Parameters
    ----------
    settings : mapping
        See `make_codec`.
    seed : int
        Seed of the stochastic rounding.
    """

    def __init__(self, settings: Mapping[str, object], seed: int) -> None:
        self._sender, self._receiver = make_codec(settings, seed), make_codec(settings, seed)
        self.n_bytes = 0
        """Bytes sent so far."""
        self.n_raw_bytes = 0
        """Bytes that the tensors took."""

    def send(self, tensor: torch.Tensor, samples: Sequence[int] | None = None) -> torch.Tensor:
        """Return what the receiver gets of `tensor`, on the tensor's device."""
        payload = self._sender.encode(tensor, samples)
        self.n_bytes += len(payload)
        self.n_raw_bytes += tensor.nbytes
        return self._receiver.decode(payload, tensor.shape, tensor.dtype, samples).to(tensor.device)


def straight_through(
    tensor: torch.Tensor,
    forward: Loopback,
    backward: Loopback,
    samples: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return `tensor` as the other side of a cut sees it.

    Its gradient is what comes back over `backward`; compression itself counts as the identity
    (straight-through), exactly as on a link.
    """
    crossed: torch.Tensor = _Crossing.apply(  # type: ignore[no-untyped-call]
        tensor, forward, backward, samples
    )
    return crossed


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        forward: Loopback,
        backward: Loopback,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        ctx.backward_link, ctx.samples = backward, samples
        return forward.send(tensor, samples).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return ctx.backward_link.send(gradient, ctx.samples), None, None, None
