"""Options of `dtcache inspect`."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.options.field import AUTO_DEVICE, option
from dtcache.options.images import ImagesOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions(ImagesOptions):
    """Options of `dtcache inspect`."""

    stats: bool = option(
        False, "Compute statistics of every tap, with confidence intervals; decodes features."
    )
    num_samples: int = option(2000, "Samples that the statistics are estimated from.", minimum=1)
    exact: bool = option(False, "Compute the statistics from all samples.")
    report: Path | None = option(
        None, "Write a self-contained HTML page, with the statistics.", metavar="FILE"
    )
    gallery: int = option(12, "Images that the page shows beside their features.", minimum=1)
    images: Path | None = option(
        None, "Source of the images, if the cache stores none.", metavar="IMAGES"
    )
    teacher: str | None = option(
        None,
        "The cache's teacher. It runs on some samples to remeasure the codec's error and to show "
        "the original features.",
        metavar="DIR_OR_ID",
    )
    cache: Path | None = option(
        None, "The cache that a run was trained on, for the run's page.", metavar="CACHE"
    )
    device: str = option(
        "auto", f"Device of the teacher or the student: {AUTO_DEVICE}.", metavar="DEVICE"
    )

    def __post_init__(self) -> None:
        """Check bounds, then that there are images if an option says how to read them."""
        ImagesOptions.__post_init__(self)
        self.require_images("images")
