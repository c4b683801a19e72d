"""`dtcache inspect`: which of caches and runs were given, what is to be found out of them, how it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Group, RenderableType

from dtcache.errors import ConfigError
from dtcache.options import InspectOptions
from dtcache.recipe import Json
from dtcache.store.summary import SCHEMA, inspect_cache
from pipelines.inspect.compare import differences, render_differences
from pipelines.inspect.run_report import inspect_run, is_run
from pipelines.inspect.tables import render, render_run, render_statistics

CACHES_ONLY = ("stats", "exact", "samples", "teacher")
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "cache": {
        "samples": ("stats", "report", "teacher"),
        "gallery": ("report",),
        "images": ("report", "teacher"),
        "device": ("teacher",),
    },
    "run": {
        "cache": ("report",),
        "gallery": ("cache",),
        "images": ("cache",),
        "device": ("cache",),
    },
}
"""By what is inspected: options, and those without one of which they would do nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """What is known of the caches or runs that were asked for."""

    roots: tuple[Path, ...]
    reports: tuple[Json, ...]
    """One a root: a cache's has `statistics` where they were taken."""
    page: Path | None = None
    """The HTML page that was written."""

    def to_json(self) -> Json:
        """Return one report as it is, several with what differs between them."""
        if len(self.reports) == 1:
            return self.reports[0]
        return {
            "schema": SCHEMA,
            "kind": "comparison",
            "paths": [str(root) for root in self.roots],
            "reports": list(self.reports),
            "differences": differences(self.reports),
        }

    def render(self) -> RenderableType:
        """Return narrow tables for a terminal."""
        parts: list[RenderableType] = []
        if len(self.reports) > 1:
            parts.append(render_differences(self.roots, self.reports))
        elif self.reports[0]["kind"] == "run":
            parts.append(render_run(self.reports[0], self.roots[0]))
        else:
            parts.append(render(self.reports[0], self.roots[0]))
            if "statistics" in self.reports[0]:
                parts.append(render_statistics(self.reports[0]["statistics"]))
        return Group(*parts, *([f"wrote {self.page}"] if self.page is not None else []))


def inspect(roots: Sequence[Path], options: InspectOptions) -> Inspected:
    """Describe caches or runs, and write a page where `options.report` says so.

    Without statistics or a page, manifests, indices and JSON are all that is read. Raises CacheNotFoundError,
    CacheFormatError or CacheDamagedError, and ConfigError for options that do not go with what was given.
    """
    runs = [is_run(root) for root in roots]
    if any(runs) and not all(runs):
        raise ConfigError(
            f"{roots[runs.index(False)]}: no run, as {roots[runs.index(True)]} is; give caches or runs"
        )
    _require_place(options.report)
    if all(runs):
        return _inspect_runs(roots, options)
    if options.cache is not None:
        raise ConfigError("--cache: expected the folder of a student's run with it, got a cache")
    _require_used("cache", options)
    if options.report is not None and len(roots) > 1:
        raise ConfigError("--report: expected one cache, or runs; make a page of each cache")
    reports = [inspect_cache(root) for root in roots]
    if not (
        options.stats or options.exact or options.report is not None or options.teacher is not None
    ):
        return Inspected(roots=tuple(roots), reports=tuple(reports))
    from pipelines.inspect.statistics import cache_statistics

    afresh = None
    if options.teacher is not None:
        from pipelines.inspect.statistics.remeasure import measure_afresh

        if len(roots) > 1:
            raise ConfigError("--teacher: expected one cache, as each has a teacher of its own")
        afresh = measure_afresh(roots[0], options)
    for root, report in zip(roots, reports, strict=True):
        report["statistics"] = cache_statistics(root, options)
        if afresh is not None:
            report["statistics"]["afresh"] = afresh.to_json()
    if options.report is not None:
        from pipelines.inspect.page.cache_page import write_cache_page

        write_cache_page(roots[0], reports[0], options, afresh)
    return Inspected(roots=tuple(roots), reports=tuple(reports), page=options.report)


def _inspect_runs(roots: Sequence[Path], options: InspectOptions) -> Inspected:
    for name in CACHES_ONLY:
        if name in _given(options):
            raise ConfigError(f"--{name}: expected a cache, got the run {roots[0]}")
    _require_used("run", options)
    reports = tuple(inspect_run(root) for root in roots)
    if options.report is not None:
        from pipelines.inspect.page.run_page import write_run_page

        write_run_page(roots, reports, options)
    return Inspected(roots=tuple(roots), reports=reports, page=options.report)


def _given(options: InspectOptions) -> set[str]:
    """Return the names of the options that are not at their default."""
    return {f.name for f in fields(options) if getattr(options, f.name) != f.default}


def _require_used(kind: str, options: InspectOptions) -> None:
    """Raise ConfigError for an option that would do nothing."""
    given = _given(options)
    if {"samples", "exact"} <= given:
        raise ConfigError("--samples and --exact: expected one of them; --exact takes every sample")
    for name, others in NEEDED[kind].items():
        if name in given and given.isdisjoint(others):
            wanted = " or ".join(f"--{other}" for other in others)
            raise ConfigError(
                f"--{name}: expected {wanted} beside it; without that it does nothing"
            )


def _require_place(report: Path | None) -> None:
    """Raise ConfigError where a page could not be written, before anything is computed for it."""
    if report is not None and not report.parent.is_dir():
        raise ConfigError(f"--report {report}: {report.parent} is not a folder; make it first")
    if report is not None and report.is_dir():
        raise ConfigError(f"--report {report}: expected the name of a file, got a folder")
