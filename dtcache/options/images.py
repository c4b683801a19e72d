"""Options of every verb that takes IMAGES: how a path of images is read."""

from dataclasses import dataclass, fields
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import Options, option

READING = "Reading IMAGES"
"""Heading of these options in `--help`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesOptions(Options):
    """How a path of images is read. The options of each verb that takes IMAGES extend this class.

    These options are never part of a recipe or a run's identity: the keys and labels that they
    lead to are.
    """

    keys: str = option(
        "paths",
        "Names of Parquet rows: their paths, or rows for FILE:ROW.",
        choices=("paths", "rows"),
        group=READING,
    )
    image_column: str = option(
        "image", "Parquet column of the images.", metavar="NAME", group=READING
    )
    label_column: str | None = option(
        None,
        "Parquet column of the labels [default: label, if there is one].",
        metavar="NAME",
        group=READING,
    )
    split: str | None = option(
        None,
        "Read only the Parquet or tar files of these splits, such as train or train,test.",
        metavar="NAME,...",
        group=READING,
    )
    follow_links: bool = option(
        False, "Follow links to folders; links to files are always followed.", group=READING
    )

    @property
    def reading(self) -> "ImagesOptions":
        """These options alone, without those of the verb."""
        return ImagesOptions(**{f.name: getattr(self, f.name) for f in fields(ImagesOptions)})

    def require_parquet(self, path: Path) -> None:
        """Raise ConfigError if an option of Parquet files is set, which `path` does not hold."""
        for name in ("keys", "image_column", "label_column"):
            value = getattr(self, name)
            if value != getattr(type(self)(), name):
                raise ConfigError(
                    f"`{name}` {value}: it is read from Parquet files, and {path} holds other "
                    f"images; leave `{name}` out"
                )

    def require_folder(self, path: Path) -> None:
        """Raise ConfigError if links to folders are to be followed below `path`, a file."""
        if self.follow_links:
            raise ConfigError(
                f"`follow_links=True`: expected a folder of images, got the file {path}; leave "
                "`follow_links` out"
            )

    def require_images(self, *names: str) -> None:
        """Raise ConfigError if these options are set but none of the options `names` is.

        `names` are the options that hold a path of images, without which nothing is read.
        """
        if any(getattr(self, name) is not None for name in names):
            return
        for f in fields(ImagesOptions):
            if getattr(self, f.name) != f.default:
                needed = " or ".join(f"`{name}`" for name in names)
                raise ConfigError(
                    f"`{f.name}`: it says how images are read; pass {needed} too, or leave "
                    f"`{f.name}` out"
                )


READING_NAMES = tuple(f.name for f in fields(ImagesOptions))
"""Names of the options of `ImagesOptions`."""
