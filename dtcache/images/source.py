"""The protocol of an image source, and opening the source that a path holds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images.folder import FolderSource, list_images
from dtcache.images.parquet import ParquetSource
from dtcache.images.tar import TarSource, Track

KINDS = "a folder of images, .parquet or .tar files, or one such file"


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

    def read(self, index: int) -> bytes:
        """Return the encoded image at `index`. Raises OSError if it cannot be read."""

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each of `indices` in order, with a function that reads its image in any thread.

        A source with slow single reads may take any number of the coming indices and read them
        together.
        """


def open_source(path: Path, track: Track | None = None) -> ImageSource:
    """Open a folder of images, a Parquet or tar file, or a folder of these files.

    `track` shows the progress of long work. Raises ImagesNotFoundError if `path` does not exist,
    and ImagesError if it holds something else, or two kinds of images.
    """
    if path.is_file() and path.suffix == ".parquet":
        return ParquetSource([path])
    if path.is_file() and path.suffix == ".tar":
        return TarSource([path], track)
    if path.is_dir():
        parquet = sorted(path.glob("*.parquet"))
        tars = sorted(p for p in path.glob("*.tar") if not p.is_dir())
        image = next(list_images(path), None) if tars else None
        if tars and (parquet or image):
            raise ImagesError(
                f"{path}: expected one kind of images, got {tars[0].name} and "
                f"{image or parquet[0].name}; pass the file, or a folder with one kind"
            )
        if parquet:
            return ParquetSource(parquet)
        return TarSource(tars, track) if tars else FolderSource(path)
    if path.exists():
        raise ImagesError(f"{path}: expected {KINDS}, got a file of another kind")
    raise ImagesNotFoundError(f"{path} does not exist: expected {KINDS}")
