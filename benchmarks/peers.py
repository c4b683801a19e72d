"""Peers of the codec: general-purpose compressors over fp16, BitRound, int8, fp8 and pcodec, each
over the range of its setting.

A peer gets whitened fp16 features (n, C, H, W) of one chunk. Nothing but its own output is counted
for it: no checksum, no index, no whitening scalars.
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

LEVEL = 3
"""Of zstd."""
CHUNKS = (1, 64)
"""Images per chunk."""

Coded = tuple[int, np.ndarray]
"""Bytes, and the decoded features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A compressor with one knob, from fine to coarse; a lossless one has a single setting."""

    name: str
    code: Callable[[np.ndarray, float], Coded]
    knobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Where a codec is at one setting."""

    setting: float
    distortion: float
    """D, as rate_distortion.py defines it."""
    bytes_per_image: float


def _bitshuffled(x: np.ndarray) -> int:
    """Return the bytes of Blosc2's bitshuffle and zstd, the widths of its own items."""
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
    return len(compress(np.ascontiguousarray(x).tobytes(), LEVEL))


def _int8(x: np.ndarray, coarser: float) -> Coded:
    """One absolute-maximum scale per channel and chunk, fp16, times the setting."""
    scale = np.abs(x.astype(np.float32)).max((0, 2, 3), keepdims=True) / 127 * coarser
    scale = np.maximum(scale.astype(np.float16), np.float16(1e-6)).astype(np.float32)
    q = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    return _zstd(q) + 2 * x.shape[1], q * scale


def _fp8(x: np.ndarray, coarser: float) -> Coded:
    """e4m3; dividing by the knob pushes small values into its subnormals."""
    scaled = (
        torch.from_numpy(x.astype(np.float32)).div(coarser).clamp(-448, 448).to(torch.float8_e4m3fn)
    )
    return _zstd(scaled.view(torch.uint8).numpy()), scaled.float().mul(coarser).numpy()


def _bitround(x: np.ndarray, keepbits: float) -> Coded:
    codec = BitRound(int(keepbits))
    rounded = codec.decode(codec.encode(x)).reshape(x.shape)
    return _bitshuffled(rounded), rounded


def _pcodec(x: np.ndarray, step: float) -> Coded:
    """Round to multiples of one step; pcodec codes the integers."""
    q = np.rint(x / np.float32(step)).astype(np.int16)
    return len(standalone.simple_compress(q.reshape(-1), ChunkConfig())), q * np.float32(step)


def _pcodec_lossless(x: np.ndarray, _: float) -> Coded:
    return len(standalone.simple_compress(x.reshape(-1), ChunkConfig())), x


PEERS = (
    Peer(name="fp16 + zstd, lossless", code=lambda x, _: (_zstd(x), x), knobs=(0.0,)),
    Peer(
        name="fp16 + blosc2 bitshuffle zstd, lossless",
        code=lambda x, _: (_bitshuffled(x), x),
        knobs=(0.0,),
    ),
    Peer(name="pcodec, lossless", code=_pcodec_lossless, knobs=(0.0,)),
    Peer(
        name="int8 a channel + zstd",
        code=_int8,
        knobs=(1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0),
    ),
    Peer(name="fp8 e4m3 + zstd", code=_fp8, knobs=tuple(2.0**k for k in (0, 4, 5, 6, 7, 8, 9))),
    Peer(name="BitRound + bitshuffle zstd", code=_bitround, knobs=(6, 5, 4, 3, 2, 1, 0)),
    Peer(name="step + pcodec", code=_pcodec, knobs=(0.06, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0)),
)


def peer_curves(maps: Mapping[str, np.ndarray], energy: float) -> dict[str, dict[int, list[Point]]]:
    """Return one point per setting, by peer and images per chunk.

    `energy` is per image, the denominator of D.
    """
    count = len(next(iter(maps.values())))
    curves: dict[str, dict[int, list[Point]]] = {}
    with track("peers", sum(len(p.knobs) for p in PEERS) * len(CHUNKS)) as progress:
        for peer in PEERS:
            for size in CHUNKS:
                for knob in peer.knobs:
                    total = 0
                    error = 0.0
                    for chunk in _chunks(maps, size):
                        coded, decoded = peer.code(chunk, knob)
                        total += coded
                        error += float(
                            np.square(chunk - decoded, dtype=np.float32).sum(dtype=np.float64)
                        )
                    point = Point(
                        setting=knob,
                        distortion=error / count / energy,
                        bytes_per_image=total / count,
                    )
                    curves.setdefault(peer.name, {}).setdefault(size, []).append(point)
                    progress.advance(1, f"{peer.name}, {size} a chunk")
    return curves


def _chunks(maps: Mapping[str, np.ndarray], size: int) -> Iterator[np.ndarray]:
    for values in maps.values():
        for start in range(0, len(values), size):
            yield np.ascontiguousarray(values[start : start + size])


def bytes_at(points: list[Point], distortion: float) -> float | None:
    """Return the bytes at a distortion, or the least bytes at a smaller one where a codec cannot do
    as badly.

    Between two settings it is interpolated, logarithm over logarithm; None where even the finest
    setting is worse.
    """
    ordered = sorted(points, key=lambda p: p.distortion)
    better = [p.bytes_per_image for p in ordered if p.distortion <= distortion]
    if not better:
        return None
    if len(better) == len(ordered):
        return min(better)
    below = ordered[len(better) - 1]
    above = ordered[len(better)]
    if below.distortion <= 0:
        return min(better)
    share = np.log(distortion / below.distortion) / np.log(above.distortion / below.distortion)
    between = below.bytes_per_image * (above.bytes_per_image / below.bytes_per_image) ** share
    return min(*better, float(between))


def bytes_near(points: list[Point], distortion: float) -> float:
    """Return the bytes on the line, logarithm over logarithm, through the two settings nearest to a
    distortion.
    """
    a, b = sorted(points, key=lambda p: abs(np.log(p.distortion / distortion)))[:2]
    slope = np.log(b.bytes_per_image / a.bytes_per_image) / np.log(b.distortion / a.distortion)
    return float(a.bytes_per_image * (distortion / a.distortion) ** slope)
