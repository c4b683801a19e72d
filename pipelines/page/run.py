"""The page of one student's run, or of several: curves a tap, options, results, its features beside the teacher's."""

from collections.abc import Sequence
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options import InspectOptions
from dtcache.spec import Json
from pipelines.differences import differences, short_paths, text_of
from pipelines.page.charts import COLOURS, Series, legend, line_chart
from pipelines.page.write import write_page
from pipelines.student_run import HELD_OUT

CURVES = {"mse": "held-out MSE", "at": "held-out AT"}


def write_run_page(roots: Sequence[Path], reports: Sequence[Json], options: InspectOptions) -> None:
    """Write the page of runs; with `options.cache` one run's features stand beside the teacher's.

    Raises ConfigError, DiskError and what `student_gallery` raises.
    """
    assert options.report is not None, "asked where one is given"
    gallery = None
    if options.cache is not None:
        from pipelines.page.student import student_gallery

        if len(roots) > 1:
            raise ConfigError("--cache: expected one run with it; make a page of each run")
        gallery = student_gallery(roots[0], reports[0], options)
    names = short_paths(roots)
    taps = list(dict.fromkeys(tap for report in reports for tap in report["taps"]))
    charts = [
        _chart(f"{title}: {tap}", f"{HELD_OUT}{kind}/{tap}", names, reports)
        for tap in taps
        for kind, title in CURVES.items()
    ]
    whole = {"training loss": "loss", "held-out loss": f"{HELD_OUT}loss"}
    charts = [_chart(title, curve, names, reports) for title, curve in whole.items()] + charts
    differ = differences(reports) if len(reports) > 1 else {}
    write_page(
        options.report,
        "run.html.j2",
        {
            "title": ", ".join(names) if len(names) > 1 else roots[0].resolve().name,
            "names": names,
            "reports": reports,
            "charts": charts,
            "legend": legend([Series(name=n, x=[], y=[], style=_style(i)) for i, n in enumerate(names)]),
            "differ": {name: [text_of(name, value) for value in values] for name, values in differ.items()},
            "gallery": gallery,
        },
    )


def _chart(title: str, curve: str, names: Sequence[str], reports: Sequence[Json]) -> str:
    lines = [
        Series(name=name, x=found["steps"], y=found["values"], style=_style(place))
        for place, (name, report) in enumerate(zip(names, reports, strict=True))
        if (found := report["curves"].get(curve)) is not None
    ]
    return line_chart(lines, title=title, x="step", y="loss", log_y=True)


def _style(place: int) -> str:
    return f"c{place % COLOURS}"
