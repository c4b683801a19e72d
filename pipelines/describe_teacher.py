"""What `dtcache teacher` shows: a teacher's taps, what each costs to reach and to keep, and how its noise grows."""

import copy

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dtcache.options import parse_size
from dtcache.recipe import Json, signal_to_noise
from dtcache.teacher import LoadedTeacher, load_teacher, native_size
from dtcache.teacher.denoiser import choose_taps
from pipelines.terminal.text import byte_size

TIMESTEPS = (50, 150, 250)
RATIOS = (10, 50, 100)
VIEWS = 2
"""Both flips of an image, as extract caches them by default."""


def describe_teacher(where: str, size: str | None) -> Json:
    """Load a teacher and describe it at a view's size, its own by default; only shapes are computed, but for one pass.

    Returns JSON values. `flops` are of one view, counted by torch: a multiply-add is two. Raises TeacherError where it
    cannot be loaded, ConfigError for a size that it cannot take.
    """
    loaded = load_teacher(where)
    height, width = parse_size(size) if size else native_size(loaded)
    offered = loaded.denoiser.find_taps(height, width, loaded.latent_stride)
    chosen = {tap.name for tap in choose_taps(offered, None)}
    whole = loaded.denoiser.predictor()
    shape = (
        loaded.denoiser.channels,
        height // loaded.latent_stride,
        width // loaded.latent_stride,
    )
    classes = loaded.denoiser.num_classes
    full = count_flops(whole, shape, classes)
    taps = []
    for tap in offered:
        flops = count_flops(loaded.denoiser.tapped([tap]), shape, classes)
        fp16 = 2 * VIEWS * tap.values
        taps.append(
            {
                "name": tap.name,
                "stride": tap.stride,
                "channels": tap.channels,
                "height": tap.height,
                "width": tap.width,
                "values": tap.values,
                "flops": flops,
                "flops_share": flops / full,
                "default": tap.name in chosen,
                "fp16_bytes_per_image": fp16,
                "bytes_per_image": {f"{ratio}x": fp16 / ratio for ratio in RATIOS},
            }
        )
    return {
        "teacher": where,
        "architecture": loaded.architecture,
        "weights_sha256": loaded.weights_sha256,
        "parameters": sum(p.numel() for p in whole.parameters()),
        "native_size": native_size(loaded) if loaded.denoiser.native_size else None,
        "size": (height, width),
        "flops": full,
        "taps": taps,
        **_noise(loaded),
    }


def count_flops(network: nn.Module, shape: tuple[int, int, int], classes: int | None = None) -> int:
    """Return the floating-point operations of one pass over one input (C, H, W), on shapes alone.

    `classes` is the number of classes of a class-conditional network, else None. An autoencoder is not counted.
    """
    tensors = [*network.parameters(), *network.buffers()]
    # A copy that holds no numbers: a large teacher is counted at once, and takes no memory a second time.
    hollow = copy.deepcopy(network, {id(x): x.to("meta") for x in tensors})
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        number_B = torch.zeros(1, dtype=torch.long, device="meta")
        told = [] if classes is None else [number_B]
        hollow(torch.empty(1, *shape, device="meta"), number_B, *told)
    return int(counter.get_total_flops())


def render_teacher(report: Json) -> RenderableType:
    """Return the description as narrow tables for a terminal."""
    facts = Table(show_header=False, title=report["teacher"], title_justify="left")
    height, width = report["size"]
    facts.add_row(
        "architecture", f"{report['architecture']}, {report['parameters'] / 1e6:.1f}M parameters"
    )
    native = report["native_size"]
    facts.add_row(
        "trained at", f"{native[0]}x{native[1]}" if native else "a size that it does not name"
    )
    facts.add_row("a pass", f"{report['flops'] / 1e9:.3g} GFLOP a {height}x{width} view")
    facts.add_row(
        "noise",
        f"{report['steps']} steps, {report['schedule']} betas, predicts {report['prediction']}",
    )
    for noise in report["timesteps"]:
        snr = "infinite" if noise["snr"] is None else f"{noise['snr']:.3g}"
        facts.add_row(f"t={noise['timestep']}", f"alpha-bar {noise['alpha_bar']:.4f}, SNR {snr}")
    title = "FLOPs up to a tap; bytes an image, both flips; * by default"
    taps = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in ("tap", "map", "values", "FLOPs", "fp16", *(f"{ratio}x" for ratio in RATIOS)):
        taps.add_column(
            column, justify="left" if column == "tap" else "right", no_wrap=column in ("tap", "map")
        )
    for tap in report["taps"]:
        sizes = [tap["fp16_bytes_per_image"], *tap["bytes_per_image"].values()]
        taps.add_row(
            tap["name"] + "*" * tap["default"],
            f"{tap['channels']}x{tap['height']}x{tap['width']}",
            str(tap["values"]),
            f"{tap['flops_share']:.0%}",
            *map(byte_size, sizes),
        )
    native_view = list(report["size"]) == list(native or ())
    size = "" if native_view else f" --size {height}x{width}"
    example = (
        f"dtcache extract IMAGES --teacher {report['teacher']}{size} --timestep 50 --out CACHE"
    )
    return Group(facts, taps, example)


def _noise(loaded: LoadedTeacher) -> Json:
    """Describe the noise schedule."""
    alpha_bars = {t: float(loaded.alpha_bars[t]) for t in TIMESTEPS if t < len(loaded.alpha_bars)}
    return {
        "steps": len(loaded.alpha_bars),
        "schedule": loaded.schedule,
        "prediction": loaded.prediction,
        "timesteps": [
            {"timestep": t, "alpha_bar": a, "snr": signal_to_noise(a)}
            for t, a in alpha_bars.items()
        ],
    }
