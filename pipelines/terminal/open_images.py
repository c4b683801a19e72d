"""Opening images with one line on stderr that says what was read and what was left out."""

from pathlib import Path

from dtcache.images import ImageSource, open_source
from dtcache.options.images import ImagesOptions
from pipelines.terminal.output import say
from pipelines.terminal.progress import track


def open_images(
    path: Path, reading: ImagesOptions | None = None, *, shown: bool = True
) -> ImageSource:
    """Open the images in `path`; if `shown`, print the survey of the source on stderr.

    Raises the errors of `open_source`.
    """
    source = open_source(path, reading, track if shown else None)
    if shown:
        say(f"{path}: {source.survey.summary}")
        for note in source.survey.notes:
            say(f"warning: {path}: {note}")
    return source
