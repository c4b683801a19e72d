"""The codec: find steps that reach given distortions, and count every image's bytes on disk."""

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

AMORTISED = 10_000
"""Images that share the fit's own bytes, and the shards' metadata."""
SOLVED = 128
SHARD = 256
COUNTED = (
    "dtcache: shards as the store writes them (payloads, zstd frames, checksums, indices) with one "
    f"payload per chunk, plus {ROW_BYTES} bytes per row of the sample index, plus the fit's files "
    f"divided by {AMORTISED} images of one view. Peers: only their own output, with one or 64 "
    f"images "
    "per chunk, whichever is smaller. Bound: without side information."
)


def flat_fits(
    statistics: Mapping[str, TapStatistics], maps: Maps, energy: float, distortions: Sequence[float]
) -> Iterator[tuple[float, dict[str, FittedTap]]]:
    """Yield steps and fits whose distortions, on some of the images, are within 2 % of those asked
    for.
    """
    some = leading(maps, SOLVED)
    count = len(next(iter(some.values())))
    step = 1.0
    for wanted in distortions:
        for _ in range(6):
            fit = {name: quantised_fit(s, step, "distortion") for name, s in statistics.items()}
            error = sum(
                float(Encoder(fit[name])(torch.from_numpy(x.astype(np.float32)))[1].sum())
                for name, x in some.items()
            )
            met = error / count / energy
            if abs(met / wanted - 1) < 0.02:
                break
            step *= (wanted / met) ** 0.6
        yield step, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """The codec at one step, counted over all images."""

    point: Point
    payload_bytes: float
    """Bytes of payloads per image, without padding."""
    fit_bytes: int
    """The fit's arrays on disk."""
    taps: dict[str, dict[str, float]]
    """By array: stored bytes per image without the fit, distortion of this tap, coded
    coefficients.
    """


def count_ours(fit: Mapping[str, FittedTap], step: float, maps: Maps, energy: float) -> Counted:
    """Encode every image as an extraction does and build its shards."""
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    count = len(next(iter(maps.values())))
    taps: dict[str, dict[str, float]] = {}
    payload_bytes = 0
    error = 0.0
    with track(f"count at step {step:.2f}", count * len(maps)) as progress:
        for name, values in maps.items():
            stored = 0
            tap_error = 0.0
            tap_energy = 0.0
            for start in range(0, count, SHARD):
                x_BCHW = torch.from_numpy(values[start : start + SHARD].astype(np.float32))
                coded = encoder.encode(name, x_BCHW)
                payloads = [view.payload for view in coded]
                stored += len(build_shard(payloads, fit[name].payload_bound, len(x_BCHW)))
                payload_bytes += sum(map(len, payloads))
                tap_error += sum(view.squared_error for view in coded)
                tap_energy += sum(view.energy for view in coded)
                progress.advance(len(x_BCHW), name)
            error += tap_error
            live = len(fit[name].live)
            taps[name] = {
                "bytes": stored / count,
                "distortion": tap_error / tap_energy,
                "coefficients": live,
            }
    side = fit_bytes(fit)
    total = sum(tap["bytes"] for tap in taps.values()) + side / AMORTISED + ROW_BYTES
    return Counted(
        point=Point(setting=step, distortion=error / count / energy, bytes_per_image=total),
        payload_bytes=payload_bytes / count,
        fit_bytes=side,
        taps=taps,
    )


def fit_bytes(fit: Mapping[str, FittedTap]) -> int:
    """Return the size of all files that the store keeps of a fit."""
    with tempfile.TemporaryDirectory() as folder:
        write_zarr_nodes(
            Path(folder) / "data.zarr", {}, {name: tap.arrays() for name, tap in fit.items()}
        )
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def stored_bytes(fit: Mapping[str, FittedTap], maps: Maps) -> float:
    """Return the bytes of a fit, per image."""
    return count_ours(fit, 0.0, maps, 1.0).point.bytes_per_image


def leading(maps: Maps, count: int) -> Maps:
    """Return the first images' features."""
    return {name: values[:count] for name, values in maps.items()}
