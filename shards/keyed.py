"""Random numbers and permutations, found by number and key and not one after the other."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]

FEISTEL_ROUNDS: Final = 8
GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def keys(seed: int, epoch: int, what: str) -> U64:
    """The keys of one epoch of one sample set, a round each."""
    key = f"{seed}/{epoch}/{what}".encode()
    return np.frombuffer(blake2b(key, digest_size=8 * FEISTEL_ROUNDS).digest(), "<u8")


def permuted(value: U64, n: U64, round_keys: U64) -> I64:
    """Each value below its `n`, permuted there; the arrays broadcast, `round_keys` by round first.

    A Feistel network over the smallest near-square a × b that holds `n`, its halves numbers modulo
    a and b, walked until it lands below `n` (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002): a permutation by construction, in constant time and memory, and nearly always
    in one walk.
    """
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    found = _walked(value, a, b, round_keys)
    shape = found.shape
    outside = np.flatnonzero(found >= n)
    while len(outside):
        n_here, a_here, b_here = (np.broadcast_to(x, shape)[outside] for x in (n, a, b))
        keys_here = np.broadcast_to(round_keys, (len(round_keys), *shape))[:, outside]
        found[outside] = _walked(found[outside], a_here, b_here, keys_here)
        outside = outside[found[outside] >= n_here]
    return found.astype(np.int64)


def _walked(value: U64, a: U64, b: U64, round_keys: U64) -> U64:
    left, right = value // b, value % b
    half = np.uint64(1)  # of a mixed number, so that no sum passes 2^64
    for even, odd in zip(round_keys[::2], round_keys[1::2], strict=True):
        left = (left + (mixed(right ^ even) >> half)) % a
        right = (right + (mixed(left ^ odd) >> half)) % b
    return left * b + right


def uniform(key: np.uint64, number: I64) -> F64:
    """A number in (0, 1), neither end, for each of `number`."""
    bits = mixed(key + (number.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def mixed(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
