"""Addressed randomness: what is drawn depends on (seed, stream, index) and on nothing else.

Words come raw from Philox4x64, a counter-based generator: the key is (seed, stream), the counter
is the index. Raw words are used because the streams of NumPy's distributions may change between
versions while those of its bit generators may not; a test pins golden values.
"""

from __future__ import annotations

import hashlib

import numpy as np

from coar.errors import SettingError

SEED_LIMIT = 2**63


def check_seed(seed: int) -> int:
    """Return the seed if it is a whole number in [0, 2**63)."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < SEED_LIMIT:
        raise SettingError("a seed is a whole number", expected="0 <= seed < 2**63", got=repr(seed))
    return int(seed)


def words(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """Random words at one address.

    Args:
        seed: the user's seed.
        stream: what the words are for, so that two uses of one seed never share a draw.
        index: row, pass, replicate, ... within the stream.
        count: how many words.

    Returns:
        uint64 array [count], the same on every machine; a longer draw starts with the shorter one.

    >>> bool((words(0, "fit", 7, 5)[:3] == words(0, "fit", 7, 3)).all())
    True
    """
    key = np.array([check_seed(seed), _stream_key(stream)], dtype=np.uint64)
    # The index sits in the second counter word: each index owns 2**64 blocks of four words.
    counter = np.array([0, index, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def half_words(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """uint32 array [count]: the halves of `words`, low half first on every machine."""
    raw = words(seed, stream, index, (count + 1) // 2)
    return raw.astype("<u8").view("<u4")[:count].astype(np.uint32, copy=False)


def uniform(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """float64 array [count], uniform on [0, 1)."""
    return (words(seed, stream, index, count) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """A random order of `range(count)`, int64.

    >>> sorted(permutation(3, "split", 0, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    return np.argsort(words(seed, stream, index, count), kind="stable")


def integers(seed: int, stream: str, index: int, count: int, below: int) -> np.ndarray:
    """int64 array [count], uniform on `range(below)` (bias under 2**-21 for below < 2**32)."""
    return (uniform(seed, stream, index, count) * below).astype(np.int64)


def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
