"""The page of one or several runs: curves per tap, options, results, student beside teacher."""

from collections.abc import Sequence
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options import InspectOptions
from dtcache.recipe import Json
from pipelines.inspect.compare import differences, short_paths, text_of
from pipelines.inspect.page.charts import COLOURS, Series, legend, line_chart
from pipelines.inspect.page.render import write_page
from pipelines.inspect.run_report import HELD_OUT, held_out_curve
from pipelines.inspect.tables import WEIGHTS

CURVES = {"mse": "MSE", "at": "AT"}


def write_run_page(
    out: Path, roots: Sequence[Path], reports: Sequence[Json], options: InspectOptions
) -> None:
    """Write the page of one or several runs to `out`.

    With `options.cache`, the page of one run shows the student's features beside the teacher's.
    Raises ConfigError, DiskError and what `student_gallery` raises.
    """
    gallery = None
    if options.cache is not None:
        from pipelines.inspect.page.student_gallery import student_gallery

        if len(roots) > 1:
            raise ConfigError("`cache`: expected one run with it; write one page per run")
        gallery = student_gallery(roots[0], reports[0], options.cache, options)
    names = short_paths(roots)
    taps = list(dict.fromkeys(tap for report in reports for tap in report["taps"]))
    training_loss = [
        _line(name, number, report["curves"].get("loss"))
        for number, (name, report) in enumerate(zip(names, reports, strict=True))
    ]
    charts = [
        [
            _chart("training loss", "loss", training_loss),
            _held_out("held-out loss", "loss", "loss", names, reports),
        ]
    ]
    charts += [
        [_held_out(tap, f"{kind}/{tap}", y, names, reports) for tap in taps]
        for kind, y in CURVES.items()
    ]
    differing = differences(reports) if len(reports) > 1 else {}
    write_page(
        out,
        "run.html.j2",
        {
            "title": ", ".join(names) if len(names) > 1 else roots[0].resolve().name,
            "names": names,
            "reports": reports,
            "charts": charts,
            "weights": [WEIGHTS[report["weights"]] for report in reports],
            "averaged": any(report["weights"] == "average" for report in reports),
            "legend": legend(
                [Series(name=n, x=[], y=[], style=_style(i)) for i, n in enumerate(names)]
            ),
            "differing": {
                name: [text_of(name, value) for value in values]
                for name, values in differing.items()
            },
            "gallery": gallery,
        },
    )


def _held_out(title: str, curve: str, y: str, names: Sequence[str], reports: Sequence[Json]) -> str:
    """Return a chart of a held-out loss of the exported weights.

    If a run exports the EMA, the loss of the weights without averaging is dashed.
    """
    lines = []
    for number, (name, report) in enumerate(zip(names, reports, strict=True)):
        lines.append(_line(name, number, held_out_curve(report, curve)))
        if report["weights"] == "average":
            lines.append(_line(name, number, report["curves"].get(HELD_OUT + curve), " dashed"))
    return _chart(title, y, lines)


def _line(name: str, number: int, curve: Json | None, more: str = "") -> Series:
    steps = curve["steps"] if curve is not None else []
    values = curve["values"] if curve is not None else []
    return Series(name=name, x=steps, y=values, style=_style(number) + more)


def _chart(title: str, y: str, lines: Sequence[Series]) -> str:
    return line_chart(lines, title=title, x="step", y=y, log_y=True)


def _style(number: int) -> str:
    return f"c{number % COLOURS}"
