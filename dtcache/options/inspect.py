"""Options of `dtcache inspect`."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.options.field import AUTO_DEVICE, Options, option


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions(Options):
    """Options of `dtcache inspect`."""

    stats: bool = option(
        False, "Read features too: statistics of every tap, with confidence intervals."
    )
    samples: int = option(2000, "Samples that statistics are estimated from.", minimum=1)
    exact: bool = option(False, "Take statistics of every sample instead.")
    report: Path | None = option(
        None, "Write a self-contained HTML page; takes the statistics too.", metavar="FILE"
    )
    gallery: int = option(12, "Images that the page shows with their features.", minimum=1)
    images: Path | None = option(
        None, "Source of the images, where the cache stores none.", metavar="IMAGES"
    )
    teacher: str | None = option(
        None,
        "The cache's teacher: runs it on some samples, to measure the codec afresh and to show originals.",
        metavar="DIR_OR_ID",
    )
    cache: Path | None = option(
        None, "The cache that a run was trained on, for its page.", metavar="CACHE"
    )
    device: str = option(
        "auto", f"{AUTO_DEVICE}; for the teacher and the student.", metavar="DEVICE"
    )
