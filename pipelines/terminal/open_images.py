"""Opening images with one line on stderr that says what was read and what was left out."""

import sys
from pathlib import Path

import click

from dtcache.images import ImageSource, open_source
from dtcache.options.images import ImagesOptions
from pipelines.terminal.field_names import in_flags
from pipelines.terminal.progress import track
from pipelines.terminal.text import printable


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


def say(text: str) -> None:
    """Print one line on stderr, with the flags of the running command for fields in backticks."""
    context = click.get_current_context(silent=True)
    line = in_flags(text, context.command if context is not None else None)
    print(printable(line.replace("\n", " ")), file=sys.stderr)
