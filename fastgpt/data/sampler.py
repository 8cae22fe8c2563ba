"""Shuffled sampling without a table: any sample of any epoch is computed from its number alone.

Each epoch visits the windows in the order of a pseudo-random permutation: a Feistel network (Luby and Rackoff 1988)
on as many bits as the windows need, in two halves, with cycle walking (Black and Rogaway 2002, section 4)
back into range. Its keys come from the seed and the epoch, so resuming needs only the number of the next sample.
"""

import hashlib

import numpy as np
import numpy.typing as npt

ROUND_PAIRS = 4
NEXT_ROUND = np.uint64(0xD1B54A32D192ED03)  # odd, so that no two rounds have the same key

Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


class Sampler:
    """Sample s is window `permutation_e[s % windows]` of epoch e = s // windows; `seed` decides the permutations."""

    def __init__(self, windows: int, seed: int) -> None:
        if windows < 1:
            raise ValueError(f"a sampler needs at least one window, got {windows}")
        self.windows = windows
        self._key = key(seed, "permutation")
        bits = (windows - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << bits - bits // 2) - 1)

    def index(self, samples: Indices) -> Indices:
        """The windows of the global sample numbers `samples`, in the same shape, each in [0, windows)."""
        epochs, positions = np.divmod(np.asarray(samples, np.int64), self.windows)
        keys = keyed(self._key, epochs)
        windows = self._permute(positions.astype(np.uint64), keys)
        while (outside := windows >= self.windows).any():
            windows[outside] = self._permute(windows[outside], keys[outside])
        return windows.astype(np.int64)

    def epoch(self, samples: Indices) -> Indices:
        """The epochs, from 0, that the global sample numbers fall into."""
        return np.asarray(samples, np.int64) // self.windows

    def _permute(self, numbers: Words, keys: Words) -> Words:
        """One pass of the network over the whole power of two, each number under its own key."""
        left, right = numbers >> self._low_bits, numbers & self._low
        for _ in range(ROUND_PAIRS):
            left = left ^ (scramble(right ^ keys) & self._high)
            keys = keys + NEXT_ROUND
            right = right ^ (scramble(left ^ keys) & self._low)
            keys = keys + NEXT_ROUND
        return (left << self._low_bits) | right


def scramble(words: Words) -> Words:
    """A bijection of 64-bit words in which every bit depends on every other: SplitMix64 (Steele et al. 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key(seed: int, purpose: str) -> np.uint64:
    """A pseudo-random 64-bit word, independent between seeds and purposes."""
    return np.uint64(int.from_bytes(hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()))


def keyed(key: np.uint64, numbers: Indices) -> Words:
    """A pseudo-random 64-bit word for each of `numbers`."""
    return scramble(scramble(numbers.astype(np.uint64)) ^ key)
