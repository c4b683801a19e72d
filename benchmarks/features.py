"""Compute whitened decoder features of two teachers and write them to temporary files.

The teachers are the trained CIFAR-10 teacher and a U-Net of ADM's shape with random weights.
Shape suffixes: B batch, C channels, H rows, W columns, M views.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dtcache.device import resolve_compute
from dtcache.errors import ImagesError
from dtcache.images import load_views, open_source
from dtcache.options import ExtractOptions
from dtcache.process_settings import configure_process
from dtcache.recipe import ViewSpec, tap_name
from dtcache.rng import permuted
from dtcache.samples import SampleList
from dtcache.teacher import LoadedTeacher, Teacher, TeacherSettings, prepare_teacher
from dtcache.teacher.ddpm import build_unet, ddpm_scheduler
from dtcache.teacher.unet import UNetDenoiser
from dtcache.whitening import whiten
from pipelines.extract.plan import ExtractionPlan, make_plan
from pipelines.terminal.progress import track
from pipelines.write_scenes import write_scenes

BATCH = 64
ADM_CHANNELS = (256, 256, 512, 512, 1024, 1024)
ADM_TAPS = ("stride4", "stride8", "stride16", "stride32")
"""The taps at 256 px, finest first."""
ADM_BATCH = 2

Maps = Mapping[str, np.ndarray]
"""fp16 features (M, C, H, W) by array name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSet:
    """The features of one teacher on two sets of images."""

    fit: dict[str, np.ndarray]
    """fp16 (2, M, C, H, W): two noise draws of the images that the codec is fitted on."""
    counted: Maps
    """One noise draw of the images whose bytes are counted."""
    about: str
    """Teacher, timestep, number of images and image size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureInputs:
    """The images and the timestep of a feature set."""

    spool: Path
    """Folder of the temporary files."""
    data: Path | None
    """Folder with cifar10-*.parquet and camvid; None for generated scenes (ADM's shape only)."""
    timestep: int
    num_fit: int
    """Images that the codec is fitted on."""
    num_counted: int
    """Images whose bytes are counted."""


def cifar10_features(inputs: FeatureInputs, teacher: Path) -> FeatureSet:
    """Return the CIFAR-10 teacher's features at 32 px, in a fixed random order of the images.

    The codec is fitted on training images; test images are counted. Raises ImagesError if
    `inputs.data` is None.
    """
    if inputs.data is None:
        raise ImagesError("no CIFAR-10 images. Expected a folder, got None. Pass `data`.")
    options = ExtractOptions(
        teacher=str(teacher),
        timestep=(inputs.timestep,),
        limit=inputs.num_fit,
        flip=False,
        batch_size=BATCH,
    )
    plan = make_plan(open_source(inputs.data / "cifar10-train.parquet"), options)
    test = open_source(inputs.data / "cifar10-test.parquet")
    order = permuted(len(test.keys), seed=0, stream="rows")[: inputs.num_counted]
    counted = replace(plan, source=test, samples=SampleList(test.keys, test.labels, order))
    about = (
        f"CIFAR-10 teacher, t={inputs.timestep}: fitted on {inputs.num_fit} training images, "
        f"counted on {inputs.num_counted} test images, 32 px"
    )
    return _feature_set(inputs.spool / "cifar10", plan, counted, about)


def adm_features(inputs: FeatureInputs) -> FeatureSet:
    """Return features of a U-Net of ADM's shape with random weights, at 256 px.

    The codec is fitted on some images; other images of the same source are counted. The source is
    CamVid, or generated scenes if `inputs.data` is None.
    """
    if inputs.data is None:
        images = inputs.spool / "scenes"
        count = inputs.num_fit + inputs.num_counted
        write_scenes(images, seed=0, size=256, count=count, masks=False)
        kind = "generated scenes"
    else:
        images = inputs.data / "camvid" / "images" / "train"
        kind = "CamVid photographs"
    source = open_source(images)
    order = permuted(len(source.keys), seed=0, stream="rows")
    samples = SampleList(source.keys, source.labels, order[: inputs.num_fit + inputs.num_counted])
    plan = ExtractionPlan(
        source=source,
        samples=samples[: inputs.num_fit],
        teacher=_adm_teacher(inputs.timestep),
        options=ExtractOptions(flip=False, store_images=False),
    )
    counted = replace(plan, samples=samples[inputs.num_fit :])
    about = (
        f"ADM-shaped U-Net of random weights, t={inputs.timestep}: fitted on {inputs.num_fit} "
        f"{kind}, counted on {inputs.num_counted} others, 256 px"
    )
    return _feature_set(inputs.spool / "adm", plan, counted, about)


def _adm_teacher(timestep: int) -> Teacher:
    """Return a U-Net of Dhariwal & Nichol's (2021) shape at 256 px, truncated after stride 4."""
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
    """Compute the whitened features of a plan's samples with one noise draw; keep them in files."""
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
