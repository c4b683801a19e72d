"""`dtcache verify`: check a cache against its recorded hashes; repair it, or plan the repair."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options import VerifyOptions
from dtcache.store.remote import Location
from dtcache.store.verify import Verification
from pipelines.verify.check import verify_cache
from pipelines.verify.plan_repairs import Repair, planned_repairs

NOT_A_CACHE = 5
EXIT_CODES = {"good": 0, "damaged": 3, "incomplete": 4, "unreadable": NOT_A_CACHE}
"""Exit code by state of the verification."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """The result of `dtcache verify`."""

    verification: Verification
    """After the repair, if there was one."""
    repairs: tuple[Repair, ...] | None
    """One per damaged file; None if no repair was requested."""


def verify(root: Location, options: VerifyOptions) -> Verified:
    """Check a finished or unfinished cache; with `options.repair`, repair it or plan the repair.

    Raises CacheNotFoundError, CacheFormatError, CacheBusyError if the cache is sealed during the
    check, ConfigError for options that do not go together, and what `repair_cache` raises.
    """
    _require_consistent(options)
    if options.repair:
        if not isinstance(root, Path):
            raise ConfigError(
                f"`repair`: expected a cache on this machine, got {root}; copy the cache to this "
                "machine, repair it there and copy it back"
            )
        if not options.dry_run:
            from pipelines.verify.repair import repair_cache  # imports torch; checking must not

            repaired, repairs = repair_cache(root, options)
            return Verified(verification=repaired, repairs=tuple(repairs))
    verification = verify_cache(root, options)
    plan = tuple(planned_repairs(verification)) if options.repair else None
    return Verified(verification=verification, repairs=plan)


def _require_consistent(options: VerifyOptions) -> None:
    """Raise ConfigError for an empty share of the shards, and for options that need another one."""
    if options.fraction <= 0:
        raise ConfigError(
            f"`fraction` {options.fraction:g}: expected a share over 0 and up to 1, such as 0.05"
        )
    if not options.repair:
        if options.dry_run:
            raise ConfigError("`dry_run`: expected `repair` with it; a check alone writes nothing")
        if options.images or options.teacher or options.interpreter:
            raise ConfigError(
                "`images`, `teacher` and `interpreter`: expected `repair` with them; a check alone "
                "does not read them"
            )
    elif not (options.dry_run or options.interpreter or (options.images and options.teacher)):
        raise ConfigError(
            "`repair` needs `images` and `teacher` (features) or `interpreter` (labels); pass "
            "`dry_run` to see what is damaged first"
        )
