"""Image sources: what one is, and which kind a path holds."""

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
        """Class indices beside the keys, None for an image without; or None where the source has no
        classes.
        """

    @property
    def classes(self) -> list[str] | None:
        """Class names by index, or None where the source names none."""

    def read(self, index: int) -> bytes:
        """Return the encoded image at a place of the source's order. Raises OSError where it cannot
        be read.
        """

    def fetches(self, indices: Iterable[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
        """Yield each of `indices`, in their order, with a function that does what `read` does, in
        any thread.

        A source that is slow at single reads takes as many of the coming indices as it likes, to
        read them at once.
        """


def open_source(path: Path, track: Track | None = None) -> ImageSource:
    """Open a folder of images, a Parquet or tar file, or a folder of these; `track` shows what
    takes long.

    Raises ImagesNotFoundError where nothing is there and ImagesError where it is of another kind,
    or of two.
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
                f"{path}: expected one kind of images, got {tars[0].name} beside "
                f"{image or parquet[0].name}; give the file, or a folder that holds one kind"
            )
        return (
            ParquetSource(parquet)
            if parquet
            else TarSource(tars, track)
            if tars
            else FolderSource(path)
        )
    if path.exists():
        raise ImagesError(f"{path}: expected {KINDS}, got a file of another kind")
    raise ImagesNotFoundError(f"{path} does not exist: expected {KINDS}")
