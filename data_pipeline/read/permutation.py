"""Pseudo-random permutations that take no memory: any element follows from its index and a key."""

from __future__ import annotations

import hashlib

import numpy as np

# On a domain of a few elements, a Feistel network needs more than the usual four rounds to look random.
_ROUNDS = 8
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)  # the finalizer of splitmix64
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> np.ndarray:
    """Derive round keys, [_ROUNDS] uint64, from seeds, names and counters."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Apply the permutation of 0 ... size - 1 that `key` selects.

    Args:
        index: [n] int64, each in 0 ... size - 1.
        size: elements of the domain, 1 ... 2**62.
        key: from `derive_key`.

    Returns:
        [n] int64, the image of each index.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    result = index.astype(np.uint64)
    # The network permutes 0 ... 4**half_bits - 1, at most 4 * size - 1: follow its cycle until it is below size.
    walking = np.arange(len(result))
    while len(walking):
        value = result[walking]
        left, right = value >> shift, value & mask
        for round_key in key:
            mixed = right + round_key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIER_1
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIER_2
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        value = (left << shift) | right
        result[walking] = value
        walking = walking[value >= np.uint64(size)]
    return result.astype(np.int64)


def choose_positions(length: int, count: int, key: np.ndarray) -> np.ndarray:
    """Choose `count` different positions in 0 ... length - 1, [count] int64: the tokens that objective=mlm masks."""
    return permute(np.arange(count, dtype=np.int64), length, key)
