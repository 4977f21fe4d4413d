"""Privacy that is measured: attacks on what leaves a device, defences, and what these are worth."""

from fedsplit.privacy.accounting import Spent, epsilon, most_uses
from fedsplit.privacy.attacks import Observed, Reader, most_alike, nearest_embedding
from fedsplit.privacy.gradients import labels_from_gradient, tokens_from_embeddings
from fedsplit.privacy.inverter import Learner
from fedsplit.privacy.metrics import Success, guessing, rouge_l, success
from fedsplit.privacy.noise import SEED, SYSTEM, Defence, PrivacySpec

__all__ = [
    "SEED",
    "SYSTEM",
    "Defence",
    "Learner",
    "Observed",
    "PrivacySpec",
    "Reader",
    "Spent",
    "Success",
    "epsilon",
    "guessing",
    "labels_from_gradient",
    "most_alike",
    "most_uses",
    "nearest_embedding",
    "rouge_l",
    "success",
    "tokens_from_embeddings",
]
