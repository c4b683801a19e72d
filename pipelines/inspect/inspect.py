"""`dtcache inspect`: describe caches or runs, compute statistics, write a page."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Group, RenderableType

from dtcache.errors import ConfigError
from dtcache.options import InspectOptions
from dtcache.recipe import Json
from dtcache.store.remote import Location
from dtcache.store.summary import SCHEMA, inspect_cache
from pipelines.inspect.compare import differences, render_differences
from pipelines.inspect.run_report import inspect_run, is_run
from pipelines.inspect.tables import render, render_run, render_statistics

CACHES_ONLY = ("stats", "exact", "num_samples", "teacher")
"""Options that apply to caches only."""
NEEDS_ONE_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "cache": {
        "num_samples": ("stats", "report", "teacher"),
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
"""By kind and option: the option has no effect unless one of these others is set too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """The reports of the inspected caches or runs."""

    roots: tuple[Location, ...]
    reports: tuple[Json, ...]
    """One per root; the report of a cache has `statistics` if they were computed."""
    page: Path | None = None
    """The HTML page, if one was written."""

    def to_json(self) -> Json:
        """Return a single report as it is, or several reports with the fields that differ."""
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
        if self.page is not None:
            parts.append(f"wrote {self.page}")
        return Group(*parts)


def inspect(roots: Sequence[Location], options: InspectOptions) -> Inspected:
    """Describe caches or runs; if `options.report` is given, write it as an HTML page.

    Without statistics, teacher or page, only manifests, indices and JSON files are read. Raises
    CacheNotFoundError, CacheFormatError or CacheDamagedError, and ConfigError for options that do
    not apply to these caches or runs.
    """
    runs = [root for root in roots if isinstance(root, Path) and is_run(root)]
    if runs and len(runs) < len(roots):
        other = next(root for root in roots if root not in runs)
        raise ConfigError(
            f"{other}: expected a run, as {runs[0]} is one; pass caches alone or runs alone"
        )
    _require_writable(options.report)
    return _inspect_runs(runs, options) if runs else _inspect_caches(roots, options)


def _inspect_runs(roots: Sequence[Path], options: InspectOptions) -> Inspected:
    for name in CACHES_ONLY:
        if name in _given(options):
            raise ConfigError(f"`{name}`: expected a cache, got the run {roots[0]}")
    _require_effect("run", options)
    reports = [inspect_run(root) for root in roots]
    if options.report is not None:
        from pipelines.inspect.page.run_page import write_run_page

        write_run_page(options.report, roots, reports, options)
    return Inspected(roots=tuple(roots), reports=tuple(reports), page=options.report)


def _inspect_caches(roots: Sequence[Location], options: InspectOptions) -> Inspected:
    if options.cache is not None:
        raise ConfigError("`cache`: expected the folder of a run with it, got a cache")
    _require_effect("cache", options)
    if len(roots) > 1 and options.report is not None:
        raise ConfigError("`report`: expected one cache, or runs; write one page per cache")
    if len(roots) > 1 and options.teacher is not None:
        raise ConfigError("`teacher`: expected one cache, since each cache has its own teacher")
    reports = [inspect_cache(root) for root in roots]
    if options.stats or options.exact or options.report is not None or options.teacher is not None:
        _add_statistics(roots, reports, options)
    return Inspected(roots=tuple(roots), reports=tuple(reports), page=options.report)


def _add_statistics(
    roots: Sequence[Location], reports: Sequence[Json], options: InspectOptions
) -> None:
    """Add `statistics` to the report of each cache; write the page of the cache if requested."""
    # These import torch, which a report without statistics must not.
    from pipelines.inspect.statistics import cache_statistics

    remeasured = None
    if options.teacher is not None:
        from pipelines.inspect.statistics.remeasure import remeasure

        remeasured = remeasure(roots[0], options.teacher, options)
    for root, report in zip(roots, reports, strict=True):
        report["statistics"] = cache_statistics(root, options)
        if remeasured is not None:
            report["statistics"]["afresh"] = remeasured.to_json()
    if options.report is not None:
        from pipelines.inspect.page.cache_page import write_cache_page

        write_cache_page(options.report, roots[0], reports[0], options, remeasured)


def _given(options: InspectOptions) -> set[str]:
    """Return the names of the options that are not at their default."""
    return {f.name for f in fields(options) if getattr(options, f.name) != f.default}


def _require_effect(kind: str, options: InspectOptions) -> None:
    """Raise ConfigError for options that exclude each other, or that have no effect."""
    given = _given(options)
    if {"num_samples", "exact"} <= given:
        raise ConfigError(
            "`num_samples` and `exact`: expected one of them; `exact` takes all samples"
        )
    for name, others in NEEDS_ONE_OF[kind].items():
        if name in given and given.isdisjoint(others):
            needed = " or ".join(f"`{other}`" for other in others)
            raise ConfigError(f"`{name}`: expected {needed} with it; alone it has no effect")


def _require_writable(report: Path | None) -> None:
    """Raise ConfigError, before anything is computed, if a page cannot be written to that path."""
    if report is None:
        return
    if not report.parent.is_dir():
        raise ConfigError(
            f"`report` {report}: {report.parent} is not a folder; create the folder first"
        )
    if report.is_dir():
        raise ConfigError(f"`report` {report}: expected the name of a file, got a folder")
