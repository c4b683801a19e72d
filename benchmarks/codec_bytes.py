"""Count the bytes that a cache needs per image with dtcache's codec, at given distortions."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from features import Maps
from peers import Point

from dtcache.codec import FeatureEncoder, FittedTap
from dtcache.codec.fit import TapStatistics, quantised_fit
from dtcache.codec.pca_dct import Encoder
from dtcache.store.shard import build_shard
from dtcache.store.zarr_nodes import write_zarr_nodes
from pipelines.size_estimate import ROW_BYTES
from pipelines.terminal.progress import track

AMORTISED_IMAGES = 10_000
"""The bytes of the fit's files are divided by this number of images."""
SOLVER_IMAGES = 128
"""Images that the search for a quantisation step encodes."""
SHARD_ROWS = 256
COUNTED_BYTES = (
    "dtcache: shards as the store writes them (payloads, zstd frames, checksums, indices) with one "
    f"payload per chunk, plus {ROW_BYTES} bytes per row of the sample index, plus the fit's files "
    f"divided by {AMORTISED_IMAGES} images of one view. Peers: only their own output, with one or "
    "64 images per chunk, whichever is smaller. Bound: without side information."
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
    """Bytes of payloads per image, without padding."""
    fit_bytes: int
    """Bytes of the fit's files."""
    taps: dict[str, dict[str, float]]
    """Per tap: stored bytes per image without the fit, distortion, number of coded coefficients."""


def measure_codec(
    fit: Mapping[str, FittedTap], step: float, maps: Maps, energy: float
) -> CodecSize:
    """Encode all images as an extraction does, build their shards, and count the bytes."""
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    count = len(next(iter(maps.values())))
    taps: dict[str, dict[str, float]] = {}
    payload_bytes = 0
    error = 0.0
    with track(f"count bytes at step {step:.2f}", count * len(maps)) as progress:
        for name, values in maps.items():
            shard_bytes = 0
            tap_error = 0.0
            tap_energy = 0.0
            for start in range(0, count, SHARD_ROWS):
                x_BCHW = torch.from_numpy(values[start : start + SHARD_ROWS].astype(np.float32))
                encoded = encoder.encode(name, x_BCHW)
                payloads = [view.payload for view in encoded]
                shard_bytes += len(build_shard(payloads, fit[name].payload_bound, len(x_BCHW)))
                payload_bytes += sum(map(len, payloads))
                tap_error += sum(view.squared_error for view in encoded)
                tap_energy += sum(view.energy for view in encoded)
                progress.advance(len(x_BCHW), name)
            error += tap_error
            taps[name] = {
                "bytes": shard_bytes / count,
                "distortion": tap_error / tap_energy,
                "coefficients": len(fit[name].live),
            }
    fit_bytes = size_of_fit(fit)
    total = sum(tap["bytes"] for tap in taps.values()) + fit_bytes / AMORTISED_IMAGES + ROW_BYTES
    return CodecSize(
        point=Point(setting=step, distortion=error / count / energy, bytes_per_image=total),
        payload_bytes=payload_bytes / count,
        fit_bytes=fit_bytes,
        taps=taps,
    )


def size_of_fit(fit: Mapping[str, FittedTap]) -> int:
    """Return the bytes of all files that the store writes for a fit."""
    with tempfile.TemporaryDirectory() as folder:
        write_zarr_nodes(
            Path(folder) / "data.zarr", {}, {name: tap.arrays() for name, tap in fit.items()}
        )
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def stored_bytes(fit: Mapping[str, FittedTap], maps: Maps) -> float:
    """Return the bytes per image of a cache with this fit."""
    return measure_codec(fit, 0.0, maps, 1.0).point.bytes_per_image


def first_images(maps: Maps, count: int) -> Maps:
    """Return the features of the first `count` images."""
    return {name: values[:count] for name, values in maps.items()}
