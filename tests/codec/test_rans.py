"""The entropy coder agrees with a reference decoder and detects damaged payloads."""

import math
from dataclasses import replace

import numpy as np
import pytest
from codec.codec_samples import coded_tables, draw_values, random_fit, reference_decode

from dtcache.codec import FittedTap
from dtcache.errors import PayloadError
from dtcache.payloads import Payloads, pack


def padded(*payloads: bytes, length: int) -> Payloads:
    """Return payloads padded with zeros to one length, as the store does for general frames."""
    return pack([p.ljust(length, b"\0") for p in payloads])


def encoded(fitted: FittedTap, values: np.ndarray, mu: float = -0.5, sigma: float = 1.25) -> bytes:
    """Encode one sample within the fit's bound."""
    return fitted.section_coder().pack(values, mu, sigma)


@pytest.mark.parametrize("count", [*range(10), 63, 500])
def test_round_trip_on_random_tables(count: int) -> None:
    """Any number of coefficients, escapes included, round-trips with exact scalars in a batch."""
    for seed in range(6):
        fitted = random_fit(count, seed)
        values = np.stack([draw_values(fitted, 100 * seed + i) for i in range(3)]).reshape(3, count)
        payloads = [encoded(fitted, v, mu=0.1 * i, sigma=3.7) for i, v in enumerate(values)]
        for served in (pack(payloads), padded(*payloads, length=fitted.section_bound)):
            found, scalars = fitted.section_coder().unpack(served)
            np.testing.assert_array_equal(found, values)
            np.testing.assert_array_equal(
                scalars, np.array([[3.7, 0.0], [3.7, 0.1], [3.7, 0.2]], np.float32)
            )


@pytest.mark.parametrize("count", [*range(10), 200])
def test_reference_decoder_reads_the_same(count: int) -> None:
    """A reference decoder in Python integers reads what the numba encoder wrote."""
    for seed in range(4):
        fitted = random_fit(count, 50 + seed)
        values = draw_values(fitted, seed)
        found, sigma, mu = reference_decode(encoded(fitted, values), fitted)
        assert found == values.tolist()
        assert (sigma, mu) == (1.25, -0.5)


@pytest.mark.parametrize("max_half", [1, 127])
@pytest.mark.parametrize("count", [0, 1, 5, 400, 5000])
def test_extremes_stay_within_the_bound(count: int, max_half: int) -> None:
    """Payloads of the costliest symbols or of +-32767 round-trip and stay within section_bound."""
    fitted = random_fit(count, 3 * count + max_half, tables=2, max_half=max_half)
    coder = fitted.section_coder()
    roomy = replace(coder, bound=4 * fitted.section_bound)
    table = coded_tables(fitted)
    half = fitted.half_width[table].astype(np.int64)
    rarest = (
        np.array(
            [fitted.tables[t, : 2 * int(fitted.half_width[t]) + 1].argmin() for t in table],
            np.int64,
        )
        - half
    )
    cases = [
        np.full(count, 32767),
        np.full(count, -32767),
        half,
        -half,
        half + 1,
        -half - 1,
        rarest,
    ]
    for case in cases:
        values = case.astype(np.int16)
        payload = roomy.pack(values, 0.0, 1.0)
        assert len(payload) <= fitted.section_bound
        assert encoded(fitted, values, 0.0, 1.0) == payload
        found, _ = coder.unpack(padded(payload, length=fitted.section_bound))
        np.testing.assert_array_equal(found[0], values)


def test_bound_is_whole_aligned_words() -> None:
    """section_bound is a multiple of 16 that depends only on the number of live coefficients."""
    for count in range(40):
        fitted = random_fit(count, count)
        assert fitted.section_bound % 16 == 0
        assert 0 <= fitted.section_bound - (32 + 2 * count + 11 * count / 8) < 17


@pytest.mark.parametrize("count", [0, 7, 300, 4000])
def test_size_is_the_cross_entropy(count: int) -> None:
    """Without header and escapes, a payload is within 2 % + 16 bytes of the cross-entropy."""
    for seed in range(3):
        fitted = random_fit(count, 7 + seed)
        values = draw_values(fitted, seed)
        bits = 0.0
        escapes = 0
        for value, t in zip(values.tolist(), coded_tables(fitted), strict=True):
            half = int(fitted.half_width[t])
            symbol = value + half if abs(value) <= half else 2 * half + 1
            escapes += symbol == 2 * half + 1
            bits += math.log2(2048 / int(fitted.tables[t, symbol]))
        coded = len(encoded(fitted, values)) - 2 * escapes
        assert bits / 8 <= coded + 1 <= 1.02 * bits / 8 + 17


def test_flipped_bits_rarely_decode() -> None:
    """A flipped bit raises PayloadError in over 94 % of the cases.

    The other flips change scalars or values and end in states that an encoder can begin with. Only
    the tag of the payload finds them.
    """
    flips = 0
    missed = 0
    for seed in range(8):
        fitted = random_fit(150, 900 + seed)
        values = draw_values(fitted, seed, escape_values=False)
        coder = fitted.section_coder()
        section = encoded(fitted, values)
        for bit in range(8 * len(section)):
            damaged = bytearray(section)
            damaged[bit // 8] ^= 1 << bit % 8
            flips += 1
            try:
                found, _ = coder.unpack(padded(bytes(damaged), length=fitted.section_bound))
            except PayloadError:
                continue
            missed += 1
            assert found.shape == (1, 150)
    assert flips > 3000
    assert missed / flips < 0.06


def test_flipped_escapes_are_not_the_coders_to_find() -> None:
    """A flipped bit of an escape decodes to another number; only the tag detects it."""
    fitted = random_fit(40, 5)
    values = draw_values(fitted, 1, escape_values=False)
    values[30] = 0x5A5A
    section = bytearray(encoded(fitted, values))
    section[section.index(b"\x5a\x5a")] ^= 1
    found, _ = fitted.section_coder().unpack(padded(bytes(section), length=fitted.section_bound))
    assert np.flatnonzero(found[0] != values).tolist() == [30]
    assert found[0, 30] == 0x5A5B


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 50])
def test_any_scalars_come_back_bit_by_bit(count: int) -> None:
    """The lane states carry every float32, whatever the number of coefficients."""
    fitted = random_fit(count, count)
    values = draw_values(fitted, 3)
    for sigma, mu in ((1e-3, 0.0), (3.4e38, -3.4e38), (1.1754944e-38, -0.0), (1.25, 65504.1)):
        found, scalars = fitted.section_coder().unpack(pack([encoded(fitted, values, mu, sigma)]))
        np.testing.assert_array_equal(found[0], values)
        wanted = np.array([sigma, mu], np.float32)
        assert scalars[0].tobytes() == wanted.tobytes()


def test_truncated_payloads_raise() -> None:
    """A payload cut anywhere past its header, zero-padded or not, raises CodecError."""
    for seed in range(4):
        fitted = random_fit(60, 300 + seed)
        coder = fitted.section_coder()
        payload = encoded(fitted, draw_values(fitted, seed))
        for size in range(16, len(payload) - 1, 2):
            if not any(payload[size:]):
                continue
            with pytest.raises(PayloadError, match=r"a section does not decode") as caught:
                coder.unpack(padded(payload[:size], length=size))
            assert caught.value.index == 0
            with pytest.raises(PayloadError, match=r"a section does not decode") as caught:
                coder.unpack(padded(payload[:size], length=fitted.section_bound))
            assert caught.value.index == 0


@pytest.mark.parametrize("count", [0, 1, 4, 100])
def test_all_zero_payload_raises(count: int) -> None:
    """An all-zero payload raises with its position in the batch and never decodes to features."""
    fitted = random_fit(count, count)
    good = encoded(fitted, draw_values(fitted, 0))
    with pytest.raises(
        PayloadError,
        match=r"a section does not decode: its bytes are not the output of an encoder",
    ) as caught:
        fitted.section_coder().unpack(padded(good, b"", good, length=fitted.section_bound))
    assert caught.value.index == 1


def test_any_number_of_escapes_round_trips() -> None:
    """A sample of escapes only, more than 16 bits can count, round-trips."""
    fitted = random_fit(70_000, 2)
    values = np.where(np.arange(70_000) % 2, 30_000, -30_000).astype(np.int16)
    rows = padded(encoded(fitted, values), length=fitted.section_bound)
    np.testing.assert_array_equal(fitted.section_coder().unpack(rows)[0][0], values)


def test_payloads_too_short_for_the_states_are_refused() -> None:
    """A section under 16 bytes is refused with its batch position before a word is read."""
    fitted = random_fit(3, 0)
    good = encoded(fitted, draw_values(fitted, 0))
    for size in (0, 2, 14):
        with pytest.raises(PayloadError, match=r"a section does not decode") as caught:
            fitted.section_coder().unpack(pack([good, good, good[:size], good]))
        assert caught.value.index == 2


def test_an_empty_batch_decodes_to_nothing() -> None:
    """An empty batch decodes to no coefficients."""
    found, scalars = random_fit(3, 0).section_coder().unpack(pack([]))
    assert (found.shape, scalars.shape) == ((0, 3), (0, 2))


@pytest.mark.parametrize("wrong", range(5))
def test_the_bad_one_of_a_batch_is_named(wrong: int) -> None:
    """The error has the batch position of the damaged payload, also when two decode together."""
    fitted = random_fit(80, 4)
    payloads = [encoded(fitted, draw_values(fitted, i, escape_values=False)) for i in range(5)]
    payloads[wrong] = payloads[wrong][:-2]
    with pytest.raises(PayloadError, match=r"a section does not decode") as caught:
        fitted.section_coder().unpack(pack(payloads))
    assert caught.value.index == wrong


def test_random_bytes_never_decode() -> None:
    """Random bytes in place of a payload raise CodecError."""
    fitted = random_fit(100, 1)
    noise = np.random.default_rng(0).integers(0, 256, (200, fitted.section_bound), np.uint8)
    for row in noise:
        with pytest.raises(PayloadError, match="does not decode"):
            fitted.section_coder().unpack(pack([row.tobytes()]))


def test_a_tap_without_live_coefficients_round_trips() -> None:
    """If the step drops every band, a payload consists of its scalars alone and round-trips."""
    fitted = FittedTap(
        basis=np.zeros((3, 0), np.float16),
        mean=np.zeros(3, np.float16),
        classes=np.zeros((0, 4, 4), np.uint8),
        class_step=np.zeros(0, np.float32),
        class_gain=np.zeros(0, np.float32),
        class_table=np.zeros(0, np.uint8),
        tables=np.zeros((0, 2), np.uint16),
        half_width=np.zeros(0, np.uint8),
    )
    payload = encoded(fitted, np.zeros(0, np.int16))
    found, scalars = fitted.section_coder().unpack(padded(payload, length=fitted.section_bound))
    assert found.shape == (1, 0)
    assert scalars.tolist() == [[1.25, -0.5]]
