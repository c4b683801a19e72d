"""Fits and values for the codec's tests, and a reference decoder of the payload's specification."""

import struct

import numpy as np
from numpy.typing import NDArray

from dtcache.codec import FittedTap
from dtcache.codec.symbol_tables import normalise


def random_fit(count: int, seed: int, tables: int = 3, max_half: int = 20) -> FittedTap:
    """Return a valid fit of `count` live coefficients with random tables."""
    rng = np.random.default_rng(seed)
    half = rng.integers(1, max_half + 1, tables)
    rows = np.zeros((tables, 2 * int(half.max()) + 2), np.uint16)
    for row, h in zip(rows, half, strict=True):
        row[: 2 * h + 2] = normalise(rng.gamma(0.3, size=2 * h + 2) + 1e-9)
    return FittedTap(
        basis=np.eye(1, dtype=np.float16),
        mean=np.zeros(1, np.float16),
        classes=rng.integers(0, tables, (1, 1, count)).astype(np.uint8),
        class_step=np.ones(tables, np.float32),
        class_gain=np.ones(tables, np.float32),
        class_table=rng.permutation(tables).astype(np.uint8),
        tables=rows,
        half_width=half.astype(np.uint8),
    )


def coded_tables(fitted: FittedTap) -> NDArray[np.int64]:
    """Return the table of each coefficient in coding order: by rising class, then by position."""
    live = sorted((int(c), place) for place, c in enumerate(fitted.classes.reshape(-1)) if c != 255)
    return np.array([fitted.class_table[c] for c, _ in live], np.int64)


def draw_values(fitted: FittedTap, seed: int, escape_values: bool = True) -> NDArray[np.int16]:
    """Draw one sample's values from the fit's tables; an escape gives a value outside its table."""
    rng = np.random.default_rng(seed)
    values = []
    for t in coded_tables(fitted):
        h = int(fitted.half_width[t])
        symbol = int(rng.choice(2 * h + 2, p=fitted.tables[t, : 2 * h + 2] / 2048))
        outside = int(rng.choice([-1, 1])) * int(rng.integers(h + 1, 32768)) if escape_values else 0
        values.append(symbol - h if symbol <= 2 * h else outside)
    return np.array(values, np.int16)


def reference_sections(payload: bytes, names: list[str]) -> dict[str, bytes]:
    """Return the sections of a payload of small taps, whose lengths are uint16."""
    lengths = [2 * n for n in struct.unpack_from(f"<{len(names) - 1}H", payload)]
    sections = {}
    begin = 2 * len(lengths)
    for name, length in zip(names, [*lengths, len(payload)], strict=True):
        sections[name] = payload[begin : begin + length]
        begin += length
    return sections


def reference_decode(section: bytes, fitted: FittedTap) -> tuple[list[int], float, float]:
    """Decode with Python integers alone and return values, sigma and mu.

    Raises ValueError unless decoding ends exactly at the section's end.
    """
    states = list(struct.unpack_from("<4I", section))
    rest = section[16:]
    words = list(struct.unpack(f"<{len(rest) // 2}H", rest))
    values = []
    for i, t in enumerate(coded_tables(fitted)):
        frequencies = [int(f) for f in fitted.tables[t]]
        quotient, slot = divmod(states[i % 4], 2048)
        symbol = next(s for s in range(len(frequencies)) if slot < sum(frequencies[: s + 1]))
        state = frequencies[symbol] * quotient + slot - sum(frequencies[:symbol])
        if state < 1 << 16:
            state = state * 65536 + words.pop(0)
        states[i % 4] = state
        half = int(fitted.half_width[t])
        # An escaped value is one more word, read as a signed number.
        values.append(
            symbol - half if symbol <= 2 * half else (words.pop(0) + 32768) % 65536 - 32768
        )
    if words or [state >> 16 for state in states] != [1] * 4:
        raise ValueError(f"{len(words)} words and states {states} are left")
    scalars = struct.pack("<4H", *(state & 0xFFFF for state in states))
    sigma, mu = struct.unpack("<ff", scalars)
    return values, sigma, mu
