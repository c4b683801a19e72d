"""Whitened decoder features to compress, spooled to disk: of a trained CIFAR-10 teacher, and of one
in ADM's shape.

Shape suffixes: B batch, C channels, H rows, W columns, M views.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dtcache.device import configure_process, resolve_compute
from dtcache.errors import ImagesError
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
from pipelines.extract.plan import ExtractionPlan, make_plan
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
    """The features of one teacher: two noise draws of the views that codecs are fitted on, one of
    those counted.
    """

    fit: dict[str, np.ndarray]
    """(2, M, C, H, W) fp16."""
    counted: Maps
    about: str
    """Teacher, images and timestep, in words."""


def cifar10_features(
    spool: Path, data: Path, teacher: Path, timestep: int, fit: int, count: int
) -> FeatureSet:
    """Fit on the first training images of the permuted order; count the first test images of
    theirs.
    """
    options = ExtractOptions(
        teacher=str(teacher), timestep=(timestep,), limit=fit, flip=False, batch_size=BATCH
    )
    plan = make_plan(open_source(data / "cifar10-train.parquet"), options)
    test = open_source(data / "cifar10-test.parquet")
    order = permuted(len(test.keys), seed=0, stream="rows")[:count]
    counted = replace(plan, source=test, samples=SampleList(test.keys, test.labels, order))
    about = (
        f"CIFAR-10 teacher, t={timestep}: fitted on {fit} training images, counted on "
        f"{count} test images, 32 px"
    )
    return _feature_set(spool / "cifar10", plan, counted, about)


def adm_features(spool: Path, data: Path | None, timestep: int, fit: int, count: int) -> FeatureSet:
    """Fit on some photographs and count others (generated scenes where there is no `data`), random
    weights, 256 px.
    """
    images = data / "camvid" / "images" / "train" if data else spool / "scenes"
    if data is None:
        write_scenes(images, seed=0, size=256, count=fit + count, masks=False)
    source = open_source(images)
    order = permuted(len(source.keys), seed=0, stream="rows")[: fit + count]
    samples = SampleList(source.keys, source.labels, order)
    plan = ExtractionPlan(
        source=source,
        samples=samples[:fit],
        teacher=_adm_teacher(timestep),
        options=ExtractOptions(flip=False, store_images=False),
    )
    kind = "CamVid photographs" if data else "generated scenes"
    about = (
        f"ADM-shaped U-Net of random weights, t={timestep}: fitted on {fit} {kind}, "
        f"counted on {count} others, 256 px"
    )
    return _feature_set(spool / "adm", plan, replace(plan, samples=samples[fit:]), about)


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


def _feature_set(
    folder: Path, fit: ExtractionPlan, counted: ExtractionPlan, about: str
) -> FeatureSet:
    draws = [_spool(folder / f"fit{draw}", fit, draw) for draw in range(2)]
    return FeatureSet(
        fit={name: np.stack([draw[name] for draw in draws]) for name in draws[0]},
        counted=_spool(folder / "counted", counted, 0),
        about=about,
    )


def _spool(folder: Path, plan: ExtractionPlan, draw: int) -> Maps:
    """Write the whitened features of a plan's rows under one noise draw."""
    folder.mkdir(parents=True)
    spec = plan.teacher.spec
    count = len(plan.samples)
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
    loaded = load_views(plan.source, (s.index for s in plan.samples), plan.view, threads=1)
    with track(f"{folder.parent.name} {folder.name} features", count) as progress:
        for start in range(0, count, spec.batch_size):
            rows = list(range(start, min(start + spec.batch_size, count)))
            inputs = []
            for row in rows:
                view = next(loaded)
                if view.pixels_CHW is None:
                    raise ImagesError(f"{plan.samples[row].key}: {view.failure}")
                inputs.append(plan.input(view.pixels_CHW, row, False, [draw]))
            (raw,) = plan.teacher.features(plan.teacher.batch(inputs))
            for name, raw_BCHW in raw.items():
                maps[name][rows[0] : rows[-1] + 1] = whiten(raw_BCHW)[0].half().numpy(force=True)
            progress.advance(len(rows))
    return maps
