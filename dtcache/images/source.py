"""The protocol of an image source, and opening the source that a path holds."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from dtcache.errors import ConfigError, ImagesError, ImagesNotFoundError
from dtcache.images.folder import FolderSource, Listing, is_image
from dtcache.images.left_out import LeftOut, Reason, is_hidden
from dtcache.images.parquet import ParquetSource
from dtcache.images.parquet_index import has_images
from dtcache.images.survey import SPLITS, Survey
from dtcache.images.tar import TarSource, Track
from dtcache.options.images import ImagesOptions

KINDS = "a folder of images, .parquet or .tar files, or one such file"
NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?")
"""Names of files that Hugging Face's datasets writes: the split and its number of files."""


class ImageSource(Protocol):
    """An ordered list of encoded images; safe to share between threads."""

    @property
    def keys(self) -> Sequence[str]:
        """Unique names, in the source's order."""

    @property
    def labels(self) -> Sequence[int | None] | None:
        """Class index by image, None if it has no class; None if the source has no classes."""

    @property
    def classes(self) -> list[str] | None:
        """Class names by index; None if the source names no classes."""

    @property
    def survey(self) -> Survey:
        """What the source holds and what was left out."""

    def read(self, index: int) -> bytes:
        """Return the encoded image at `index`. Raises OSError if it cannot be read."""

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each of `indices` in order, with a function that reads its image in any thread.

        A source with slow single reads may take any number of the coming indices and read them
        together.
        """


def open_source(
    path: Path, reading: ImagesOptions | None = None, track: Track | None = None
) -> ImageSource:
    """Open a folder of images, a Parquet or tar file, or a folder of these files.

    `track` shows the progress of long work. Raises ImagesNotFoundError if `path` does not exist,
    ImagesError if it holds something else, two kinds of images, or files of several splits of
    which `reading` chooses none, and ConfigError for options that another kind of images has.
    """
    reading = reading or ImagesOptions()
    left_out = LeftOut()
    if path.is_file():
        reading.require_folder(path)
    if path.is_file() and path.suffix == ".parquet":
        return ParquetSource(_of_split(path, [path], reading, left_out), reading=reading)
    if path.is_file() and path.suffix == ".tar":
        reading.require_parquet(path)
        return TarSource(_of_split(path, [path], reading, left_out), track)
    if path.is_dir():
        parquet = _files(path, ".parquet")
        tars = _files(path, ".tar")
        image = None
        if tars or parquet:
            image = next(iter(Listing(path, follow_links=reading.follow_links)), None)
        if (tars or image) and not any(has_images(file, reading) for file in parquet):
            for file in parquet:
                left_out.add(Reason.METADATA, file.name)
            parquet = []
        if tars and (parquet or image):
            raise ImagesError(
                f"{path}: expected one kind of images, got {tars[0].name} and "
                f"{image or parquet[0].name}; pass the file, or a folder with one kind"
            )
        if parquet or tars:
            _count_others(path, {*parquet, *tars}, left_out)
        if parquet:
            for key in Listing(path, follow_links=reading.follow_links) if image else ():
                left_out.add(Reason.BESIDE, key)
            files = _of_split(path, parquet, reading, left_out)
            return ParquetSource(files, reading=reading, left_out=left_out)
        reading.require_parquet(path)
        if tars:
            return TarSource(_of_split(path, tars, reading, left_out), track, left_out)
        _require_no_split(path, reading)
        return FolderSource(path, reading)
    if path.exists():
        raise ImagesNotFoundError(f"{path}: expected {KINDS}, got a file of another kind")
    raise ImagesNotFoundError(f"{path} does not exist: expected {KINDS}")


def _files(folder: Path, extension: str) -> list[Path]:
    """Return a folder's files with an extension, sorted, without hidden ones.

    A FIFO or a device is none of them; a link that leads nowhere is, and fails when it is read.
    """
    return sorted(
        p
        for p in folder.glob(f"*{extension}")
        if not is_hidden(p.name) and (p.is_file() or not p.exists())
    )


def _count_others(folder: Path, files: set[Path], left_out: LeftOut) -> None:
    """Count what lies beside Parquet or tar files at the top of a folder."""
    for entry in folder.iterdir():
        if is_hidden(entry.name):
            left_out.add(Reason.HIDDEN, entry.name)
        elif (
            entry not in files
            and entry.suffix != ".parquet"
            and not is_image(entry.name)
            and not entry.is_dir()
        ):
            left_out.add_other(entry.name)


def split_of(name: str) -> str | None:
    """Return the split that a file's name, without extension, states; None if it states none.

    Known are the names of Hugging Face (`train-00000-of-00001`) and names with one of the usual
    words, such as `imagenet-val-03`.
    """
    words = {word for word in re.split(r"[-_.]", name.lower()) if word in SPLITS}
    numbered = NUMBERED.fullmatch(name)
    if len(words) == 1:
        return words.pop()
    return numbered[1] if numbered is not None else None


def _of_split(
    path: Path, files: list[Path], reading: ImagesOptions, left_out: LeftOut
) -> list[Path]:
    """Return the files of the chosen splits.

    Raises ConfigError if files of several splits lie together and none is chosen, and if a chosen
    split has no file.
    """
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.stem), []).append(file)
    names = sorted(name for name in by_split if name is not None)
    if reading.split is None:
        if len(names) > 1:
            raise ConfigError(
                f"{path}: expected files of one split, got {', '.join(names)}; pass one of them "
                f"as `split`, or all of them as `split='{','.join(names)}'`"
            )
        return files
    chosen = [name.strip() for name in reading.split.split(",")]
    for name in chosen:
        if name not in names:
            listed = (
                f"one of {', '.join(names)}" if names else "no `split`, since no file states one"
            )
            raise ConfigError(f"{path}: `split` {name}: expected {listed}")
    for file in files:
        if split_of(file.stem) not in chosen:
            left_out.add(Reason.SPLIT, file.name)
    return [file for file in files if split_of(file.stem) in chosen]


def _require_no_split(path: Path, reading: ImagesOptions) -> None:
    """Raise ConfigError if a split of a folder tree is chosen: a folder is its own choice."""
    if reading.split is not None:
        raise ConfigError(
            f"`split` {reading.split}: {path} is a folder of image files; pass the folder of the "
            "split instead"
        )
