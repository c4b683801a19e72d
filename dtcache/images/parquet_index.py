"""The layout, row groups, names and labels of a Parquet file of images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtcache.errors import ConfigError, ImagesError, ImagesNotFoundError, one_line
from dtcache.names import is_utf8
from dtcache.options.images import ImagesOptions

LABEL = "label"
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
    column: str
    """Path of the column of encoded images, such as `image.bytes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The labels of one file, or the reason why it has none that can be used."""

    values: pa.ChunkedArray | None
    """int32 numbers or text, null for no label; None if the file has no labels."""
    names: tuple[str, ...] | None
    """Class names by number, as Hugging Face records them; None if the file names none."""
    note: str | None = None
    """Why there are no values, if a user may expect some."""

    @property
    def is_text(self) -> bool:
        """Whether the values are class names."""
        return self.values is not None and pa.types.is_string(self.values.type)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileIndex:
    """A file's row groups, without empty ones, its names and its labels."""

    file: Path
    groups: list[RowGroup]
    paths: list[pa.Array]
    """Names (string), null if a row has none."""
    labels: Labels
    num_empty: int
    """Rows without bytes, as far as the file's statistics say."""


def unreadable(file: Path, error: Exception) -> ImagesError:
    """Return the error of a file that cannot be read."""
    return ImagesError(
        f"{file}: not a readable Parquet file ({one_line(error, MAX_REASON)}); download it again "
        "or leave it out"
    )


def failed_row(file: Path, error: Exception) -> OSError:
    """Return the error of a row that cannot be read."""
    return OSError(f"{file.name}: {one_line(error, MAX_REASON)}")


def has_images(file: Path, reading: ImagesOptions) -> bool:
    """Return whether a file has a column of images, and is not a table about images.

    Raises ImagesError if the file cannot be read.
    """
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error
    return bool(_image_columns(schema)) or any(
        f.name == reading.image_column and _is_binary(f.type) for f in schema
    )


def read_index(file: Path, reading: ImagesOptions) -> FileIndex:
    """Read a file's layout, names and labels, and no image.

    Raises ImagesError if the file cannot be read or has another layout.
    """
    column = reading.image_column
    label = reading.label_column or LABEL
    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            for name in (column, label):
                if schema.names.count(name) > 1:
                    raise ImagesError(
                        f"{file}: expected one column {name}, got {schema.names.count(name)}; "
                        "write the file again with one of them"
                    )
            _require_layout(file, schema, reading)
            is_struct = pa.types.is_struct(schema.field(column).type)
            has_paths = is_struct and schema.field(column).type.get_field_index("path") >= 0
            leaf = f"{column}.bytes" if is_struct else column
            groups, num_empty = _row_groups(file, opened.metadata, leaf)
            names = [f"{column}.path"] if has_paths else []
            names += [label] if label in schema.names else []
            table = opened.read(columns=names) if names else None
            if table is not None:
                table.validate(full=True)  # text may not be UTF-8
            num_rows = opened.metadata.num_rows
        paths = [pa.nulls(num_rows, pa.string())]
        if table is not None and has_paths:
            paths = [chunk.field("path").cast(pa.string()) for chunk in table[column].chunks]
    except ImagesError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error
    if num_rows and num_empty == num_rows:
        if has_paths and any(len(chunk) > chunk.null_count for chunk in paths):
            raise ImagesError(
                f"{file}: {leaf} is null in every row, only {column}.path is set: the file names "
                "images and holds none; embed them (datasets.table.embed_table_storage), or pass "
                "the folder of the images"
            )
        raise ImagesError(f"{file}: {leaf} is null in every row; write the images into the file")
    return FileIndex(
        file=file,
        groups=groups,
        paths=paths,
        labels=_labels(file, schema, table, reading),
        num_empty=num_empty,
    )


def _row_groups(file: Path, metadata: pq.FileMetaData, leaf: str) -> tuple[list[RowGroup], int]:
    """Return the row groups that have rows, and the number of rows without bytes."""
    groups = []
    first = 0
    num_empty = 0
    for number in range(metadata.num_row_groups):
        meta = metadata.row_group(number)
        columns = [meta.column(i) for i in range(meta.num_columns)]
        leaves = [c for c in columns if c.path_in_schema == leaf]
        for leaf_column in leaves:
            statistics = leaf_column.statistics
            if statistics is not None and statistics.has_null_count:
                num_empty += statistics.null_count
        if meta.num_rows:
            groups.append(
                RowGroup(
                    file=file,
                    number=number,
                    first=first,
                    rows=meta.num_rows,
                    size=sum(c.total_uncompressed_size for c in leaves),
                    column=leaf,
                )
            )
        first += meta.num_rows
    return groups, num_empty


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _image_columns(schema: pa.Schema) -> list[str]:
    """Return the columns of Hugging Face's layout of images, whatever their names are."""
    return [
        f.name
        for f in schema
        if pa.types.is_struct(f.type)
        and f.type.get_field_index("bytes") >= 0
        and _is_binary(f.type.field("bytes").type)
    ]


def _require_layout(file: Path, schema: pa.Schema, reading: ImagesOptions) -> None:
    """Check that the image column holds bytes.

    Raises ConfigError if another column does, ImagesNotFoundError if none does, and ImagesError
    if the named column holds something else.
    """
    name = reading.image_column
    kind = schema.field(name).type if name in schema.names else pa.null()
    if name in _image_columns(schema) or _is_binary(kind):
        return
    expected = f"{file}: expected a column {name}: struct<bytes, path> (the Hugging Face layout)"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        raise ImagesError(
            f"{expected} with bytes of the type binary, got {kind.field('bytes').type}; write the "
            "bytes as binary"
        )
    if name in schema.names:
        raise ImagesError(
            f"{expected} or binary, got {kind}; write the encoded images as binary, or name "
            "another column by `image_column`"
        )
    others = [*_image_columns(schema), *(f.name for f in schema if _is_binary(f.type))]
    got = f"{expected} or binary, got columns {', '.join(schema.names)}"
    if others:
        raise ConfigError(f"{got}; pass `image_column='{others[0]}'`")
    raise ImagesNotFoundError(f"{got}; rewrite the file or pass a folder of images")


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the column types that Hugging Face's datasets records; empty if there are none."""
    try:
        recorded = json.loads((schema.metadata or {})[b"huggingface"])
        features = recorded["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Return the class names that a file records for a column, or None."""
    feature = _features(schema).get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names:
        return None
    if not all(isinstance(name, str) and is_utf8(name) for name in names):
        return None
    return tuple(names)


def _labels(
    file: Path, schema: pa.Schema, table: pa.Table | None, reading: ImagesOptions
) -> Labels:
    """Return the labels of a file.

    Raises ConfigError if `label_column` names a column that cannot be read as labels, and
    ImagesError if a number has more than 32 bits or is beyond the recorded names.
    """
    column = reading.label_column or LABEL
    if table is None or column not in table.column_names:
        if reading.label_column is not None:
            raise ConfigError(
                f"{file}: `label_column` {column}: expected a column of the file, got columns "
                f"{', '.join(schema.names)}; pass one of them"
            )
        others = [name for name in schema.names if _class_names(schema, name) is not None]
        note = (
            f"{file.name} has no column {LABEL}; pass `label_column` to read {' or '.join(others)}"
            if others
            else None
        )
        return Labels(values=None, names=None, note=note)
    values = table[column]
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        text = values.cast(pa.string())
        return Labels(values=pc.if_else(pc.equal(text, ""), None, text), names=None)
    if pa.types.is_floating(kind):
        numbers = pc.if_else(pc.is_nan(values), None, values)
        if pc.all(pc.equal(pc.floor(numbers), numbers), min_count=0).as_py():
            values = numbers.cast(pa.float64())
            kind = pa.int64()
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        if reading.label_column is not None:
            raise ConfigError(
                f"{file}: `label_column` {column}: expected integers or text, got "
                f"{schema.field(column).type}; number the classes, or pass another column"
            )
        return Labels(
            values=None,
            names=None,
            note=f"no labels: the column {column} of {file.name} holds "
            f"{schema.field(column).type} values, which are neither integers nor text",
        )
    try:
        numbers = values.cast(pa.int32())
    except pa.ArrowInvalid as error:
        raise ImagesError(
            f"{file}: expected labels of 32 bits ({error}); number the classes from 0"
        ) from error
    names = _class_names(schema, column)
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ImagesError(
            f"{file}: expected distinct class names, got {twice} twice; write the file again with "
            "one name per class"
        )
    largest = pc.max(numbers).as_py()
    if names is not None and largest is not None and largest >= len(names):
        raise ImagesError(
            f"{file}: expected labels from 0 to {len(names) - 1}, the classes that the file names, "
            f"got {largest}; write the file again with all class names"
        )
    return Labels(values=numbers, names=names)


def join_labels(
    indices: Sequence[FileIndex],
) -> tuple[pa.ChunkedArray | None, list[str] | None, list[str]]:
    """Return the labels of all files (int32), their class names, and notes.

    Text is numbered by its place among the sorted class names, as folders are. Raises ImagesError
    if some files have numbers and others text, or if files name other classes.
    """
    indices = [index for index in indices if index.groups]
    notes = [index.labels.note for index in indices if index.labels.note is not None]
    lacking = [index for index in indices if index.labels.values is None]
    if lacking:
        if len(lacking) < len(indices) and not notes:
            notes = [f"no labels: {lacking[0].file.name} has none, other files do"]
        return None, None, notes[:1]
    text = [index for index in indices if index.labels.is_text]
    if text and len(text) < len(indices):
        other = next(index for index in indices if not index.labels.is_text)
        raise ImagesError(
            f"{text[0].file} has class names as labels, {other.file} numbers; write both alike"
        )
    chunks = [chunk for index in indices for chunk in _chunks(index)]
    if text:
        names = sorted(pc.unique(pa.chunked_array(chunks, pa.string())).drop_null().to_pylist())
        if not names:
            return None, None, [*notes, f"no labels: {text[0].file.name} has no text in any row"]
        values = pc.index_in(pa.chunked_array(chunks, pa.string()), value_set=pa.array(names))
        return values, names, notes
    named = [index for index in indices if index.labels.names is not None]
    for index in named:
        if index.labels.names != named[0].labels.names:
            raise ImagesError(
                f"{named[0].file} and {index.file} name other classes; write both with the same "
                "class names, or pass one of them"
            )
    if named and len(named) < len(indices):
        other = next(index for index in indices if index.labels.names is None)
        notes.append(
            f"{other.file.name} names no classes; its labels are taken as the classes of "
            f"{named[0].file.name}"
        )
    classes = list(named[0].labels.names or ()) if named else None
    return pa.chunked_array(chunks, pa.int32()), classes, notes


def _chunks(index: FileIndex) -> list[pa.Array]:
    return index.labels.values.chunks if index.labels.values is not None else []
