"""Named random generators: every random draw comes from one seed and the name of its purpose.

A generator depends on nothing but its name, so results do not change with the order in which
clients happen to run.
"""

import hashlib
import json

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and every one of `names`."""
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return the NumPy generator called `names` under `seed`."""
    return np.random.default_rng(derive_seed(seed, *names))
