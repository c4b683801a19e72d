"""What `dtcache inspect` prints: narrow tables of a report for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from dtcache.recipe import Json, tap_name
from pipelines.terminal.text import byte_size, printable

SHOWN = 5
"""Reasons and files of which a terminal shows so many; --json has all."""
WEIGHTS = {"last": "of the last step", "average": "averaged over steps (--ema)"}
"""What is exported of a run, and what its held-out losses are of."""
STATISTICS_TABLES = {
    "scale": {"mean": "mean", "std": "std", "effective_rank": "eff. rank"},
    "coding": {"dead_channels": "dead channels", "saturation": "saturation", "escapes": "escapes"},
    "content": {"noise_share": "noise share", "codec_error": "codec error", "knn_top1": "k-NN"},
}
"""Names and titles of statistics, table by table, each of which fits a narrow terminal."""
TAP_TABLES = {
    "bytes by tap": ("tap", "t", "shape", "bytes", "bits/value"),
    "what is kept of it": ("tap", "t", "rel. MSE", "noise", "lost"),
}


def render(report: Json, root: Path) -> RenderableType:
    """Return the report as narrow tables for a terminal."""
    recipe = report["recipe"]
    facts = _facts(root)
    state = (
        "complete" if report["complete"] else f"INCOMPLETE: {report['num_missing']} images missing"
    )
    state += (
        f", {len(report['damaged'])} shard files DAMAGED: run dtcache verify"
        if report["damaged"]
        else ""
    )
    rows = {
        "state": state,
        "images": f"{report['num_done']} done, {report['num_failed']} failed of {report['num_images']}",
        "views": _views(recipe),
        "encoding": _encoding(recipe),
        "view": f"{recipe['view']['height']}x{recipe['view']['width']}, {recipe['view']['fit']}",
        "codec": _codec(report),
        "teacher": f"{recipe['teacher']['architecture']} {recipe['teacher']['weights_sha256'][:12]}",
        **(
            {"condition": _condition(recipe["teacher"]["condition"])}
            if "condition" in recipe["teacher"]
            else {}
        ),
        "fingerprint": report["fingerprint"][:16],
        "on disk": f"{byte_size(report['bytes_on_disk'])} ({byte_size(report['image_bytes'])} images)",
        "an image": f"{byte_size(report['bytes_per_image'])} of features, "
        f"{byte_size(report['fp16_bytes_per_image'])} in fp16",
        "ratio": f"{report['ratio']:.1f}x under fp16" if report["ratio"] else "-",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    for noise in report["timesteps"]:
        facts.add_row(f"t={noise['timestep']}", _noise(noise))
    sizes, losses = (_table_of(title, columns) for title, columns in TAP_TABLES.items())
    for tap in report["taps"]:
        which = (tap["name"], str(tap["timestep"]))
        shape = f"{tap['channels']}x{tap['height']}x{tap['width']}"
        sizes.add_row(*which, shape, byte_size(tap["bytes"]), number(tap["bits_per_value"]))
        losses.add_row(
            *which,
            number(tap["relative_mse"]),
            f"{tap['noise_share']:.0%}",
            f"{tap['determined_error']:.0%}",
        )
    failed = [
        escape(f"{count} failed: {reason}")
        for reason, count in list(report["failures"].items())[:SHOWN]
    ]
    damaged = [escape(f"{path}: {what}") for path, what in list(report["damaged"].items())[:SHOWN]]
    shown = (_parts(report), *_equivariance(report), *_labels(report))
    return Group(facts, sizes, losses, *shown, *failed, *damaged)


def _table_of(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table that folds rather than hides what a narrow terminal has no room for."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _facts(root: Path) -> Table:
    """Return an empty table of names and values."""
    table = Table(title=escape(str(root)), show_header=False, title_justify="left")
    for _ in range(2):
        table.add_column(overflow="fold")
    return table


def _parts(report: Json) -> RenderableType:
    """Return a table of the bytes by what they are for."""
    table = _table_of("bytes by part", ("part", "bytes", "share"))
    for name, size in report["parts"].items():
        table.add_row(name, byte_size(size), f"{size / max(1, report['bytes_on_disk']):.1%}")
    return table


def _equivariance(report: Json) -> list[RenderableType]:
    """Return a table of how far each tap is from following flips and crops, where that was measured."""
    measured = report["recipe"].get("equivariance")
    if measured is None:
        return []
    box = measured["box"]
    where = (
        f", {box['height']}x{box['width']} crop at ({box['top']}, {box['left']})"
        if box
        else ", no crop fits"
    )
    title = f"equivariance: relative squared error, {measured['images']} images{where}"
    table = _table_of(title, ("tap", "t", "flip", "crop", "its middle"))
    for tap in report["taps"]:
        errors = (number(tap[f"{name}_error"]) for name in ("flip", "crop", "crop_interior"))
        table.add_row(tap["name"], str(tap["timestep"]), *errors)
    return [table]


def _labels(report: Json) -> list[RenderableType]:
    """Return a table of the label sets, where there are any."""
    if not report["labels"]:
        return []
    table = _table_of(
        "label sets", ("name", "classes", "bytes", "share", "error", "entropy", "mIoU", "accuracy")
    )
    for found in report["labels"]:
        known = found.get("agreement") or found.get("validation") or {}
        classes = str(len(found["classes"])) if "classes" in found else found["state"]
        sizes = (
            byte_size(found["bytes"]),
            "-" if found["share"] is None else f"{found['share']:.1%}",
        )
        measured = (
            found.get("total_variation"),
            found.get("entropy"),
            known.get("miou"),
            known.get("accuracy"),
        )
        table.add_row(escape(found["name"]), classes, *sizes, *map(number, measured))
    named = {found["name"]: found["classes"] for found in report["labels"] if "classes" in found}
    return [
        table,
        *(
            escape(printable(f"classes of {name}: {', '.join(classes)}"))
            for name, classes in named.items()
        ),
    ]


def _encoding(recipe: Json) -> str:
    """Say how an image becomes what the teacher sees."""
    steps = recipe["teacher"].get("ddim_steps")
    if steps is not None:
        return f"DDIM: inverted in {steps} steps"
    return "clean images" if set(recipe["teacher"]["alpha_bars"]) == {1.0} else "DDPM: noised"


def _noise(noise: Json) -> str:
    """Say how much signal is left at a timestep."""
    snr = "infinite" if noise["snr"] is None else f"{noise['snr']:.3g}"
    back = "" if noise["round_trip"] is None else f", round trip {noise['round_trip']:.1e}"
    return f"alpha-bar {noise['alpha_bar']:.4f}, SNR {snr}{back}"


def _codec(report: Json) -> str:
    """Say how features are stored and what the fit was made from and costs."""
    codec = report["recipe"]["codec"]
    fit = byte_size(report["codec_bytes"])
    if codec["ratio"] is None:
        return f"float16 (statistics of {codec['fit_rows']} images, {fit})"
    return f"{codec['ratio']:g}x aimed at, step {codec['step']:.3f} (fit of {codec['fit_rows']} images, {fit})"


def _condition(condition: Json) -> str:
    """Say what the teacher is told of an image."""
    if condition["kind"] == "prompt":
        return escape(f"prompt {condition['prompt']!r}")
    if condition["kind"] == "class":
        return f"class {condition['number']} for every image"
    return "the label of each image" if condition["kind"] == "label" else "no class (null)"


def _views(recipe: Json) -> str:
    """Say what the views of an image are."""
    draws = recipe["draws"]
    flips = "both flips" if recipe["flips"] else "no flip"
    if draws == 1:
        return flips
    return (
        f"{flips}, mean of {draws} noise draws"
        if recipe["average"]
        else f"{flips} x {draws} noise draws"
    )


def number(value: float | None) -> str:
    """Return a number with three decimals, or a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def render_run(report: Json, root: Path) -> RenderableType:
    """Return a student's run as narrow tables: options, then held-out losses by tap."""
    options = report["options"]
    results = report["results"]
    facts = _facts(root)
    facts.add_row("state", f"{report['state']}, {report['steps']} steps")
    facts.add_row("weights", WEIGHTS[report["weights"]])
    for name, value in options.items():
        facts.add_row(
            escape(name), escape(str(value)[:16] if name in ("cache", "samples") else str(value))
        )
    if results is None:
        return facts
    facts.add_row("held-out loss", f"{results['held_out']['loss']:.4f}")
    if "label" in results["held_out"]:
        facts.add_row("label loss", f"{results['held_out']['label']:.4f}")
    facts.add_row(
        "images a second",
        f"{results['images_per_second']:.1f}, {results['wait_share']:.1%} waiting",
    )
    taps = _table_of("held out", ("tap", "MSE", "noise floor", "AT"))
    for name in report["taps"]:
        found = [
            results["held_out"].get(f"mse/{name}"),
            results["noise_floor"].get(name),
            results["held_out"].get(f"at/{name}"),
        ]
        taps.add_row(name, *map(number, found))
    return Group(facts, taps)


def render_statistics(statistics: Json) -> RenderableType:
    """Return the statistics of every tap and timestep as narrow tables, with half widths of 95 % intervals."""
    scope = "all" if statistics["exact"] else "a sample of"
    title = f"{scope} {statistics['num_rows']} of {statistics['num_usable']} samples"
    tables: list[RenderableType] = []
    for part, measures in STATISTICS_TABLES.items():
        table = _table_of(f"{part}: {title}", ("tap", "t", *measures.values()))
        for tap in statistics["taps"]:
            table.add_row(
                tap["name"], str(tap["timestep"]), *(interval(tap[name]) for name in measures)
            )
        tables.append(table)
    if "afresh" in statistics:
        again = statistics["afresh"]
        table = _table_of(
            f"codec error afresh: {again['num_rows']} samples", ("tap", "t", "recorded", "afresh")
        )
        for tap in statistics["taps"]:
            measured = again["codec_error"][tap_name(tap["timestep"], tap["name"])]
            table.add_row(
                tap["name"], str(tap["timestep"]), interval(tap["codec_error"]), interval(measured)
            )
        tables.append(table)
    left_out = [
        escape(f"left out: {place}: {what}")
        for place, what in list(statistics["left_out"].items())[:SHOWN]
    ]
    count = len(statistics["left_out"])
    return Group(
        *tables,
        *left_out,
        *([f"and {count - SHOWN} more; --json has all"] if count > SHOWN else []),
    )


def interval(estimate: Json | None) -> str:
    """Return a value and the half width of its confidence interval."""
    if estimate is None:
        return "-"
    value = estimate["value"]
    low = estimate["low"]
    high = estimate["high"]
    text = f"{value:.3g}".replace("e-0", "e-")
    return text if low is None or high == low else f"{text} ±{(high - low) / 2:.1g}"
