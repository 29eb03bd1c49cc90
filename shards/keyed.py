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


def half_bits(n: int) -> np.uint64:
    """Half the bits of the smallest even power of two that holds `n`."""
    return np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))


def permuted(value: U64, n: U64, half: U64, keys: U64) -> I64:
    """Each value below its `n`, permuted there; `keys` is (rounds, values).

    A Feistel network over `half` bits twice, walked until it lands inside `n` (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002): a permutation in constant time and memory.
    """
    mask = (np.uint64(1) << half) - np.uint64(1)
    walking = np.arange(len(value))
    while len(walking):
        bits, low = half[walking], mask[walking]
        left, right = value[walking] >> bits, value[walking] & low
        for key in keys[:, walking]:
            left, right = right, left ^ (mixed(right ^ key) & low)
        value[walking] = (left << bits) | right
        walking = walking[value[walking] >= n[walking]]
    return value.astype(np.int64)


def uniform(key: np.uint64, number: I64) -> F64:
    """A number in (0, 1), neither end, for each of `number`."""
    bits = mixed(key + (number.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def mixed(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
