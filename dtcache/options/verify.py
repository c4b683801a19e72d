"""Options of `dtcache verify`."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.options.field import Options, option, seed_option


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions(Options):
    """Options of `dtcache verify`."""

    sample: str = option(
        "100%", "Check this share of the shards, whole, and all other files.", metavar="SHARE"
    )
    seed: int = seed_option("Seed of the choice that --sample makes.")
    repair: bool = option(False, "Show what a repair would do; nothing is written without --yes.")
    images: Path | None = option(None, "Repair: the images that the cache was extracted from.")
    teacher: str | None = option(
        None, "Repair: the teacher that it was extracted with.", metavar="DIR_OR_ID"
    )
    interpreter: Path | None = option(
        None, "Repair: the interpreter that a label set was written with.", metavar="DIR"
    )
    yes: bool = option(
        False, "Repair: do it. Only bytes whose SHA-256 is the recorded one are written."
    )
