"""Synthetic pyramids like a diffusion teacher's, and caches of them."""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dtcache.codec import FeatureEncoder, FittedTap, sha256_fit
from dtcache.codec.fit import solve_step, tap_statistics
from dtcache.recipe import CodecSpec, Recipe, Sample, TapSpec, TeacherSpec, ViewSpec
from dtcache.store.commits import CodecSums
from dtcache.store.layout import IMAGES, payload_arrays
from dtcache.store.pending_shard import ShardData
from dtcache.store.sample_index import hash_samples
from dtcache.store.writer import CacheWriter
from dtcache.whitening import whiten

TIMESTEP = 150
# (C, H, W), finest first, of 67,584 and of 2.95 million values per view: a CIFAR-10 DDPM, and ADM
# at 256 pixels.
SMALL = ((32, 32, 32), (96, 16, 16), (128, 8, 8), (128, 4, 4))
LARGE = ((512, 64, 64), (512, 32, 32), (1024, 16, 16), (1024, 8, 8))
STEEPNESS = 1.25
"""Of the spectra: with it 28 % of the coefficients are coded at 50 times, as of a real DDPM's taps.
"""
Shape = tuple[int, int, int]


def tap_specs(shapes: Sequence[Shape]) -> tuple[TapSpec, ...]:
    """Return the taps of a pyramid."""
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
    """Return the arrays of a pyramid's taps."""
    return [f"t{TIMESTEP}/{tap.name}" for tap in tap_specs(shapes)]


def features(shape: Shape, count: int, seed: int) -> torch.Tensor:
    """Return (count, C, H, W) maps with correlated channels and falling spectra; one (shape) always
    has one mix.
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


def fit_pyramid(shapes: Sequence[Shape], views: int, ratio: float) -> dict[str, FittedTap]:
    """Fit the codec at a ratio of fp16 to payload bytes; a second draw changes a third of
    the amplitude.
    """
    statistics = {}
    for place, (name, shape) in enumerate(zip(names_of(shapes), shapes, strict=True)):
        first = features(shape, views, seed=place)
        second = first + 0.33 * first.std() * torch.randn(
            first.shape, generator=torch.Generator().manual_seed(place)
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
        return sum(sum(len(view.payload) for view in views) / len(views) for views in encoded)

    return solve_step(statistics, size_of, 2 * sum(map(np.prod, shapes)) / ratio).fit


def write_synthetic_cache(
    root: Path,
    shapes: Sequence[Shape],
    fit: dict[str, FittedTap],
    payload: Callable[[str, int], bytes],
    rows: int,
    shard_rows: int,
) -> Path:
    """Write and seal a cache of `rows` rows with one view; `payload` gives an array's payload of a
    row.
    """
    writer = begin_cache(root, shapes, fit, rows, shard_rows)
    for shard in writer.missing:
        writer.write_shard(shard_data(writer, shard, payload))
    writer.seal()
    return root


def begin_cache(
    root: Path, shapes: Sequence[Shape], fit: dict[str, FittedTap], rows: int, shard_rows: int
) -> CacheWriter:
    """Lay out a cache of `rows` rows with one view."""
    samples = [Sample(index=row, key=f"{row:08}.jpg", label=row % 1000) for row in range(rows)]
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
        num_samples=rows,
        flips=False,
        seed=0,
        shard_rows=shard_rows,
    )
    arrays = payload_arrays(
        recipe, len(blank(shapes)) + 60, {name: tap.payload_bound for name, tap in fit.items()}
    )
    root.mkdir(parents=True)
    return CacheWriter.create(
        root, recipe, arrays, {n: tap.arrays() for n, tap in fit.items()}, samples, None
    )


def shard_data(writer: CacheWriter, shard: int, payload: Callable[[str, int], bytes]) -> ShardData:
    """Return one shard of a cache; all its images are black."""
    arrays = writer.manifest.arrays
    part = arrays[IMAGES].rows_of(shard)
    view = writer.manifest.recipe["view"]
    names = [name for name in arrays if name != IMAGES]
    return ShardData(
        shard=shard,
        payloads={
            IMAGES: [blank(((0, view["height"], view["width"]),))] * len(part),
            **{name: [payload(name, row) for row in part] for name in names},
        },
        content_sha256=tuple(f"{row:064x}" for row in part),
        failures=(),
        sums={name: CodecSums(squared_error=0.0, energy=1.0) for name in names},
    )


@functools.cache
def blank(shapes: tuple[Shape, ...]) -> bytes:
    """Return a stored black image of the finest tap's size."""
    sink = io.BytesIO()
    Image.new("RGB", shapes[0][:0:-1]).save(sink, "PNG")
    return len(sink.getvalue()).to_bytes(4, "little") + sink.getvalue()
