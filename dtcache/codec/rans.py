"""Four-lane interleaved rANS (Duda 2014) with static tables, as numba kernels.

rANS stands for range asymmetric numeral systems. A section is little-endian: four lane states
(uint32), then 16-bit words. Coefficient i belongs to lane i mod 4. If a value has no symbol of its
own, the words of the escape symbol come first, then the value as one int16 word. The encoder begins
with the bits of sigma and mu (float32) in the lane states, 16 bits per lane, so the decoder ends
with them: the two scalars take no further bytes. docs/format.md is the specification.
"""

from dataclasses import dataclass

import numpy as np
from numba import int16, int32, uint64
from numpy.typing import NDArray

from dtcache.errors import PayloadError
from dtcache.kernels import kernel
from dtcache.payloads import WORD, Payloads

TABLE_BITS = 11
TABLE_SIZE = 1 << TABLE_BITS
MAX_HALF_WIDTH = 127
LANES = 4
STATE_WORDS = 2 * LANES
"""Words of the lane states. The bits of sigma and mu are LANES words."""
LOW = uint64(1 << 16)
"""Lane states stay in [2^16, 2^32), and are below 2^17 before the first coefficient is encoded."""
ESCAPE = -32768
"""Marks an escape: no coded value is -32768."""
SLOT_BITS = uint64(TABLE_BITS)
SLOT_MASK = uint64(TABLE_SIZE - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RansCoder:
    """Packs and unpacks sections with T probability tables of A symbols."""

    frequency: NDArray[np.uint16]
    """(T, A): frequency of each symbol; each row sums to 2048."""
    start: NDArray[np.uint16]
    """(T, A): sum of the frequencies of all earlier symbols."""
    half_width: NDArray[np.int16]
    """(T,): the values -half_width..half_width have symbols of their own."""
    table: NDArray[np.uint8]
    """(n,): table of each coded coefficient, in coding order."""
    runs: NDArray[np.int64]
    """(R + 1,): coefficients runs[r] up to runs[r + 1] have the same table."""
    slots: NDArray[np.uint32]
    """(T * 2048 * 2,): per slot, the frequency of its symbol and its offset within the symbol.

    The frequency is 0 for the escape.
    """
    value_at: NDArray[np.int16]
    """(T * 2048,): per slot, the value, or ESCAPE."""
    escape: NDArray[np.uint32]
    """(T,): frequency of the escape."""
    bound: int
    """Upper bound of the bytes per section."""

    def pack(self, values_N: NDArray[np.int16], mu: float, sigma: float) -> bytes:
        """Return the section of one sample: its coefficients (n,) and its two whitening scalars."""
        scalars = np.array([sigma, mu], "<f4").view("<u2")
        words = np.zeros(self.bound // WORD, np.uint16)
        used = _encode(
            values_N, scalars, self.table, self.frequency, self.start, self.half_width, words
        )
        return words[:used].tobytes()

    def unpack(self, sections: Payloads) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """Return coefficients (B, n) and (sigma, mu) pairs (B, 2) of B sections.

        Raises PayloadError, with the index in the batch, if a section is not an encoder's output.
        """
        values = np.empty((len(sections), len(self.table)), np.int16)
        scalars = np.empty((len(sections), 2), np.float32)
        bad = _decode(
            sections.data[: len(sections.data) // WORD * WORD].view(np.uint16),
            sections.starts // WORD,
            sections.sizes // WORD,
            self.slots,
            self.value_at,
            self.escape,
            self.half_width,
            self.runs,
            self.table,
            values,
            scalars.view(np.uint16),
        )
        if bad >= 0:
            raise PayloadError(
                "a section does not decode: its bytes are not the output of an encoder", int(bad)
            )
        return values, scalars


def rans_coder(
    frequency: NDArray[np.uint16],
    half_width: NDArray[np.uint8],
    table: NDArray[np.uint8],
    bound: int,
) -> RansCoder:
    """Lay out probability tables for the kernels.

    `frequency` holds the tables (T, A), `half_width` their half widths (T,), and `table` the number
    of each coefficient's table (n,). `bound` is an upper bound of the bytes per section.
    """
    cumulative = np.cumsum(frequency.astype(np.int64), axis=1)
    start = cumulative - frequency
    half = half_width.astype(np.int64)
    slots = np.zeros((len(half), TABLE_SIZE, 2), np.uint32)
    value_at = np.zeros((len(half), TABLE_SIZE), np.int16)
    for t, h in enumerate(half):
        symbol = np.searchsorted(cumulative[t], np.arange(TABLE_SIZE), side="right")
        escaped = symbol == 2 * h + 1
        slots[t, :, 0] = np.where(escaped, 0, frequency[t, symbol])
        slots[t, :, 1] = np.arange(TABLE_SIZE) - start[t, symbol]
        value_at[t] = np.where(escaped, ESCAPE, symbol - h)
    return RansCoder(
        frequency=frequency,
        start=start.astype(np.uint16),
        half_width=half_width.astype(np.int16),
        table=table,
        runs=_runs(table),
        slots=slots.reshape(-1),
        value_at=value_at.reshape(-1),
        escape=frequency[np.arange(len(half)), 2 * half + 1].astype(np.uint32),
        bound=bound,
    )


def _runs(table: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return where each run of equal values begins, and the number of values."""
    begins = np.flatnonzero(table[1:] != table[:-1]) + 1
    return np.concatenate([np.zeros(min(1, len(table)), np.int64), begins, [len(table)]])


@kernel
def _encode(values, scalars, table, frequency, start, half_width, out):  # type: ignore[no-untyped-def]
    """Write the section into uint16 words; return the number of words used."""
    count = len(values)
    states = LOW + scalars.astype(np.uint64)
    # Encode backwards, so that decoding runs forwards. A coefficient takes at most one word of
    # state and one escape.
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
        states[i % LANES] = (
            ((x // f) << np.uint64(TABLE_BITS)) + x % f + np.uint64(start[t, symbol])
        )
    head = 0
    for lane in range(LANES):
        out[head] = states[lane] & np.uint64(0xFFFF)
        out[head + 1] = states[lane] >> np.uint64(16)
        head += 2
    for k in range(used):
        out[head + k] = words[used - 1 - k]
    return head + used


@kernel
def _decode(  # type: ignore[no-untyped-def]
    words, starts, sizes, slots, value_at, escape, half_width, runs, table, values, scalars
):
    """Decode sections in pairs, whose eight lanes run side by side.

    Returns the index of a bad section, or -1. Words up to SLACK bytes after a section's end may be
    read, but are not used. All indices are unsigned, because numba tests signed indices for
    wrapping.
    """
    out = values.reshape(-1)
    count = uint64(values.shape[1])
    for first in range(0, len(starts), 2):
        second = min(first + 1, len(starts) - 1)
        if min(sizes[first], sizes[second]) < STATE_WORDS:
            return first if sizes[first] < STATE_WORDS else second
        p = uint64(starts[first])
        q = uint64(starts[second])
        end_p = p + uint64(sizes[first])
        end_q = q + uint64(sizes[second])
        at_p = uint64(first) * count
        at_q = uint64(second) * count
        a = _lane(words, p, 0)
        b = _lane(words, p, 1)
        c = _lane(words, p, 2)
        d = _lane(words, p, 3)
        e = _lane(words, q, 0)
        f = _lane(words, q, 1)
        g = _lane(words, q, 2)
        h = _lane(words, q, 3)
        p = p + uint64(STATE_WORDS)
        q = q + uint64(STATE_WORDS)
        for r in range(len(runs) - 1):
            t = uint64(table[runs[r]])
            base = t * uint64(TABLE_SIZE)
            rare = uint64(escape[t])
            half = half_width[t]
            for i in range(uint64(runs[r]), uint64(runs[r + 1])):
                slot = base + (a & SLOT_MASK)
                offset = uint64(slots[slot + slot + uint64(1)])
                x = uint64(slots[slot + slot]) * (a >> SLOT_BITS) + offset
                value = value_at[slot]
                if x < LOW:
                    x, value, p = _refill(
                        a, x, value, words[p], words[p + uint64(1)], p, end_p, offset, rare, half
                    )
                out[at_p + i] = value
                a = b
                b = c
                c = d
                d = x

                slot = base + (e & SLOT_MASK)
                offset = uint64(slots[slot + slot + uint64(1)])
                x = uint64(slots[slot + slot]) * (e >> SLOT_BITS) + offset
                value = value_at[slot]
                if x < LOW:
                    x, value, q = _refill(
                        e, x, value, words[q], words[q + uint64(1)], q, end_q, offset, rare, half
                    )
                out[at_q + i] = value
                e = f
                f = g
                g = h
                h = x
        # The decoder must end in a state in which an encoder begins. Otherwise the section is
        # damaged, although its checksum is right.
        if p > end_p or not _keep_scalars(scalars, first, count, a, b, c, d):
            return first
        if q > end_q or not _keep_scalars(scalars, second, count, e, f, g, h):
            return second
    return -1


@kernel
def _keep_scalars(scalars, row, count, a, b, c, d):  # type: ignore[no-untyped-def]
    """Keep the low 16 bits of the last states; return whether an encoder can begin with them.

    `a` is the state of lane `count` mod 4, and the next lanes follow.
    """
    for k, state in enumerate((a, b, c, d)):
        scalars[row, (count + uint64(k)) % uint64(LANES)] = state & uint64(0xFFFF)
    return (
        (a >> uint64(16)) == 1
        and (b >> uint64(16)) == 1
        and (c >> uint64(16)) == 1
        and (d >> uint64(16)) == 1
    )


@kernel
def _lane(words, at, lane):  # type: ignore[no-untyped-def]
    """Return a lane's first state, from two words at `at`."""
    low = at + uint64(2 * lane)
    return uint64(words[low]) | uint64(words[low + uint64(1)]) << uint64(16)


@kernel
def _refill(  # type: ignore[no-untyped-def]
    state, x, value, word, after, at, end, offset, rare, half
):
    """Finish a coefficient that is an escape, or whose state needs a word (few do).

    Returns state, value and position. Position end + 1 marks a section that is not an encoder's
    output.
    """
    if value == ESCAPE:
        x = rare * (state >> SLOT_BITS) + offset
    if x < LOW:
        x = x << uint64(16) | uint64(word)
        word = after
        at += uint64(1)
    if value == ESCAPE:
        value = int16(word)
        at += uint64(1)
        if abs(int32(value)) <= half:
            at = end + uint64(1)
    return x, value, min(at, end + uint64(1))
