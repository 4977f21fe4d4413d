"""What noise is worth, against dp-accounting's own accountants and published values."""

import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedsplit.data import RowSamples, training_batches
from fedsplit.privacy import PrivacySpec, Spent, epsilon, most_uses


@pytest.mark.parametrize(("noise", "uses"), [(1.0, 1), (4.0, 10), (20.0, 1), (20.0, 300)])
def test_epsilon_is_that_of_the_accountants_with_a_sensitivity_of_twice_the_norm(
    noise: float, uses: int
) -> None:
    spec = PrivacySpec(clip=3.0, noise_multiplier=noise, delta=1e-6)
    event = dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(noise / 2), uses)
    exact = PLDAccountant().compose(event).get_epsilon(1e-6)
    assert epsilon(spec, uses) == pytest.approx(exact, rel=1e-3)
    assert epsilon(spec, uses) <= RdpAccountant().compose(event).get_epsilon(1e-6)


def test_one_release_satisfies_the_exact_condition_of_the_gaussian_mechanism() -> None:
    """Balle and Wang, "Improving the Gaussian mechanism for differential privacy", theorem 8."""
    from scipy.stats import norm

    spec = PrivacySpec(clip=1.0, noise_multiplier=3.0, delta=1e-5)
    found, ratio = epsilon(spec, 1), 2 / 3
    delta = norm.cdf(ratio / 2 - found / ratio) - math.exp(found) * norm.cdf(
        -ratio / 2 - found / ratio
    )
    assert delta == pytest.approx(1e-5, rel=1e-6)


def test_gradients_are_releases_too_where_they_are_defended() -> None:
    same = PrivacySpec(
        clip=1.0, noise_multiplier=4.0, gradient_clip=9.0, gradient_noise_multiplier=4.0
    )
    boundaries = PrivacySpec(clip=1.0, noise_multiplier=4.0)
    assert epsilon(same, 5, 5) == pytest.approx(epsilon(boundaries, 10))
    assert epsilon(same, 5) == pytest.approx(epsilon(boundaries, 5))
    assert epsilon(PrivacySpec(clip=1.0, noise_multiplier=1.0, gradient_clip=1.0), 1, 1) == math.inf


def test_nothing_sent_costs_nothing_and_no_noise_costs_all() -> None:
    assert epsilon(PrivacySpec(clip=1.0, noise_multiplier=1.0), 0) == 0
    assert epsilon(PrivacySpec(clip=1.0), 1) == math.inf


@pytest.mark.parametrize("n_samples", [1, 3, 8, 17, 40])
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_a_turn_uses_no_sample_more_often_than_is_counted(n_samples: int, steps: int) -> None:
    rows = RowSamples([{"x": i} for i in range(n_samples)])
    bound = most_uses(steps, 8, n_samples)
    worst = 0
    for seed in range(20):
        used = np.zeros(n_samples, int)
        for batch in training_batches(rows, 8, np.random.default_rng(seed), steps):
            used[list(batch.samples)] += 1
        worst = max(worst, used.max())
    assert worst <= bound
    assert n_samples > 8 or worst == bound


def test_the_sample_that_was_used_most_counts_on_whichever_device() -> None:
    spec = PrivacySpec(clip=1.0, noise_multiplier=5.0)
    spent = Spent((0, 0)).after([(0, 2), (1, 7)], 3)
    assert spent == Spent((2, 7), 3)
    assert spent.epsilon(spec, gradients=False) == epsilon(spec, 7)
    assert spent.after((), 10).epsilon(spec, gradients=False) == epsilon(spec, 13)
