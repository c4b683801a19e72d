"""Options of `dtcache sweep`."""

from dataclasses import dataclass

from dtcache.options.field import MAX_PARALLEL, Options, option


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions(Options):
    """Options of `dtcache sweep`; the sweep file has everything that changes a result."""

    jobs: int | None = option(
        None,
        "Jobs at a time, each in its own process [default: one per GPU; 1 on a CPU].",
        minimum=1,
        maximum=MAX_PARALLEL,
        group="Hardware",
    )
    scheduler: str | None = option(
        None,
        "Run the jobs on the workers of a Dask scheduler, such as tcp://host:8786.",
        metavar="ADDRESS",
        group="Hardware",
    )
    dry_run: bool = option(
        False, "List the jobs with an estimate of their time, and write nothing.", group="Run"
    )
