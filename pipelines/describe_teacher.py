"""Description of a teacher: its taps, their FLOPs and bytes, and its noise schedule."""

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from dtcache.recipe import Json, signal_to_noise
from dtcache.teacher import LoadedTeacher, load_teacher, native_size
from dtcache.teacher.denoiser import choose_taps
from dtcache.teacher.flops import count_flops
from pipelines.make_teacher import view_size
from pipelines.terminal.text import byte_size

TIMESTEPS = (50, 150, 250)
RATIOS = (10, 50, 100)
VIEWS = 2
"""Views per image: extract caches both flips by default."""


def describe_teacher(where: str, size: str | None) -> Json:
    """Load a teacher and describe it as JSON values, for views of `size`; None: its native size.

    `taps` are the taps that a default may have, `blocks` those that are chosen by name alone.
    `flops` are per view; a multiply-add counts as two. Raises TeacherError if the teacher cannot be
    loaded, ConfigError for a size that it does not accept.
    """
    loaded = load_teacher(where)
    height, width = view_size(loaded, size)
    offered = loaded.denoiser.find_taps(height, width, loaded.latent_stride)
    chosen = {tap.name for tap in choose_taps(offered, None, is_noised=loaded.has_timesteps)}
    predictor = loaded.denoiser.predictor()
    shape = (
        loaded.denoiser.channels,
        height // loaded.latent_stride,
        width // loaded.latent_stride,
    )
    classes = loaded.denoiser.num_classes
    full = count_flops(predictor, shape, classes)
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
        "warnings": list(loaded.warnings),
        "notes": list(loaded.notes),
        "weights_sha256": loaded.weights_sha256,
        "parameters": sum(p.numel() for p in predictor.parameters()),
        "native_size": native_size(loaded) if loaded.denoiser.native_size else None,
        "size": (height, width),
        "flops": full,
        "taps": taps,
        "blocks": [
            {
                "name": tap.name,
                "stride": tap.stride,
                "channels": tap.channels,
                "height": tap.height,
                "width": tap.width,
            }
            for tap in loaded.denoiser.find_blocks(height, width, loaded.latent_stride)
        ],
        **_noise(loaded),
    }


def render_teacher(report: Json) -> RenderableType:
    """Return the description as narrow tables for a terminal."""
    facts = Table(show_header=False, title=report["teacher"], title_justify="left")
    height, width = report["size"]
    facts.add_row(
        "architecture", f"{report['architecture']}, {report['parameters'] / 1e6:.1f}M parameters"
    )
    native = report["native_size"]
    facts.add_row("trained at", f"{native[0]}x{native[1]}" if native else "unknown size")
    facts.add_row("one pass", f"{report['flops'] / 1e9:.3g} GFLOP per {height}x{width} view")
    noise = f"{report['steps']} steps, {report['schedule']} betas, predicts {report['prediction']}"
    facts.add_row("noise", noise if report["timesteps"] else "none: it reads images as they are")
    for note in report["notes"]:
        facts.add_row("note", note)
    for noise in report["timesteps"]:
        snr = "infinite" if noise["snr"] is None else f"{noise['snr']:.3g}"
        facts.add_row(f"t={noise['timestep']}", f"alpha-bar {noise['alpha_bar']:.4f}, SNR {snr}")
    title = "FLOPs up to each tap; bytes per image, both flips; * used by default"
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
    blocks = ", ".join(block["name"] for block in report["blocks"])
    by_name = [f"other blocks, taps by name: {blocks}", ""] if blocks else []
    native_view = list(report["size"]) == list(native or ())
    size = "" if native_view else f" --size {height}x{width}"
    timestep = " --timestep 50" if report["timesteps"] else ""
    example = f"dtcache extract IMAGES --teacher {report['teacher']}{size}{timestep} --out CACHE"
    warnings = [f"warning: {warning}" for warning in report["warnings"]]
    return Group(facts, *warnings, taps, *by_name, example)


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
