"""What a device does to a boundary before it leaves: a second loss, clipping, Gaussian noise.

The Gaussian mechanism of Dwork and Roth, "The algorithmic foundations of differential privacy",
2014, section 3.5.1 and appendix A; what it is worth is in `fedsplit.privacy.accounting`.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.models import Boundary
from fedsplit.privacy.second_loss import less_telling
from fedsplit.seeds import derive_seed

SAMPLE, TOKEN = "sample", "token"
SEED, SYSTEM = "seed", "system"


@dataclass(frozen=True, kw_only=True)
class PrivacySpec:
    """How a device defends what it sends, in training and in evaluation.

    Parameters
    ----------
    clip : float or None
        L2 norm that the boundary of a unit is scaled down to, if it is longer; None leaves
        boundaries as they are.
    noise_multiplier : float
        Standard deviation of the noise that is added to every number of a boundary, in units of
        `clip`.
    gradient_clip, gradient_noise_multiplier : float or None, float
        The same for the gradients that the device of a U-shaped route sends up.
    correlation_weight : float
        Weight of a second loss in training: the squared distance correlation between boundary and
        data (`fedsplit.privacy.second_loss`). It changes what the device learns, nothing that
        it sends at once.
    reader_weight : float
        The same for the share of tokens that can be read of the boundary.
    unit : str
        What is clipped by itself, and what (epsilon, delta) is said of: "sample", a whole text or
        image, or "token", the vector at one position.
    delta : float
        Of the (epsilon, delta) that is reported.
    budget : float or None
        Epsilon that a run may spend; it ends before a round that would spend more.
    randomness : str
        Where noise comes from: "seed", the run's, for studies that must be repeatable (the server
        knows the seed, and could take such noise off again), or "system", the operating system.

    Raises
    ------
    SettingsError
        If a value is out of range, or noise is given without a norm that it is measured by.
    """

    clip: float | None = None
    noise_multiplier: float = 0.0
    gradient_clip: float | None = None
    gradient_noise_multiplier: float = 0.0
    correlation_weight: float = 0.0
    reader_weight: float = 0.0
    unit: str = SAMPLE
    delta: float = 1e-5
    budget: float | None = None
    randomness: str = SEED

    def __post_init__(self) -> None:
        for prefix in ("", "gradient_"):
            clip = getattr(self, f"{prefix}clip")
            positive = clip is None or 0 < clip < math.inf
            require(positive, f"privacy.{prefix}clip", clip, "above 0 and finite, or null")
            noise = getattr(self, f"{prefix}noise_multiplier")
            field = f"privacy.{prefix}noise_multiplier"
            require(0 <= noise < math.inf, field, noise, "at least 0 and finite")
            measured = noise == 0 or clip is not None
            require(measured, field, noise, f"0 without privacy.{prefix}clip")
        for name in ("correlation_weight", "reader_weight"):
            weight = getattr(self, name)
            finite = 0 <= weight < math.inf
            require(finite, f"privacy.{name}", weight, "at least 0 and finite")
        require_choice("privacy.unit", self.unit, (SAMPLE, TOKEN))
        require(0 < self.delta < 1, "privacy.delta", self.delta, "between 0 and 1")
        budget = self.budget
        require(budget is None or budget > 0, "privacy.budget", budget, "above 0, or null")
        noisy = budget is None or self.noise_multiplier > 0
        require(noisy, "privacy.budget", budget, "null without privacy.noise_multiplier")
        require_choice("privacy.randomness", self.randomness, (SEED, SYSTEM))


class Defence:
    """What a device does to all that it sends in one turn.

    Parameters
    ----------
    spec : PrivacySpec
        How.
    seed : int
        The turn's, which noise is drawn from unless `spec` says otherwise.
    """

    def __init__(self, spec: PrivacySpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed
        self._sent = 0

    def boundary(
        self, boundary: Boundary, inputs: Mapping[str, Tensor], share: float = 1.0
    ) -> Boundary:
        """Return what may leave of `boundary`, in its graph: gradients go back through clipping.

        Parameters
        ----------
        boundary : Boundary
            What the device's blocks made of `inputs`.
        inputs : mapping of str to Tensor
            The mini-batch.
        share : float
            Its part of the targets of the mini-batches that one update is made of.

        Raises
        ------
        FedsplitError
            If it cannot be clipped by unit: a tensor is not of shape ``[samples, ...]``, or for
            tokens ``[samples, tokens, hidden]``; or correlated with data of its shape.
        """
        spec = self._spec
        correlation, reader = share * spec.correlation_weight, share * spec.reader_weight
        if correlation or reader:
            tensors = less_telling(boundary, inputs, correlation=correlation, reader=reader)
            boundary = replace(boundary, tensors=tensors)
        if spec.clip is None:
            return boundary
        tensors = self._defend(boundary.tensors, spec.clip, spec.noise_multiplier)
        return replace(boundary, tensors=tensors)

    def gradients(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return what may leave of the gradients of a boundary; None stays None."""
        spec = self._spec
        if spec.gradient_clip is None:
            return tuple(gradients)
        present = tuple(item for item in gradients if item is not None)
        sent = self._defend(present, spec.gradient_clip, spec.gradient_noise_multiplier)
        rest = iter(sent)
        return tuple(None if item is None else next(rest) for item in gradients)

    def _defend(
        self, tensors: Sequence[Tensor], clip: float, noise_multiplier: float
    ) -> tuple[Tensor, ...]:
        kept = 1 if self._spec.unit == SAMPLE else 2
        clipped = clip_units(tensors, clip, kept)
        self._sent += 1
        if noise_multiplier == 0:
            return clipped
        draw = torch.Generator().manual_seed(self._fresh_seed())
        std = noise_multiplier * clip
        return tuple(_noised(tensor, std, draw) for tensor in clipped)

    def _fresh_seed(self) -> int:
        if self._spec.randomness == SYSTEM:
            return secrets.randbits(63)
        return derive_seed(self._seed, "privacy", self._sent)


def clip_units(tensors: Sequence[Tensor], clip: float, kept: int) -> tuple[Tensor, ...]:
    """Scale what is longer than `clip` down to it.

    Parameters
    ----------
    tensors : sequence of Tensor
        Those that are not of floating point are left alone.
    clip : float
        L2 norm over all tensors together.
    kept : int
        A unit is an index of the first `kept` dimensions: 1, a sample; 2, a token.

    Raises
    ------
    FedsplitError
        If the tensors do not have these dimensions in common.
    """
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    shapes = {tuple(tensor.shape[:kept]) for tensor in floating}
    right = all(tensor.dim() == 3 if kept == 2 else tensor.dim() > 1 for tensor in floating)
    if len(shapes) > 1 or not right:
        listed = ", ".join(str(tuple(tensor.shape)) for tensor in floating)
        raise FedsplitError(
            f"privacy.unit={TOKEN if kept == 2 else SAMPLE!r}: boundaries of shape {listed} "
            "cannot be clipped by it"
        )
    squares = sum(
        (tensor.double().square().flatten(kept).sum(-1) for tensor in floating),
        start=torch.zeros((), dtype=torch.float64),
    )
    # The norm's square is bounded before its root, whose slope at 0 is infinite. In double
    # precision the root of a square is exact: what is short enough stays what it is.
    scale = clip / squares.clamp_min(clip * clip).sqrt()
    return tuple(
        tensor * scale.to(tensor.dtype).reshape(scale.shape + (1,) * (tensor.dim() - kept))
        if tensor.is_floating_point()
        else tensor
        for tensor in tensors
    )


def _noised(tensor: Tensor, std: float, draw: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=draw)  # on the CPU, the same on every machine
    return tensor + (std * noise).to(device=tensor.device, dtype=tensor.dtype)
