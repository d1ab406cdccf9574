"""Interval masks that the tests of every attention kernel draw from."""

import numpy as np


def packed(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of random lengths, causal within each, some padding at the end."""
    start, end = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        i, real = 0, int(numbers.integers(T // 2, T + 1))
        while i < real:
            n = min(int(numbers.integers(1, max(T // 3, 2))), real - i)
            start[b, i : i + n], end[b, i : i + n] = i, np.arange(i, i + n) + 1
            i += n
        start[b, real:], end[b, real:] = np.arange(real, T), np.arange(real, T) + 1
    return np.minimum(start, S), np.minimum(end, S)


def causal(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """The last query sees all keys, as in chunked prefill."""
    end = np.broadcast_to(np.clip(np.arange(T) + 1 + S - T, 0, S), (B, T)).astype(np.int32)
    return np.zeros_like(end), end


def window(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    _, end = causal(numbers, B, T, S)
    return np.maximum(end - int(numbers.integers(1, S + 1)), 0).astype(np.int32), end


def anything(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Random intervals; some are empty, some have one key."""
    start = numbers.integers(0, S, (B, T))
    length = numbers.integers(0, S, (B, T)) * numbers.integers(0, 2, (B, T)) + numbers.integers(0, 2, (B, T))
    return start.astype(np.int32), np.minimum(start + length, S).astype(np.int32)


MASKS = (packed, causal, window, anything)
