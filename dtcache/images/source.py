"""Image sources: a folder tree and Parquet files in the Hugging Face layout."""

from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.spec import sha256_json

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class ImageSource(Protocol):
    """An ordered list of encoded images."""

    @property
    def keys(self) -> list[str]:
        """Unique names, in the source's order."""

    @property
    def labels(self) -> list[int] | None:
        """Class indices beside the keys, or None where the source has no classes."""

    @property
    def classes(self) -> list[str] | None:
        """Class names by index, or None where the source names none."""

    def read(self, index: int) -> bytes:
        """Return the encoded image at a place of the source's order. Raises OSError where it cannot be read."""


class FolderSource:
    """A folder tree; the first level of sub-folders, where every image lies in one, gives the labels."""

    def __init__(self, root: Path) -> None:
        """List the images under `root`. Raises ImagesNotFoundError where there is none."""
        self.root = root
        paths = (p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        self.keys = sorted(p.relative_to(root).as_posix() for p in paths)
        odd = next((key for key in self.keys if not key.isprintable()), None)
        if odd is not None:
            raise ImagesError(f"{root}: expected printable UTF-8 file names, got {odd!r}; rename the file")
        if not self.keys:
            raise ImagesNotFoundError(
                f"no images under {root}: expected files ending in {', '.join(sorted(EXTENSIONS))}; "
                "give the folder that holds them, or a .parquet file"
            )
        self.classes: list[str] | None = None
        self.labels: list[int] | None = None
        parts = [PurePosixPath(key).parts for key in self.keys]
        if all(len(p) > 1 for p in parts):
            self.classes = sorted({p[0] for p in parts})
            index_of = {name: i for i, name in enumerate(self.classes)}
            self.labels = [index_of[p[0]] for p in parts]

    def read(self, index: int) -> bytes:
        """Return the bytes of one file."""
        return (self.root / self.keys[index]).read_bytes()


class ParquetSource:
    """Parquet files with a column `image: struct<bytes, path>` and, optionally, `label: int`.

    The encoded images are held in memory: rows are read in a permuted order, which Parquet's row groups cannot serve.
    """

    def __init__(self, files: list[Path]) -> None:
        """Read the files' columns. Raises ImagesError where the layout is another one."""
        images: list[pa.ChunkedArray] = []
        labels: list[int] = []
        keys: list[str] = []
        paths: list[str | None] = []
        self.classes: list[str] | None = None
        for file in files:
            table = _read_columns(file)
            images.append(pa.chunked_array(table["image"].combine_chunks().field("bytes")))
            paths += table["image"].combine_chunks().field("path").to_pylist()
            keys += [f"{file.stem}:{row}" for row in range(table.num_rows)]
            if "label" in table.column_names:
                labels += table["label"].to_pylist()
        if not keys:
            raise ImagesNotFoundError(f"no images in {', '.join(map(str, files))}: the files have no rows")
        self._bytes = pa.chunked_array([chunk for column in images for chunk in column.chunks])
        named = [p for p in paths if p]
        self.keys = [str(p) for p in paths] if len(set(named)) == len(paths) else keys
        self.labels = labels if len(labels) == len(keys) else None

    def read(self, index: int) -> bytes:
        """Return the bytes of one row; an empty value is returned as empty bytes."""
        value: bytes | None = self._bytes[index].as_py()
        return value or b""


def _read_columns(file: Path) -> pa.Table:
    """Read `image` and, where it is there, `label` of one Parquet file."""
    try:
        schema = pq.read_schema(file)
        names = [name for name in ("image", "label") if name in schema.names]
        image = schema.field("image").type if "image" in names else pa.null()
        if not (pa.types.is_struct(image) and {"bytes", "path"} <= {f.name for f in image.fields}):
            raise ImagesError(
                f"{file}: expected a column image: struct<bytes, path> (the Hugging Face layout), "
                f"got columns {', '.join(schema.names)}; rewrite the file or give a folder of images"
            )
        if "label" in names and not pa.types.is_integer(schema.field("label").type):
            raise ImagesError(
                f"{file}: expected a column label of integers, got {schema.field('label').type}; number the classes"
            )
        return pq.read_table(file, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise ImagesError(f"{file}: not a readable Parquet file ({error}); give it again or leave it out") from error


def open_source(path: Path) -> ImageSource:
    """Open a folder of images, a Parquet file, or a folder of Parquet files.

    Raises ImagesNotFoundError where nothing is there and ImagesError where it is of another kind.
    """
    if path.is_file() and path.suffix == ".parquet":
        return ParquetSource([path])
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        return ParquetSource(files) if files else FolderSource(path)
    if path.exists():
        raise ImagesError(f"{path}: expected a folder of images or a .parquet file, got a file of another kind")
    raise ImagesNotFoundError(f"{path} does not exist: expected a folder of images or a .parquet file")


def permuted(count: int, *, seed: int, stream: str) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Return a permutation of range(count) that depends on (count, seed, stream) alone."""
    key = int(sha256_json([stream, seed, count])[:32], 16)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)
