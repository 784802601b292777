"""Random numbers and permutations that are pure functions of their keys: no state to save, none to restore.

Only Philox's raw bits are used. NumPy promises to keep those for ever, and does not promise it of Generator's methods.
"""

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 6
WORD = 2**64 - 1


def bits(num, *keys, start=0):
    """Values [start, start + num) of the endless uint64 stream named by up to four whole numbers; O(num) for any start."""
    first, second, third, fourth = (*(int(key) & WORD for key in keys), 0, 0, 0, 0)[:4]
    key, counter = np.array([first, second], np.uint64), np.array([start // 4, 0, third, fourth], np.uint64)
    generator = np.random.Philox(key=key, counter=counter)
    return generator.random_raw(start % 4 + num)[start % 4 :]


def uniform(num, *keys, start=0):
    """Like `bits`, as float64 in [0, 1)."""
    return (bits(num, *keys, start=start) >> np.uint64(11)) * 2.0**-53


def order(num, *keys):
    """A permutation of range(num)."""
    return np.argsort(bits(num, *keys), kind="stable")


def text_key(text):
    """A whole number below 2^64 for a string, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _mix(value):
    """The finalizer of MurmurHash3: every bit of the input moves half of the bits of the output."""
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & WORD
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & WORD
    return value ^ value >> 33


class Permutation:
    """A permutation of range(size) that costs no memory: entry i is found alone, in microseconds, at any size.

    A Feistel network permutes the next larger power of four; what falls outside is sent through again until it falls inside.
    """

    def __init__(self, size, *keys):
        self.size = size
        self.half = max(3, ((size - 1).bit_length() + 1) // 2)
        self.round_keys = [int(key) for key in bits(ROUNDS, *keys)]

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(f"entry {i} of a permutation of {self.size}")
        mask = (1 << self.half) - 1
        while True:
            left, right = i >> self.half, i & mask
            for key in self.round_keys:
                left, right = right, left ^ _mix(right ^ key) & mask
            i = left << self.half | right
            if i < self.size:
                return i


@lru_cache(maxsize=64)
def permutation(size, *keys):
    """A Permutation, kept for the next window of the same buffer."""
    return Permutation(size, *keys)
