"""What noise is worth: (epsilon, delta), by Google's dp-accounting.

Every time that a sample is used its boundary is released once more. A release of a unit that is
clipped to a norm C with noise of standard deviation ``z C`` is a Gaussian mechanism of sensitivity
2 C, since any unit may stand in another's place; releases compose to one whose inverse squared
noise multiplier is the sum of theirs. Nothing is gained by sampling: who receives boundaries sees
which samples they are of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.errors import FedsplitError
from fedsplit.privacy.noise import PrivacySpec

_REPLACED = 2.0  # sensitivity in units of the clipping norm


def epsilon(spec: PrivacySpec, uses: int, gradient_uses: int = 0) -> float:
    """Return the epsilon that belongs to `spec.delta` for a unit that was sent `uses` times.

    Parameters
    ----------
    spec : PrivacySpec
        Infinity results without noise.
    uses : int
        How often its boundary left the device.
    gradient_uses : int
        How often its gradient did, where gradients are defended too.

    Raises
    ------
    FedsplitError
        If dp-accounting is not installed.
    """
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise FedsplitError(
            "privacy.noise_multiplier needs dp-accounting: pip install 'fedsplit[privacy]'"
        ) from error
    pairs = [(uses, spec.noise_multiplier)]
    if spec.gradient_clip is not None:
        pairs.append((gradient_uses, spec.gradient_noise_multiplier))
    total = 0.0
    for count, multiplier in pairs:
        if count and multiplier == 0:
            return math.inf
        total += count * (_REPLACED / multiplier) ** 2 if count else 0.0
    if total == 0:
        return 0.0
    return float(get_epsilon_gaussian(1 / math.sqrt(total), spec.delta))


def most_uses(steps: int, batch_size: int, n_samples: int) -> int:
    """Return how often a turn of `steps` mini-batches uses any one sample, at most.

    Mini-batches are drawn epoch after epoch (`fedsplit.data.training_batches`).
    """
    size = min(batch_size, n_samples)
    return 0 if size == 0 else math.ceil(steps / (n_samples // size))


@dataclass(frozen=True)
class Spent:
    """How often samples left their devices so far.

    Parameters
    ----------
    trained : tuple of int
        For each device, how often any one of its training samples did, at most.
    evaluated : int
        How often any test sample did, at most.
    """

    trained: tuple[int, ...]
    evaluated: int = 0

    def after(self, turns: Sequence[tuple[int, int]], evaluations: int) -> "Spent":
        """Return what is spent after further turns (device, uses) and `evaluations` of all."""
        trained = list(self.trained)
        for device, uses in turns:
            trained[device] += uses
        return Spent(tuple(trained), self.evaluated + evaluations)

    def epsilon(self, spec: PrivacySpec, *, gradients: bool) -> float:
        """Return the epsilon of the sample that was used most, on whichever device.

        `gradients` says whether devices also send gradients up, as on U-shaped routes; then they
        are counted where they are defended.
        """
        most = max(self.trained, default=0)
        training = epsilon(spec, most, most if gradients else 0)
        return max(training, epsilon(spec, self.evaluated))
