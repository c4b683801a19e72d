"""Four-lane interleaved range asymmetric numeral systems (Duda 2014) with static tables, as numba kernels.

A payload is little-endian: sigma and mu (float32), four lane states (uint32), then 16-bit words. Coefficient i belongs
to lane i mod 4. A value without a symbol of its own follows, as one int16 word, the words of its escape symbol.
docs/format.md is the specification.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dtcache.codec.fitted import DEAD, TABLE_BITS, TABLE_SIZE, FittedTap
from dtcache.errors import CodecError

HEADER_WORDS = 4
LANES = 4
LOW = 1 << 16
"""Lane states stay in [2^16, 2^32)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RansTables:
    """A fit's probability tables, laid out for the kernels."""

    frequency: NDArray[np.uint16]
    """(T, A): frequency of each symbol, of 2048."""
    start: NDArray[np.uint16]
    """(T, A): sum of the frequencies before it."""
    symbol_at: NDArray[np.uint8]
    """(T, 2048): symbol that owns each slot."""
    half_width: NDArray[np.int16]
    """(T,): values -half_width..half_width have symbols of their own."""
    table: NDArray[np.uint8]
    """(n,): table of each coded coefficient, in coding order."""


def rans_tables(fitted: FittedTap) -> RansTables:
    """Lay out a fit's tables for the kernels."""
    cumulative = np.cumsum(fitted.tables.astype(np.int64), axis=1)
    slots = [np.searchsorted(row, np.arange(TABLE_SIZE), side="right") for row in cumulative]
    classes = np.sort(fitted.classes[fitted.classes != DEAD])
    return RansTables(
        frequency=fitted.tables,
        start=(cumulative - fitted.tables).astype(np.uint16),
        symbol_at=np.array(slots, np.uint8).reshape(len(slots), TABLE_SIZE),
        half_width=fitted.half_width.astype(np.int16),
        table=fitted.class_table[classes],
    )


def encode(values_N: NDArray[np.int16], mu: float, sigma: float, tables: RansTables, bound: int) -> bytes:
    """Encode one sample's quantised coefficients and its two whitening scalars."""
    words = np.zeros(bound // 2, np.uint16)
    words[:HEADER_WORDS] = np.array([sigma, mu], np.float32).view(np.uint16)
    used = _encode(values_N, tables.table, tables.frequency, tables.start, tables.half_width, words)
    return words[:used].tobytes()


def decode_batch(payloads_BL: NDArray[np.uint8], tables: RansTables) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Decode padded payloads (B, L) to coefficients (B, n) and (sigma, mu) pairs (B, 2).

    Raises CodecError naming the place in the batch of a payload that no encoder wrote.
    """
    count, length = payloads_BL.shape
    if length < 2 * (HEADER_WORDS + 2 * LANES):
        raise CodecError(f"payloads of {length} bytes are too short for the lane states")
    values = np.empty((count, len(tables.table)), np.int16)
    words = np.ascontiguousarray(payloads_BL).view(np.uint16)
    bad = _decode(words, tables.table, tables.frequency, tables.start, tables.symbol_at, tables.half_width, values)
    if bad >= 0:
        raise CodecError(f"payload {bad} of the batch does not decode: the bytes are not ones that the encoder wrote")
    scalars = np.ascontiguousarray(payloads_BL[:, :8]).view(np.float32)
    return values, scalars


@njit(cache=True, nogil=True)
def _encode(values, table, frequency, start, half_width, out):  # type: ignore[no-untyped-def]
    """Write the payload after its scalars into uint16 words; return the number of words used."""
    count = len(values)
    states = np.full(LANES, LOW, np.uint64)
    # Coding runs backwards, so that decoding runs forwards; at most a state's word and an escape a coefficient.
    words = np.empty(2 * count, np.uint16)
    used = 0
    for i in range(count - 1, -1, -1):
        t = table[i]
        h = np.int32(half_width[t])
        v = np.int32(values[i])
        symbol = v + h
        if abs(v) > h:
            symbol = 2 * h + 1
            words[used] = np.uint16(v & 0xFFFF)
            used += 1
        f = np.uint64(frequency[t, symbol])
        x = states[i % LANES]
        if x >= (f << np.uint64(32 - TABLE_BITS)):
            words[used] = x & np.uint64(0xFFFF)
            used += 1
            x >>= np.uint64(16)
        states[i % LANES] = ((x // f) << np.uint64(TABLE_BITS)) + x % f + np.uint64(start[t, symbol])
    head = HEADER_WORDS
    for lane in range(LANES):
        out[head] = states[lane] & np.uint64(0xFFFF)
        out[head + 1] = states[lane] >> np.uint64(16)
        head += 2
    for k in range(used):
        out[head + k] = words[used - 1 - k]
    return head + used


@njit(cache=True, nogil=True)
def _decode(words, table, frequency, start, symbol_at, half_width, values):  # type: ignore[no-untyped-def]
    """Decode every row; return the first row that is not a payload, or -1."""
    count = values.shape[1]
    length = words.shape[1]
    states = np.empty(LANES, np.uint32)
    for row in range(words.shape[0]):
        position = HEADER_WORDS
        for lane in range(LANES):
            low, high = words[row, position], words[row, position + 1]
            states[lane] = np.uint32(low) | (np.uint32(high) << np.uint32(16))
            position += 2
        for i in range(count):
            t = table[i]
            x = states[i & 3]
            slot = x & np.uint32(TABLE_SIZE - 1)
            symbol = symbol_at[t, slot]
            x = np.uint32(frequency[t, symbol]) * (x >> np.uint32(TABLE_BITS)) + slot - np.uint32(start[t, symbol])
            if x < np.uint32(LOW):
                if position >= length:
                    return row
                x = (x << np.uint32(16)) | np.uint32(words[row, position])
                position += 1
            states[i & 3] = x
            value = np.int32(symbol) - np.int32(half_width[t])
            if value > half_width[t]:
                if position >= length:
                    return row
                value = np.int32(np.int16(words[row, position]))
                position += 1
                if abs(value) <= half_width[t]:
                    return row
            values[row, i] = value
        # The decoder must end where the encoder began; anything else is damage that got past the checksums.
        for lane in range(LANES):
            if states[lane] != np.uint32(LOW):
                return row
    return -1
