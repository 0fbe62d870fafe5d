# SPDX-License-Identifier: Apache-2.0
"""Random generators that depend on names only, so that work done again gives the same bytes."""

import hashlib

import numpy as np


def generator(*parts: object) -> np.random.Generator:
    """Return the generator of the given parts, such as (seed, round, node, matrix)."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
