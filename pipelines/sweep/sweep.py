"""`dtcache sweep`: do every job of a sweep file, and write its results after each one."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.atomic_files import FolderLock, is_system_file, write_file
from dtcache.errors import CacheMismatchError
from dtcache.options import SweepOptions
from pipelines.sweep.dispatch import Failure, run_jobs, start_workers
from pipelines.sweep.plan import Plan, plan_sweep
from pipelines.sweep.report import write_reports
from pipelines.sweep.results import Row, collect, write_results
from pipelines.sweep.sweep_file import read_sweep
from pipelines.terminal.progress import track

COPY = "sweep.toml"
"""The sweep file as it was last run, in the sweep's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """A sweep whose jobs have all ended."""

    plan: Plan
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]


def sweep(path: Path, out: Path, options: SweepOptions) -> Swept:
    """Do the jobs of the sweep file `path` that are not finished in `out`; write the results.

    Results are written after every job. A failed job does not stop the others. Raises ConfigError
    for a file or options that cannot work, CacheMismatchError, naming arm and field, if `out` holds
    runs of other options or other files, CacheBusyError if another sweep writes `out`, and
    ClusterError.
    """
    plan = planned(path, out)
    left = plan.left()
    with FolderLock(out) as folder:
        write_file(out / COPY, path.read_bytes())
        rows = write_all(plan)
        if left:
            total = len(plan.jobs)
            with (
                start_workers(plan, options) as workers,
                track("sweep", total, total - len(left)) as progress,
            ):
                folder.keep()
                failures = run_jobs(plan, left, workers, progress, lambda: write_all(plan))
            rows = write_all(plan)
        else:
            failures = []
    return Swept(plan=plan, rows=tuple(rows), failures=tuple(failures))


def planned(path: Path, out: Path) -> Plan:
    """Return the plan of a sweep file in the folder `out`; nothing is written.

    Raises the errors of `sweep` that concern the file and the folder.
    """
    plan = plan_sweep(read_sweep(path), out)
    if out.is_dir() and not (out / COPY).is_file():
        names = (file.name for file in out.iterdir())
        others = sorted(name for name in names if name != ".lock" and not is_system_file(name))
        if others:
            raise CacheMismatchError(
                f"{out} is not empty and holds no sweep: found {others[0]}; pass a new `out`"
            )
    return plan


def write_all(plan: Plan) -> list[Row]:
    """Write results.parquet, report.md and report.html from what is finished; return the rows."""
    rows = collect(plan)
    write_results(rows, plan.out)
    write_reports(plan, rows)
    return rows
