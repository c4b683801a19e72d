"""Other codecs for features: lossless fp16, BitRound, int8, fp8 and pcodec, each at many settings.

A codec gets the whitened fp16 features (n, C, H, W) of one chunk. Only its own output counts: no
checksum, no index, no whitening scalars.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import blosc2
import numpy as np
import torch
from numcodecs import BitRound
from numcodecs.zstd import compress
from pcodec import ChunkConfig, standalone

from pipelines.terminal.progress import track

ZSTD_LEVEL = 3
CHUNK_IMAGES = (1, 64)
"""Images per chunk."""

Coded = tuple[int, np.ndarray]
"""The number of bytes of the code, and the decoded features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A codec and its settings, from fine to coarse. A lossless codec has one unused setting."""

    name: str
    code: Callable[[np.ndarray, float], Coded]
    settings: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The distortion and size of a codec at one setting."""

    setting: float
    distortion: float
    """D, as rate_distortion.py defines it."""
    bytes_per_image: float


def _bitshuffled(x: np.ndarray) -> int:
    """Return the size of Blosc2's output: bitshuffle by the width of the dtype, then zstd."""
    return len(
        blosc2.compress2(
            np.ascontiguousarray(x),
            codec=blosc2.Codec.ZSTD,
            clevel=5,
            filters=[blosc2.Filter.BITSHUFFLE],
            filters_meta=[0],
            typesize=x.itemsize,
            nthreads=1,
        )
    )


def _zstd(x: np.ndarray) -> int:
    return len(compress(np.ascontiguousarray(x).tobytes(), ZSTD_LEVEL))


def _int8(x: np.ndarray, factor: float) -> Coded:
    """Divide by an fp16 scale per channel and chunk: absolute maximum / 127, times `factor`."""
    scale = np.abs(x.astype(np.float32)).max((0, 2, 3), keepdims=True) / 127 * factor
    scale = np.maximum(scale.astype(np.float16), np.float16(1e-6)).astype(np.float32)
    q = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    return _zstd(q) + 2 * x.shape[1], q * scale


def _fp8(x: np.ndarray, divisor: float) -> Coded:
    """Round x / divisor to e4m3; a large divisor makes small values subnormal."""
    scaled = (
        torch.from_numpy(x.astype(np.float32)).div(divisor).clamp(-448, 448).to(torch.float8_e4m3fn)
    )
    return _zstd(scaled.view(torch.uint8).numpy()), scaled.float().mul(divisor).numpy()


def _bitround(x: np.ndarray, keepbits: float) -> Coded:
    codec = BitRound(int(keepbits))
    rounded = codec.decode(codec.encode(x)).reshape(x.shape)
    return _bitshuffled(rounded), rounded


def _pcodec(x: np.ndarray, step: float) -> Coded:
    """Round to multiples of the step and compress the integers with pcodec."""
    q = np.rint(x / np.float32(step)).astype(np.int16)
    return len(standalone.simple_compress(q.reshape(-1), ChunkConfig())), q * np.float32(step)


def _pcodec_lossless(x: np.ndarray, _: float) -> Coded:
    return len(standalone.simple_compress(x.reshape(-1), ChunkConfig())), x


PEERS = (
    Peer(name="fp16 + zstd, lossless", code=lambda x, _: (_zstd(x), x), settings=(0.0,)),
    Peer(
        name="fp16 + blosc2 bitshuffle zstd, lossless",
        code=lambda x, _: (_bitshuffled(x), x),
        settings=(0.0,),
    ),
    Peer(name="pcodec, lossless", code=_pcodec_lossless, settings=(0.0,)),
    Peer(
        name="int8 per channel + zstd",
        code=_int8,
        settings=(1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0),
    ),
    Peer(name="fp8 e4m3 + zstd", code=_fp8, settings=tuple(2.0**k for k in (0, 4, 5, 6, 7, 8, 9))),
    Peer(name="BitRound + bitshuffle zstd", code=_bitround, settings=(6, 5, 4, 3, 2, 1, 0)),
    Peer(name="step + pcodec", code=_pcodec, settings=(0.06, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0)),
)


def peer_curves(maps: Mapping[str, np.ndarray], energy: float) -> dict[str, dict[int, list[Point]]]:
    """Return one point per setting, by the peer's name and the images per chunk.

    `maps` are (M, C, H, W). `energy` is per image, the denominator of D.
    """
    count = len(next(iter(maps.values())))
    curves: dict[str, dict[int, list[Point]]] = {}
    with track("peers", sum(len(p.settings) for p in PEERS) * len(CHUNK_IMAGES)) as progress:
        for peer in PEERS:
            for size in CHUNK_IMAGES:
                for setting in peer.settings:
                    total = 0
                    error = 0.0
                    for chunk in _chunks(maps, size):
                        num_bytes, decoded = peer.code(chunk, setting)
                        total += num_bytes
                        error += float(
                            np.square(chunk - decoded, dtype=np.float32).sum(dtype=np.float64)
                        )
                    point = Point(
                        setting=setting,
                        distortion=error / count / energy,
                        bytes_per_image=total / count,
                    )
                    curves.setdefault(peer.name, {}).setdefault(size, []).append(point)
                    progress.advance(1, f"{peer.name}, {size} per chunk")
    return curves


def _chunks(maps: Mapping[str, np.ndarray], size: int) -> Iterator[np.ndarray]:
    for values in maps.values():
        for start in range(0, len(values), size):
            yield np.ascontiguousarray(values[start : start + size])


def bytes_at(points: list[Point], distortion: float) -> float | None:
    """Return the fewest bytes per image with at most this distortion.

    The bytes are interpolated between two settings on a log-log scale. If the distortion of all
    settings is lower, the result is the fewest bytes of any setting. If the distortion of all
    settings is higher, the result is None.
    """
    ordered = sorted(points, key=lambda p: p.distortion)
    sizes = [p.bytes_per_image for p in ordered if p.distortion <= distortion]
    if not sizes:
        return None
    if len(sizes) == len(ordered):
        return min(sizes)
    below = ordered[len(sizes) - 1]
    above = ordered[len(sizes)]
    if below.distortion <= 0:
        return min(sizes)
    share = np.log(distortion / below.distortion) / np.log(above.distortion / below.distortion)
    interpolated = below.bytes_per_image * (above.bytes_per_image / below.bytes_per_image) ** share
    return min(*sizes, float(interpolated))


def bytes_near(points: list[Point], distortion: float) -> float:
    """Return the bytes per image at a distortion.

    They lie on the log-log line through the two points with the nearest distortions.
    """
    a, b = sorted(points, key=lambda p: abs(np.log(p.distortion / distortion)))[:2]
    slope = np.log(b.bytes_per_image / a.bytes_per_image) / np.log(b.distortion / a.distortion)
    return float(a.bytes_per_image * (distortion / a.distortion) ** slope)
