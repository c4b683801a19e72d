"""The layout, row groups, names and labels of a Parquet file of images."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dtcache.errors import ImagesError, one_line

BYTES = "image.bytes"
MAX_REASON = 1 << 16
"""Maximum characters of an error of Arrow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """A row group of one of the files."""

    file: Path
    number: int
    """Index in its file."""
    first: int
    """Row of the file at which it begins."""
    rows: int
    size: int
    """Uncompressed bytes of its encoded images, from the file's metadata."""


def unreadable(file: Path, error: Exception) -> ImagesError:
    """Return the error of a file that cannot be read."""
    return ImagesError(
        f"{file}: not a readable Parquet file ({one_line(error, MAX_REASON)}); download it again "
        "or leave it out"
    )


def failed_row(file: Path, error: Exception) -> OSError:
    """Return the error of a row that cannot be read."""
    return OSError(f"{file.name}: {one_line(error, MAX_REASON)}")


def read_columns(file: Path) -> tuple[list[RowGroup], pa.Table]:
    """Return a file's row groups, without empty ones, and its table of names and labels.

    The table has the columns `image.path` and, if present, `label`.
    """
    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            _require_layout(file, schema)
            groups = []
            first = 0
            for number in range(opened.metadata.num_row_groups):
                meta = opened.metadata.row_group(number)
                columns = (meta.column(i) for i in range(meta.num_columns))
                size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == BYTES)
                if meta.num_rows:
                    groups.append(
                        RowGroup(
                            file=file, number=number, first=first, rows=meta.num_rows, size=size
                        )
                    )
                first += meta.num_rows
            table = opened.read(
                columns=["image.path", *(["label"] if "label" in schema.names else [])]
            )
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error
    if "label" in table.column_names:
        try:
            table = table.set_column(
                table.schema.get_field_index("label"), "label", table["label"].cast(pa.int32())
            )
        except pa.ArrowInvalid as error:
            raise ImagesError(
                f"{file}: expected labels of 32 bits ({error}); number the classes from 0"
            ) from error
    return groups, table


def _require_layout(file: Path, schema: pa.Schema) -> None:
    """Raise ImagesError unless `image` and `label` have the types of the Hugging Face layout."""
    image = schema.field("image").type if "image" in schema.names else pa.null()
    if not (pa.types.is_struct(image) and {"bytes", "path"} <= {f.name for f in image.fields}):
        raise ImagesError(
            f"{file}: expected a column image: struct<bytes, path> (the Hugging Face layout), got "
            f"columns {', '.join(schema.names)}; rewrite the file or pass a folder of images"
        )
    if "label" in schema.names and not pa.types.is_integer(schema.field("label").type):
        raise ImagesError(
            f"{file}: expected a column label of integers, got {schema.field('label').type}; "
            "number the classes"
        )
