"""A tiny cache for tests: 10 rows, 2 taps, 2 views, shards of 4 rows, one failed row.

Importing this module and unpickling or writing a plan load no torch; only making a plan does.
"""

import functools
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from dtcache.images.stored_images import encode_stored, image_bound
from dtcache.images.view_loader import LoadedView
from dtcache.recipe import CodecSpec, FailedSample, Recipe, Sample, TapSpec, TeacherSpec, ViewSpec
from dtcache.store.commits import CodecSums
from dtcache.store.layout import IMAGES, LOG, PayloadArray, payload_arrays
from dtcache.store.pending_shard import ShardData
from dtcache.store.sample_index import hash_samples, samples_table
from dtcache.store.writer import CacheWriter
from dtcache.store.zarr_nodes import zarr_nodes

ROWS = 10
VIEWS = 2
SHARD_ROWS = 4
FAILED_ROW = 5
STEP = 0.1
VIEW = ViewSpec(height=8, width=8)
TAPS = (
    TapSpec(name="stride2", block=1, stride=2, channels=4, height=4, width=4),
    TapSpec(name="stride4", block=0, stride=4, channels=6, height=2, width=2),
)
FINE = "t150/stride2"
COARSE = "t150/stride4"
FEATURES = "t150"
VOLATILE = (LOG, ".lock")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The inputs of a tiny cache and the contents that a reader should return."""

    recipe: Recipe
    arrays: dict[str, PayloadArray]
    fit: dict[str, dict[str, NDArray[np.generic]]]
    samples: list[Sample]
    shards: list[ShardData]
    pixels: NDArray[np.uint8]
    """(N, 3, H, W): the unmirrored images."""
    raw: dict[str, NDArray[np.float32]]
    """(N, V, C, H, W): the teacher's features by tap."""
    values: dict[str, NDArray[np.int16]]
    """(N, V, n): quantised coefficients by tap, straight from the quantiser."""

    def payload(self, name: str, row: int, view: int) -> bytes:
        """Return one payload as the writer received it, without its tag."""
        views = 1 if name == IMAGES else VIEWS
        shard, inner = divmod(row, SHARD_ROWS)
        return self.shards[shard].payloads[name][inner * views + view]


def correlated_features(tap: TapSpec, count: int, seed: int) -> NDArray[np.float32]:
    """Return (count, C, H, W) random features with unequal channel variances and smooth maps."""
    rng = np.random.default_rng(seed)
    x = (
        rng.normal(size=(count, tap.channels, tap.height, tap.width))
        * 2.0 ** -np.arange(tap.channels)[:, None, None]
    )
    x += 2 * rng.normal(size=(count, tap.channels, 1, 1))
    return (3 * x + 5).astype(np.float32)


@functools.cache
def tiny_plan() -> Plan:
    """Fit a codec on random features and encode ten rows with it."""
    import torch

    from dtcache.codec import FeatureEncoder, FittedTap, sections_of, sha256_fit
    from dtcache.codec.fit import quantised_fit, tap_statistics
    from dtcache.codec.pca_dct import Encoder
    from dtcache.whitening import whiten

    fit: dict[str, FittedTap] = {}
    raw: dict[str, NDArray[np.float32]] = {}
    for place, tap in enumerate(TAPS):
        name = f"t150/{tap.name}"
        signal = torch.from_numpy(correlated_features(tap, 48, seed=place))
        other = signal + 0.3 * torch.from_numpy(correlated_features(tap, 48, seed=10 + place) - 5)
        whitened = np.stack([whiten(signal)[0].numpy(), whiten(other)[0].numpy()]).astype(
            np.float16
        )
        fit[name] = quantised_fit(tap_statistics(whitened), STEP)
        raw[name] = correlated_features(tap, ROWS * VIEWS, seed=20 + place).reshape(
            ROWS, VIEWS, tap.channels, tap.height, tap.width
        )
    samples = [
        Sample(index=row, key=f"class{row % 3}/image{row:02}.png", label=row % 3)
        for row in range(ROWS)
    ]
    recipe = Recipe(
        teacher=TeacherSpec(
            architecture="UNet2DModel",
            weights_sha256="a" * 64,
            config_sha256="b" * 64,
            timesteps=(150,),
            alpha_bars=(0.75,),
            taps=TAPS,
            precision="fp32",
            batch_size=8,
            device_type="cpu",
        ),
        view=VIEW,
        codec=CodecSpec(
            ratio=8.0,
            step=STEP,
            fit_rows=4,
            fit_sha256=sha256_fit(fit),
            noise_share=dict.fromkeys(fit, 0.1),
            noise_floor=dict.fromkeys(fit, 0.1),
            determined_error=dict.fromkeys(fit, 0.1),
        ),
        samples_sha256=hash_samples(samples),
        num_samples=ROWS,
        flips=True,
        seed=3,
        shard_rows=SHARD_ROWS,
    )
    bounds = {array: sections.bound for array, sections in sections_of(fit).items()}
    arrays = payload_arrays(recipe, image_bound(VIEW), bounds)
    pixels = np.random.default_rng(7).integers(0, 256, (ROWS, 3, VIEW.height, VIEW.width), np.uint8)
    sources = [_png(image) for image in pixels]

    encoder = FeatureEncoder(fit, torch.device("cpu"))
    flat = {name: torch.from_numpy(x).flatten(0, 1) for name, x in raw.items()}
    encoded = {name: encoder.encode(name, x) for name, x in flat.items()}
    joined = encoder.payloads(encoded)[FEATURES]
    values = {
        name: Encoder(fit[name])(whiten(x)[0])[0].numpy().reshape(ROWS, VIEWS, -1)
        for name, x in flat.items()
    }
    shards = []
    for shard in range(arrays[IMAGES].num_shards):
        rows = arrays[IMAGES].rows_of(shard)
        good = [row for row in rows if row != FAILED_ROW]
        payloads = {
            FEATURES: [
                joined[row * VIEWS + view] if row != FAILED_ROW else b""
                for row in rows
                for view in range(VIEWS)
            ]
        }
        payloads[IMAGES] = [
            encode_stored(
                LoadedView(
                    index=row,
                    pixels_CHW=pixels[row],
                    source=sources[row],
                    unchanged=True,
                    failure=None,
                ),
                image_bound(VIEW),
            )
            if row != FAILED_ROW
            else b""
            for row in rows
        ]
        places = [row * VIEWS + view for row in good for view in range(VIEWS)]
        shards.append(
            ShardData(
                shard=shard,
                payloads=payloads,
                content_sha256=tuple(
                    hashlib.sha256(sources[row]).hexdigest() if row != FAILED_ROW else None
                    for row in rows
                ),
                failures=tuple(
                    FailedSample(row=row, key=samples[row].key, reason="cannot identify image file")
                    for row in rows
                    if row == FAILED_ROW
                ),
                sums={
                    name: CodecSums(
                        squared_error=sum(e[i].squared_error for i in places),
                        energy=sum(e[i].energy for i in places),
                        section_bytes=sum(len(e[i].section) for i in places),
                    )
                    for name, e in encoded.items()
                },
            )
        )
    return Plan(
        recipe=recipe,
        arrays=arrays,
        fit={name: fitted.arrays() for name, fitted in fit.items()},
        samples=samples,
        shards=shards,
        pixels=pixels,
        raw=raw,
        values=values,
    )


def write_nodes(root: Path, array: PayloadArray) -> None:
    """Write the Zarr nodes of a cache of one array."""
    for name, node in zarr_nodes([array]).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(node)


def begin(root: Path, plan: Plan) -> CacheWriter:
    """Begin the cache of a plan, or resume it, as `extract` does."""
    if (root / "manifest.json").exists():
        return CacheWriter.resume(root)
    root.mkdir(parents=True, exist_ok=True)
    return CacheWriter.create(
        root, plan.recipe, plan.arrays, plan.fit, plan.samples, ["red", "green", "blue"]
    )


def write_cache(root: Path, plan: Plan) -> Path:
    """Write the missing shards of a plan's cache and seal it."""
    writer = begin(root, plan)
    for shard in writer.missing:
        writer.write_shard(plan.shards[shard])
    writer.seal()
    return root


def tree(root: Path) -> dict[str, bytes | None]:
    """Return the bytes per path below a folder, None for a folder, volatile files left out."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if path.name not in VOLATILE
    }


def _png(pixels_CHW: NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels_CHW.transpose(1, 2, 0)).save(sink, "PNG")
    return sink.getvalue()


def sample_table() -> pa.Table:
    """Return a small sample index with every kind of missing value."""
    return samples_table(
        ["a", "b/ü", "c"], [1, None, 3], [b"x" * 32, None, b"\0" * 32], [None, "broken", None]
    )
