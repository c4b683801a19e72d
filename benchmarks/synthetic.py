"""Synthetic features that resemble a diffusion teacher's, and caches of them."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dtcache.codec import FeatureEncoder, FittedTap, TapCodec, sections_of, sha256_fit
from dtcache.codec.fit import solve_step, tap_statistics
from dtcache.recipe import CodecSpec, Recipe, Sample, TapSpec, TeacherSpec, ViewSpec
from dtcache.store.commits import CodecSums
from dtcache.store.layout import IMAGES, payload_arrays
from dtcache.store.pending_shard import ShardData
from dtcache.store.sample_index import hash_samples
from dtcache.store.writer import CacheWriter
from dtcache.whitening import whiten

TIMESTEP = 150
SMALL = ((32, 32, 32), (96, 16, 16), (128, 8, 8), (128, 4, 4))
"""(C, H, W) of a CIFAR-10 DDPM's taps, finest first: 67,584 values per view."""
LARGE = ((512, 64, 64), (512, 32, 32), (1024, 16, 16), (1024, 8, 8))
"""(C, H, W) of ADM's taps at 256 px, finest first: 2.95 million values per view."""
STEEPNESS = 1.25
"""Exponent of the spectra. At a ratio of 50, 28 % of the coefficients are coded, as in a real DDPM.
"""
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticCache:
    """A cache with one view per row; its fingerprints and labels are invented."""

    shapes: Sequence[Shape]
    """(C, H, W) of the taps, finest first."""
    fit: Mapping[str, TapCodec]
    rows: int
    shard_rows: int


def tap_specs(shapes: Sequence[Shape]) -> tuple[TapSpec, ...]:
    """Return the taps of a pyramid; every level halves the resolution."""
    return tuple(
        TapSpec(
            name=f"stride{2**i}",
            block=len(shapes) - 1 - i,
            stride=2**i,
            channels=c,
            height=h,
            width=w,
        )
        for i, (c, h, w) in enumerate(shapes)
    )


def names_of(shapes: Sequence[Shape]) -> list[str]:
    """Return the array names of a pyramid's taps."""
    return [f"t{TIMESTEP}/{tap.name}" for tap in tap_specs(shapes)]


def features(shape: Shape, count: int, seed: int) -> torch.Tensor:
    """Return float32 maps (count, C, H, W) with correlated channels and falling spectra.

    The channel correlation depends only on C. `seed` determines everything else.
    """
    channels, height, width = shape
    rng = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, channels + 1).float() ** -0.6
    mix = (
        torch.randn(channels, channels, generator=torch.Generator().manual_seed(channels))
        * strength
    )
    rows = torch.fft.fftfreq(height)[:, None] * height
    columns = torch.fft.fftfreq(width) * width
    spectrum = (1 + (rows.square() + columns.square()).sqrt()) ** -STEEPNESS
    white = torch.randn(count, channels, height, width, generator=rng)
    coloured = torch.fft.ifft2(torch.fft.fft2(white) * spectrum).real
    return torch.einsum("cd,ndhw->nchw", mix, coloured)


def fit_pyramid(shapes: Sequence[Shape], views: int, ratio: float) -> Mapping[str, TapCodec]:
    """Fit the codec so that fp16 bytes / payload bytes is `ratio`.

    Each view has two noise draws. They differ by noise with 0.33 of the features' standard
    deviation.
    """
    statistics = {}
    for index, (name, shape) in enumerate(zip(names_of(shapes), shapes, strict=True)):
        first = features(shape, views, seed=index)
        second = first + 0.33 * first.std() * torch.randn(
            first.shape, generator=torch.Generator().manual_seed(index)
        )
        pair = np.stack([whiten(first)[0].numpy(), whiten(second)[0].numpy()]).astype(np.float16)
        statistics[name] = tap_statistics(pair)
    probes = {
        n: features(s, 2, seed=100 + i)
        for i, (n, s) in enumerate(zip(names_of(shapes), shapes, strict=True))
    }

    def size_of(fit: dict[str, FittedTap]) -> float:
        encoder = FeatureEncoder(fit, torch.device("cpu"))
        encoded = [encoder.encode(name, probe) for name, probe in probes.items()]
        return sum(sum(len(view.section) for view in views) / len(views) for views in encoded)

    return solve_step(statistics, size_of, 2 * sum(map(np.prod, shapes)) / ratio).fit


def synthetic_payloads(
    fit: Mapping[str, TapCodec], shapes: Sequence[Shape], count: int, seed: int
) -> list[bytes]:
    """Return `count` payloads of synthetic features."""
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    views = {
        name: encoder.encode(name, features(shape, count, seed + index))
        for index, (name, shape) in enumerate(zip(names_of(shapes), shapes, strict=True))
    }
    [payloads] = encoder.payloads(views).values()
    return payloads


def write_synthetic_cache(
    root: Path, cache: SyntheticCache, payload: Callable[[int], bytes]
) -> None:
    """Write and seal a cache; `payload(row)` returns the payload of a row's features."""
    writer = begin_cache(root, cache)
    for shard in writer.missing:
        writer.write_shard(shard_data(writer, shard, payload))
    writer.seal()


def begin_cache(root: Path, cache: SyntheticCache) -> CacheWriter:
    """Create a cache without shards and return its writer."""
    shapes = cache.shapes
    fit = cache.fit
    samples = [
        Sample(index=row, key=f"{row:08}.jpg", label=row % 1000) for row in range(cache.rows)
    ]
    recipe = Recipe(
        teacher=TeacherSpec(
            architecture="UNet2DModel",
            weights_sha256="0" * 64,
            config_sha256="0" * 64,
            timesteps=(TIMESTEP,),
            alpha_bars=(0.75,),
            taps=tap_specs(shapes),
            precision="fp32",
            batch_size=1,
            device_type="cpu",
        ),
        view=ViewSpec(height=shapes[0][1], width=shapes[0][2]),
        codec=CodecSpec(
            ratio=50.0,
            step=1.0,
            fit_rows=0,
            fit_sha256=sha256_fit(fit),
            noise_share=dict.fromkeys(fit, 0.1),
            noise_floor=dict.fromkeys(fit, 0.1),
            determined_error=dict.fromkeys(fit, 0.1),
        ),
        samples_sha256=hash_samples(samples),
        num_samples=cache.rows,
        flips=False,
        seed=0,
        shard_rows=cache.shard_rows,
    )
    arrays = payload_arrays(
        recipe,
        len(black_image(shapes)) + 60,
        {array: sections.bound for array, sections in sections_of(fit).items()},
    )
    root.mkdir(parents=True)
    return CacheWriter.create(
        root, recipe, arrays, {n: tap.arrays() for n, tap in fit.items()}, samples, None
    )


def shard_data(writer: CacheWriter, shard: int, payload: Callable[[int], bytes]) -> ShardData:
    """Return one shard of a cache; all its images are black."""
    arrays = writer.manifest.arrays
    rows = arrays[IMAGES].rows_of(shard)
    view = writer.manifest.recipe["view"]
    return ShardData(
        shard=shard,
        payloads={
            IMAGES: [black_image(((0, view["height"], view["width"]),))] * len(rows),
            f"t{TIMESTEP}": [payload(row) for row in rows],
        },
        content_sha256=tuple(f"{row:064x}" for row in rows),
        failures=(),
        sums={
            name: CodecSums(squared_error=0.0, energy=1.0, section_bytes=1)
            for name in writer.manifest.tap_names
        },
    )


@functools.cache
def black_image(shapes: tuple[Shape, ...]) -> bytes:
    """Return the payload of a black PNG image of the finest tap's size."""
    sink = io.BytesIO()
    Image.new("RGB", shapes[0][:0:-1]).save(sink, "PNG")
    return len(sink.getvalue()).to_bytes(4, "little") + sink.getvalue()
