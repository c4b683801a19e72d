"""The reports of `dtcache inspect` as narrow tables for a terminal."""

from collections.abc import Sequence
from itertools import islice

from rich.console import Group, RenderableType
from rich.table import Table

from dtcache.recipe import Json, tap_name
from dtcache.store.remote import Location
from pipelines.terminal.text import byte_size

CLASSES = 10
"""Most classes of a cache that a terminal shows."""
LABELS = 200
"""Most classes of a label set that a terminal shows."""
NAME = 80
"""Most characters of a class's name that a terminal shows."""
SHOWN = 5
"""Most failures, and most damaged files, that a terminal shows; the JSON report lists all."""
WEIGHTS = {"last": "of the last step", "average": "averaged over steps (EMA)"}
"""By kind: the weights that a run exports, and of which it reports held-out losses."""
STATISTICS_TABLES = {
    "scale": {"mean": "mean", "std": "std", "effective_rank": "eff. rank"},
    "coding": {"dead_channels": "dead channels", "saturation": "saturation", "escapes": "escapes"},
    "content": {"noise_share": "noise share", "codec_error": "codec error", "knn_top1": "k-NN"},
}
"""Fields and column titles of the statistics, in tables that fit a narrow terminal."""
TAP_TABLES = {
    "bytes by tap": ("tap", "t", "shape", "bytes", "bits/value"),
    "noise and codec error by tap": ("tap", "t", "rel. MSE", "noise", "det. error"),
}
"""Titles and columns of the two tables of taps."""


def render(report: Json, root: Location) -> RenderableType:
    """Return the report of a cache as tables: facts, taps, parts, equivariance, label sets."""
    sizes, losses = _taps(report)
    failures = [f"{count} failed: {reason}" for reason, count in report["failures"].items()]
    damaged = [f"{path}: {reason}" for path, reason in report["damaged"].items()]
    return Group(
        _facts(report, root),
        sizes,
        losses,
        _parts(report),
        *_equivariance(report),
        *_labels(report),
        *failures[:SHOWN],
        *damaged[:SHOWN],
        *_source(report),
    )


def _facts(report: Json, root: Location) -> Table:
    """Return what the cache was made from, and its size."""
    recipe = report["recipe"]
    teacher = recipe["teacher"]
    view = recipe["view"]
    state = "complete"
    if not report["complete"]:
        state = f"INCOMPLETE: {report['num_missing']} images missing"
    if report["damaged"]:
        state += f", {len(report['damaged'])} shard files DAMAGED: run dtcache verify"
    facts = {
        "state": state,
        "images": f"{report['num_done']} done, {report['num_failed']} failed "
        f"of {report['num_images']}",
        "classes": _classes(report),
        "views": _views(recipe),
        "encoding": _encoding(recipe),
        "view": f"{view['height']}x{view['width']}, {view['resize_mode']}",
        "codec": _codec(report),
        "teacher": f"{teacher['architecture']} {teacher['weights_sha256'][:12]}",
        "fingerprint": report["fingerprint"][:16],
        "on disk": f"{byte_size(report['bytes_on_disk'])} "
        f"({byte_size(report['image_bytes'])} images)",
        "per image": f"{byte_size(report['bytes_per_image'])} of features, "
        f"{byte_size(report['fp16_bytes_per_image'])} in fp16",
        "ratio": f"{report['ratio']:.1f}x under fp16" if report["ratio"] else "-",
    }
    if "condition" in teacher:
        facts["condition"] = _condition(teacher["condition"])
    for noise in report["timesteps"]:
        facts[f"t={noise['timestep']}"] = _noise(noise)
    table = _name_value_table(root)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _classes(report: Json) -> str:
    """Return the number of images of each class, of the first classes."""
    counts = report.get("class_counts")
    if not counts:
        return "no labels"
    listed = [f"{name[:NAME]} {count}" for name, count in islice(counts.items(), CLASSES)]
    more = f", ... ({len(counts)} classes)" if len(counts) > CLASSES else ""
    return ", ".join(listed) + more


def _source(report: Json) -> list[str]:
    """Return lines of what the extraction read and left out; none in caches of older versions."""
    source = report.get("source")
    if source is None:
        return []
    return [f"read: {source.get('summary')}", *map(str, source.get("notes", []))]


def _taps(report: Json) -> list[Table]:
    """Return the tables of `TAP_TABLES`."""
    tables = [_table_of(title, columns) for title, columns in TAP_TABLES.items()]
    sizes, losses = tables
    for tap in report["taps"]:
        name_and_timestep = (tap["name"], str(tap["timestep"]))
        shape = f"{tap['channels']}x{tap['height']}x{tap['width']}"
        sizes.add_row(
            *name_and_timestep, shape, byte_size(tap["bytes"]), number(tap["bits_per_value"])
        )
        losses.add_row(
            *name_and_timestep,
            number(tap["relative_mse"]),
            f"{tap['noise_share']:.0%}",
            f"{tap['determined_error']:.0%}",
        )
    return tables


def _table_of(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table that folds long cells, so that a narrow terminal hides nothing."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _name_value_table(root: Location) -> Table:
    """Return an empty table with a column of names and a column of values."""
    table = Table(title=str(root), show_header=False, title_justify="left")
    for _ in range(2):
        table.add_column(overflow="fold")
    return table


def _parts(report: Json) -> RenderableType:
    """Return a table of the bytes by purpose."""
    table = _table_of("bytes by part", ("part", "bytes", "share"))
    for name, size in report["parts"].items():
        table.add_row(name, byte_size(size), f"{size / max(1, report['bytes_on_disk']):.1%}")
    return table


def _equivariance(report: Json) -> list[RenderableType]:
    """Return a table of each tap's errors of equivariance, or nothing if they were not measured."""
    measured = report["recipe"].get("equivariance")
    if measured is None:
        return []
    box = measured["box"]
    crop = (
        f", {box['height']}x{box['width']} crop at ({box['top']}, {box['left']})"
        if box
        else ", no crop fits"
    )
    title = f"equivariance: relative squared error, {measured['images']} images{crop}"
    table = _table_of(title, ("tap", "t", "flip", "crop", "interior"))
    for tap in report["taps"]:
        errors = (number(tap[f"{name}_error"]) for name in ("flip", "crop", "crop_interior"))
        table.add_row(tap["name"], str(tap["timestep"]), *errors)
    return [table]


def _labels(report: Json) -> list[RenderableType]:
    """Return a table of the label sets and lines with their classes; nothing without label sets."""
    if not report["labels"]:
        return []
    table = _table_of(
        "label sets", ("name", "classes", "bytes", "share", "error", "entropy", "mIoU", "accuracy")
    )
    for label_set in report["labels"]:
        known = label_set.get("agreement") or label_set.get("validation") or {}
        classes = str(len(label_set["classes"])) if "classes" in label_set else label_set["state"]
        sizes = (
            byte_size(label_set["bytes"]),
            "-" if label_set["share"] is None else f"{label_set['share']:.1%}",
        )
        measured = (
            label_set.get("total_variation"),
            label_set.get("entropy"),
            known.get("miou"),
            known.get("accuracy"),
        )
        table.add_row(label_set["name"], classes, *sizes, *map(number, measured))
    class_lines = [
        f"classes of {label_set['name']}: {_names(label_set['classes'])}"
        for label_set in report["labels"]
        if "classes" in label_set
    ]
    return [table, *class_lines]


def _names(classes: Sequence[str]) -> str:
    """Return the first names of a label set's classes, and the number of classes if it has more."""
    more = f", ... ({len(classes)} classes)" if len(classes) > LABELS else ""
    return ", ".join(name[:NAME] for name in classes[:LABELS]) + more


def _encoding(recipe: Json) -> str:
    """Return how an image is encoded for the teacher."""
    steps = recipe["teacher"].get("ddim_steps")
    if steps is not None:
        return f"DDIM: inverted in {steps} steps"
    return "clean images" if set(recipe["teacher"]["alpha_bars"]) == {1.0} else "DDPM: noised"


def _noise(noise: Json) -> str:
    """Return the noise level of a timestep."""
    snr = "infinite" if noise["snr"] is None else f"{noise['snr']:.3g}"
    round_trip = "" if noise["round_trip"] is None else f", round trip {noise['round_trip']:.1e}"
    return f"alpha-bar {noise['alpha_bar']:.4f}, SNR {snr}{round_trip}"


def _codec(report: Json) -> str:
    """Return the codec of the features, the number of images that it was fitted on, its size."""
    codec = report["recipe"]["codec"]
    fit = byte_size(report["codec_bytes"])
    if codec["ratio"] is None:
        return f"float16 (statistics of {codec['fit_rows']} images, {fit})"
    return (
        f"target {codec['ratio']:g}x, step {codec['step']:.3f} "
        f"(fitted on {codec['fit_rows']} images, {fit})"
    )


def _condition(condition: Json) -> str:
    """Return what the teacher is conditioned on."""
    if condition["kind"] == "prompt":
        return f"prompt {condition['prompt']!r}"
    if condition["kind"] == "class":
        return f"class {condition['number']} for every image"
    return "the label of each image" if condition["kind"] == "label" else "no class (null)"


def _views(recipe: Json) -> str:
    """Describe the views of an image."""
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


def render_run(report: Json, root: Location) -> RenderableType:
    """Return the report of a run as tables: options and results, then held-out losses by tap."""
    results = report["results"]
    facts = _name_value_table(root)
    facts.add_row("state", f"{report['state']}, {report['steps']} steps")
    facts.add_row("weights", WEIGHTS[report["weights"]])
    for name, value in report["options"].items():
        is_hash = name in ("cache", "samples", "extended_run")
        text = str(value)[:16] if is_hash else str(value)
        facts.add_row(name, text)
    if results is None:
        return facts
    facts.add_row("held-out loss", f"{results['held_out']['loss']:.4f}")
    if "label" in results["held_out"]:
        facts.add_row("label loss", f"{results['held_out']['label']:.4f}")
    facts.add_row(
        "images per second",
        f"{results['images_per_second']:.1f}, {results['wait_share']:.1%} waiting",
    )
    taps = _table_of("held out", ("tap", "MSE", "noise floor", "AT"))
    for name in report["taps"]:
        losses = (
            results["held_out"].get(f"mse/{name}"),
            results["noise_floor"].get(name),
            results["held_out"].get(f"at/{name}"),
        )
        taps.add_row(name, *map(number, losses))
    return Group(facts, taps)


def render_statistics(statistics: Json) -> RenderableType:
    """Return the statistics of every tap as tables, with half widths of 95 % intervals."""
    scope = "all" if statistics["num_rows"] == statistics["num_usable"] else "a sample of"
    title = f"{scope} {statistics['num_rows']} of {statistics['num_usable']} samples"
    if statistics["left_out"]:
        title += ", without the damaged ones"
    tables: list[RenderableType] = []
    for topic, measures in STATISTICS_TABLES.items():
        table = _table_of(f"{topic}: {title}", ("tap", "t", *measures.values()))
        for tap in statistics["taps"]:
            table.add_row(
                tap["name"], str(tap["timestep"]), *(interval(tap[name]) for name in measures)
            )
        tables.append(table)
    if "afresh" in statistics:
        remeasured = statistics["afresh"]
        table = _table_of(
            f"codec error remeasured: {remeasured['num_rows']} samples",
            ("tap", "t", "recorded", "remeasured"),
        )
        for tap in statistics["taps"]:
            measured = remeasured["codec_error"][tap_name(tap["timestep"], tap["name"])]
            table.add_row(
                tap["name"], str(tap["timestep"]), interval(tap["codec_error"]), interval(measured)
            )
        tables.append(table)
    left_out = [f"left out: {name}: {reason}" for name, reason in statistics["left_out"].items()]
    lines = left_out[:SHOWN]
    if len(left_out) > SHOWN:
        lines.append(f"and {len(left_out) - SHOWN} more; the JSON report lists all")
    return Group(*tables, *lines)


def interval(estimate: Json | None) -> str:
    """Return a value and the half width of its confidence interval."""
    if estimate is None:
        return "-"
    value = estimate["value"]
    low = estimate["low"]
    high = estimate["high"]
    text = f"{value:.3g}".replace("e-0", "e-")
    return text if low is None or high == low else f"{text} ±{(high - low) / 2:.1g}"
