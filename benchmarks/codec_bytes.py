"""Count the bytes that a cache needs per image with dtcache's codec, at given distortions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from features import Maps
from peers import Point

from dtcache.codec import FeatureEncoder, FittedTap, sections_of
from dtcache.codec.fit import TapStatistics, quantised_fit
from dtcache.codec.pca_dct import Encoder
from dtcache.store.codec_file import codec_bytes
from dtcache.store.layout import PayloadArray, padded_length
from dtcache.store.shard import build_shard
from dtcache.store.tag import TAG_BYTES
from pipelines.size_estimate import ROW_BYTES
from pipelines.terminal.progress import track

AMORTISED_IMAGES = 10_000
"""The bytes of the fit's files are divided by this number of images."""
SOLVER_IMAGES = 128
"""Images that the search for a quantisation step encodes."""
SHARD_ROWS = 256
COUNTED_BYTES = (
    "dtcache: shards as the store writes them (payloads, zstd frames, checksums, indices) with one "
    f"payload of all taps per chunk, plus {ROW_BYTES} bytes per row of the sample index, plus the "
    f"fit's files divided by {AMORTISED_IMAGES} images of one view. Peers: only their own output, "
    "with one or 64 images per chunk, whichever is smaller. Bound: without side information."
)


def fits_at_distortions(
    statistics: Mapping[str, TapStatistics], maps: Maps, energy: float, distortions: Sequence[float]
) -> Iterator[tuple[float, dict[str, FittedTap]]]:
    """Yield a quantisation step and its fit for each target distortion.

    The step is the same for all coefficients of all taps. A search of at most six steps brings the
    distortion of SOLVER_IMAGES images within 2 % of the target. `energy` is per image, the
    denominator of D.
    """
    solver_maps = first_images(maps, SOLVER_IMAGES)
    count = len(next(iter(solver_maps.values())))
    step = 1.0
    for target in distortions:
        for _ in range(6):
            fit = {name: quantised_fit(s, step, "distortion") for name, s in statistics.items()}
            error = sum(
                float(Encoder(fit[name])(torch.from_numpy(x.astype(np.float32)))[1].sum())
                for name, x in solver_maps.items()
            )
            distortion = error / count / energy
            if abs(distortion / target - 1) < 0.02:
                break
            step *= (target / distortion) ** 0.6
        yield step, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSize:
    """The bytes and distortion of dtcache's codec at one quantisation step, over all images."""

    point: Point
    payload_bytes: float
    """Bytes of payloads per image, with their tags, without padding."""
    fit_bytes: int
    """Bytes of the fit's files."""
    taps: dict[str, dict[str, float]]
    """Per tap: bytes of sections per image, distortion, number of coded coefficients."""


def measure_codec(
    fit: Mapping[str, FittedTap], step: float, maps: Maps, energy: float
) -> CodecSize:
    """Encode all images as an extraction does, build their shards, and count the bytes."""
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    count = len(next(iter(maps.values())))
    sizes = dict.fromkeys(maps, 0)
    errors = dict.fromkeys(maps, 0.0)
    energies = dict.fromkeys(maps, 0.0)
    [(name_of_array, sections)] = sections_of(fit).items()
    payload_bytes = 0
    shard_bytes = 0
    with track(f"count bytes at step {step:.2f}", count) as progress:
        for start in range(0, count, SHARD_ROWS):
            views = {
                name: encoder.encode(
                    name, torch.from_numpy(x[start : start + SHARD_ROWS].astype(np.float32))
                )
                for name, x in maps.items()
            }
            for name, encoded in views.items():
                sizes[name] += sum(len(view.section) for view in encoded)
                errors[name] += sum(view.squared_error for view in encoded)
                energies[name] += sum(view.energy for view in encoded)
            [payloads] = encoder.payloads(views).values()
            array = PayloadArray(
                name=name_of_array,
                fingerprint="0" * 64,
                shape=(len(payloads), 1, padded_length(sections.bound)),
                shard_rows=len(payloads),
            )
            shard_bytes += len(build_shard(array, 0, payloads))
            payload_bytes += sum(map(len, payloads)) + TAG_BYTES * len(payloads)
            progress.advance(len(payloads))
    taps: dict[str, dict[str, float]] = {
        name: {
            "bytes": sizes[name] / count,
            "distortion": errors[name] / energies[name],
            "coefficients": len(fit[name].live),
        }
        for name in maps
    }
    error = sum(errors.values())
    fit_bytes = size_of_fit(fit)
    total = shard_bytes / count + fit_bytes / AMORTISED_IMAGES + ROW_BYTES
    return CodecSize(
        point=Point(setting=step, distortion=error / count / energy, bytes_per_image=total),
        payload_bytes=payload_bytes / count,
        fit_bytes=fit_bytes,
        taps=taps,
    )


def size_of_fit(fit: Mapping[str, FittedTap]) -> int:
    """Return the bytes of the file that the store writes for a fit."""
    return len(codec_bytes({name: tap.arrays() for name, tap in fit.items()}))


def stored_bytes(fit: Mapping[str, FittedTap], maps: Maps) -> float:
    """Return the bytes per image of a cache with this fit."""
    return measure_codec(fit, 0.0, maps, 1.0).point.bytes_per_image


def first_images(maps: Maps, count: int) -> Maps:
    """Return the features of the first `count` images."""
    return {name: values[:count] for name, values in maps.items()}
