"""Privacy that is measured: attacks on what leaves a device, defences, and what these are worth."""

from fedsplit.privacy.accounting import Spent, epsilon, most_uses
from fedsplit.privacy.noise import SEED, SYSTEM, Defence, PrivacySpec

__all__ = ["SEED", "SYSTEM", "Defence", "PrivacySpec", "Spent", "epsilon", "most_uses"]
