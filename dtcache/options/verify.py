"""Options of `dtcache verify`."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.options.field import option, seed_option
from dtcache.options.images import ImagesOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions(ImagesOptions):
    """Options of `dtcache verify`."""

    fraction: float = option(
        1.0,
        "Share of the shards to check, over 0 and up to 1. All other files are always checked.",
        minimum=0,
        maximum=1,
    )
    seed: int = seed_option("Seed of the random choice of shards.")
    repair: bool = option(
        False,
        "Recompute damaged files. A file is written only if its SHA-256 is the recorded one.",
    )
    dry_run: bool = option(False, "With --repair: show the plan of the repair and write nothing.")
    images: Path | None = option(None, "Repair: the images that the cache was extracted from.")
    teacher: str | None = option(
        None, "Repair: the teacher that the cache was extracted with.", metavar="DIR_OR_ID"
    )
    interpreter: Path | None = option(
        None, "Repair: the interpreter that wrote the label set.", metavar="DIR"
    )

    def __post_init__(self) -> None:
        """Check bounds, then that there are images if an option says how to read them."""
        ImagesOptions.__post_init__(self)
        self.require_images("images")
