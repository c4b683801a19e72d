"""Whitened decoder features to compress, spooled to disk: of a trained CIFAR-10 teacher, and of one in ADM's shape.

Shape suffixes: B batch, C channels, H rows, W columns, M views.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dtcache.device import configure_process, resolve_compute
from dtcache.images import load_views, open_source
from dtcache.images.scenes import write_scenes
from dtcache.options import ExtractOptions
from dtcache.recipe import ViewSpec, tap_name
from dtcache.rng import permuted
from dtcache.samples import SampleList
from dtcache.teacher import LoadedTeacher, Teacher, TeacherSettings, prepare_teacher
from dtcache.teacher.ddpm import build_unet, ddpm_scheduler
from dtcache.teacher.unet import UNetDenoiser
from dtcache.whitening import whiten
from pipelines.extract.plan import Job, make_job
from pipelines.terminal.progress import track

BATCH = 64
ADM_CHANNELS = (256, 256, 512, 512, 1024, 1024)
ADM_TAPS = ("stride4", "stride8", "stride16", "stride32")
"""(up block, stride, channels) at 256 px."""
ADM_BATCH = 2

Maps = dict[str, np.memmap]
"""fp16 (M, C, H, W) by array name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSet:
    """The features of one teacher: two noise draws of the views that codecs are fitted on, one of those counted."""

    fit: dict[str, np.ndarray]
    """(2, M, C, H, W) fp16."""
    counted: Maps
    about: str
    """Teacher, images and timestep, in words."""


def cifar10_features(
    spool: Path, data: Path, teacher: Path, timestep: int, fit: int, count: int
) -> FeatureSet:
    """Fit on the first training images of the permuted order; count the first test images of theirs."""
    options = ExtractOptions(
        teacher=str(teacher), timestep=(timestep,), limit=fit, flip=False, batch_size=BATCH
    )
    job = make_job(open_source(data / "cifar10-train.parquet"), options)
    test = open_source(data / "cifar10-test.parquet")
    order = permuted(len(test.keys), seed=0, stream="rows")[:count]
    counted = replace(job, source=test, samples=SampleList(test.keys, test.labels, order))
    about = f"CIFAR-10 teacher, t={timestep}: fitted on {fit} training images, counted on {count} test images, 32 px"
    return _feature_set(spool / "cifar10", job, counted, about)


def adm_features(spool: Path, data: Path | None, timestep: int, fit: int, count: int) -> FeatureSet:
    """Fit on some photographs and count others (generated scenes where there is no `data`), random weights, 256 px."""
    images = data / "camvid" / "images" / "train" if data else spool / "scenes"
    if data is None:
        write_scenes(images, seed=0, size=256, count=fit + count, masks=False)
    source = open_source(images)
    order = permuted(len(source.keys), seed=0, stream="rows")[: fit + count]
    samples = SampleList(source.keys, source.labels, order)
    view = ViewSpec(height=256, width=256)
    job = Job(
        source=source,
        samples=samples[:fit],
        view=view,
        teacher=_adm_teacher(timestep),
        flips=(False,),
        draws=1,
        average=False,
        stores_images=False,
        seed=0,
    )
    kind = "CamVid photographs" if data else "generated scenes"
    about = (
        f"ADM-shaped U-Net of random weights, t={timestep}: fitted on {fit} {kind}, "
        f"counted on {count} others, 256 px"
    )
    return _feature_set(spool / "adm", job, replace(job, samples=samples[fit:]), about)


def _adm_teacher(timestep: int) -> Teacher:
    """Return a U-Net of Dhariwal & Nichol's shape at 256 px, truncated after stride 4."""
    torch.manual_seed(0)
    unet = build_unet(256, 256, ADM_CHANNELS, layers=2, attention=3).eval().requires_grad_(False)
    alpha_bars = ddpm_scheduler().alphas_cumprod.float()
    compute = resolve_compute("auto", "auto")
    configure_process(compute.device)
    loaded = LoadedTeacher(
        denoiser=UNetDenoiser(unet),
        alpha_bars=alpha_bars,
        architecture="UNet2DModel",
        weights_sha256="",
        config_sha256="",
    )
    view = ViewSpec(height=256, width=256)
    return prepare_teacher(
        loaded,
        TeacherSettings(view=view, taps=ADM_TAPS, timesteps=(timestep,), batch_size=ADM_BATCH),
        compute,
    )


def _feature_set(folder: Path, fit: Job, counted: Job, about: str) -> FeatureSet:
    draws = [_spool(folder / f"fit{draw}", fit, draw) for draw in range(2)]
    return FeatureSet(
        fit={name: np.stack([draw[name] for draw in draws]) for name in draws[0]},
        counted=_spool(folder / "counted", counted, 0),
        about=about,
    )


def _spool(folder: Path, job: Job, draw: int) -> Maps:
    """Write the whitened features of a job's rows under one noise draw."""
    folder.mkdir(parents=True)
    spec = job.teacher.spec
    count = len(job.samples)
    maps = {
        tap_name(t, tap.name): np.memmap(
            folder / f"{t}-{tap.name}",
            np.float16,
            "w+",
            shape=(count, tap.channels, tap.height, tap.width),
        )
        for t in spec.timesteps
        for tap in spec.taps
    }
    loaded = load_views(job.source, (s.index for s in job.samples), job.view, threads=1)
    with track(f"{folder.parent.name} {folder.name} features", count) as progress:
        for start in range(0, count, spec.batch_size):
            rows = list(range(start, min(start + spec.batch_size, count)))
            inputs = [job.input(next(loaded), row, False, [draw]) for row in rows]
            (raw,) = job.teacher.features(job.teacher.batch(inputs))
            for name, raw_BCHW in raw.items():
                maps[name][rows[0] : rows[-1] + 1] = whiten(raw_BCHW)[0].half().numpy(force=True)
            progress.advance(len(rows))
    return maps
