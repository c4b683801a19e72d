"""Parquet rows read as the same bytes, whether held in memory or read in windows."""

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtcache.errors import ConfigError, ImagesError, ImagesNotFoundError
from dtcache.images import ParquetSource, open_source, parquet
from dtcache.options import ImagesOptions

RNG = np.random.default_rng(0)


def write_parquet(path: Path, paths: list[str | None], *, labels: bool = True) -> Path:
    """Write the Hugging Face layout with bytes b"0", b"1", ..."""
    image = pa.array(
        [{"bytes": str(i).encode(), "path": p} for i, p in enumerate(paths)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    columns = {"image": image} | (
        {"label": pa.array(range(len(paths)), pa.int64())} if labels else {}
    )
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_paths_are_keys_where_unique(tmp_path: Path) -> None:
    """Unique paths are keys; labels come with them."""
    source = open_source(write_parquet(tmp_path / "a.parquet", ["x/1.png", "x/2.png"]))
    assert list(source.keys) == ["x/1.png", "x/2.png"]
    assert list(source.labels) == [0, 1]
    assert source.read(1) == b"1"


@pytest.mark.parametrize("paths", [["same", None], [None, "a"], ["", "a"]])
def test_parquet_rows_are_keys_where_paths_are_missing(
    tmp_path: Path, paths: list[str | None]
) -> None:
    """If a path is missing, all rows have FILE:ROW keys."""
    assert list(open_source(write_parquet(tmp_path / "a.parquet", paths)).keys) == ["a:0", "a:1"]


def test_a_folder_of_parquet_files_is_one_source(tmp_path: Path) -> None:
    """Files are read in the order of their names, and rows across files are found."""
    write_parquet(tmp_path / "b.parquet", ["3", "4"], labels=False)
    write_parquet(tmp_path / "a.parquet", ["1"], labels=False)
    source = open_source(tmp_path)
    assert list(source.keys) == ["1", "3", "4"]
    assert source.labels is None
    assert [source.read(i) for i in range(3)] == [b"0", b"0", b"1"]


def test_parquet_of_another_layout_is_refused(tmp_path: Path) -> None:
    """A Parquet file of another layout is refused with its columns."""
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        ImagesError, match=r"expected a column image: struct<bytes, path>.*got columns pixels"
    ):
        open_source(tmp_path / "a.parquet")


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    """A truncated Parquet file raises ImagesError with its name."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImagesError, match=r"a\.parquet: not a readable Parquet file"):
        open_source(tmp_path / "a.parquet")


def test_a_path_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """A repeated path, across files too, is refused with both rows, since noise depends on it."""
    write_parquet(tmp_path / "a.parquet", ["x", "y"])
    write_parquet(tmp_path / "b.parquet", ["z", "y"])
    with pytest.raises(
        ImagesError,
        match=(
            r"two images have the same name 'y': row 1 of \S+a\.parquet and row 1 of "
            r"\S+b\.parquet; pass `keys='rows'` to name rows FILE:ROW"
        ),
    ):
        open_source(tmp_path)


def test_rows_are_counted_a_file(tmp_path: Path) -> None:
    """FILE:ROW keys count through the row groups of a file and restart at each file."""
    for name in ("a", "b"):
        table = pq.read_table(write_parquet(tmp_path / f"{name}.parquet", [None] * 5))
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    assert list(open_source(tmp_path).keys) == [
        f"{name}:{row}" for name in "ab" for row in range(5)
    ]


def test_labels_may_be_missing(tmp_path: Path) -> None:
    """A null label means no label; a file without a label column removes all labels."""
    table = pq.read_table(write_parquet(tmp_path / "a.parquet", ["1", "2"]))
    table = table.set_column(1, "label", pa.array([None, 3], pa.int64()))
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(open_source(tmp_path).labels or []) == [None, 3]
    write_parquet(tmp_path / "b.parquet", ["3"], labels=False)
    assert open_source(tmp_path).labels is None


def test_labels_of_more_than_32_bits_are_refused(tmp_path: Path) -> None:
    """Labels beyond int32 are refused, because a cache stores int32."""
    table = pq.read_table(write_parquet(tmp_path / "a.parquet", ["1"]))
    pq.write_table(table.set_column(1, "label", pa.array([1 << 40])), tmp_path / "a.parquet")
    with pytest.raises(
        ImagesError, match=r"a\.parquet: expected labels of 32 bits .*; number the classes from 0"
    ):
        open_source(tmp_path)


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    """Files without rows are refused by name."""
    with pytest.raises(
        ImagesNotFoundError, match=r"no images in \S+a\.parquet: the files have no rows"
    ):
        open_source(write_parquet(tmp_path / "a.parquet", []))


@pytest.fixture
def large(tmp_path: Path) -> tuple[list[Path], list[bytes]]:
    """Three files of 150 rows in row groups of 40, with images of 0 to 2 kB, and their rows."""
    rows = [RNG.bytes(int(size)) for size in RNG.integers(0, 2000, 450)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for number, file in enumerate(files):
        part = rows[150 * number : 150 * (number + 1)]
        image = pa.array([{"bytes": data or None, "path": None} for data in part], kind)
        pq.write_table(pa.table({"image": image}), file, row_group_size=40, data_page_size=4096)
    return files, rows


@pytest.mark.parametrize("held_bytes", [1 << 30, 200_000, 20_000, 100])
def test_rows_are_the_same_however_little_is_held(
    large: tuple[list[Path], list[bytes]], held_bytes: int
) -> None:
    """The bytes come in the requested order for any number of windows."""
    files, rows = large
    source = ParquetSource(files, held_bytes)
    order = RNG.permutation(450).tolist()
    assert [(i, fetch()) for i, fetch in source.fetches(iter(order))] == [
        (i, rows[i]) for i in order
    ]
    assert [source.read(i) for i in order[:5]] == [rows[i] for i in order[:5]]
    assert list(source.fetches([])) == []
    twice = [7, 7, 449, 0, 7]
    assert [fetch() for _, fetch in source.fetches(twice)] == [rows[i] for i in twice]


def test_what_is_held_is_bounded(
    large: tuple[list[Path], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows stay within the memory limit, and a window reads each row group at most once."""
    files, rows = large
    windows = []
    streams = []
    window = ParquetSource._window
    stream = ParquetSource._stream

    def counted_window(source: ParquetSource, *asked: object) -> list:
        found = window(source, *asked)
        windows.append(sum(len(data) for data in found if data))
        streams.append([])
        return found

    def counted_stream(source: ParquetSource, number: int, wanted: np.ndarray) -> object:
        streams[-1].append(number)
        return stream(source, number, wanted)

    source = ParquetSource(files, 60_000)
    monkeypatch.setattr(ParquetSource, "_window", counted_window)
    streams.append([])
    order = RNG.permutation(450).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(ParquetSource, "_stream", counted_stream)
        handed = [fetch for _, fetch in source.fetches(order)]
    assert 14 <= len(windows) - 1 <= 20  # 450 kB in windows of 30 kB; the last is empty
    assert max(windows) <= 30_000
    assert all(len(read) == len(set(read)) <= 12 for read in streams)
    assert [fetch() for fetch in handed] == [
        rows[i] for i in order
    ]  # rows that did not fit are read one by one


def test_nobody_waits_for_a_window_that_is_not_wanted(
    large: tuple[list[Path], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopping early, as by Ctrl-C, waits for one row group, not for a pass over all files."""
    source = ParquetSource(large[0], 200_000)
    streams = []
    stream = ParquetSource._stream
    first_read = threading.Event()
    go_on = threading.Event()

    def held_up(source: ParquetSource, number: int, wanted: np.ndarray) -> object:
        streams.append(number)
        if len(streams) == 13:  # the first of twelve groups of the second window
            first_read.set()
            go_on.wait(10)
        return stream(source, number, wanted)

    monkeypatch.setattr(ParquetSource, "_stream", held_up)
    fetches = source.fetches(RNG.permutation(450).tolist())
    next(fetches)
    assert first_read.wait(10)
    threading.Timer(0.05, go_on.set).start()
    fetches.close()
    assert len(streams) == 13


def test_one_image_for_many_rows_is_not_held_as_many(tmp_path: Path) -> None:
    """A small file whose dictionary repeats one large image is still read in windows."""
    image = pa.array(
        [{"bytes": bytes(10_000), "path": None}] * 1000,
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    source = ParquetSource([tmp_path / "a.parquet"], 1_000_000)
    assert source._held is None
    assert {fetch() for _, fetch in source.fetches(RNG.permutation(1000).tolist())} == {
        bytes(10_000)
    }


def test_a_damaged_row_group_fails_its_own_rows(large: tuple[list[Path], list[bytes]]) -> None:
    """A damaged row group fails its own rows with the file's name and no other rows."""
    files, rows = large
    source = ParquetSource(files, 100_000)
    meta = pq.read_metadata(files[1]).row_group(2).column(0)
    start = meta.dictionary_page_offset or meta.data_page_offset
    content = bytearray(files[1].read_bytes())
    content[start : start + meta.total_compressed_size] = b"\xff" * meta.total_compressed_size
    files[1].write_bytes(content)
    hurt = range(150 + 80, 150 + 120)
    for index, fetch in source.fetches(RNG.permutation(450).tolist()):
        if index in hurt:
            with pytest.raises(OSError, match=r"1\.parquet: "):
                fetch()
        else:
            assert fetch() == rows[index]
    with pytest.raises(OSError, match=r"^1\.parquet: [^\n]+$"):
        source.read(hurt[0])
    with pytest.raises(ImagesError, match=r"1\.parquet: not a readable Parquet file"):
        ParquetSource(files, 1 << 30)


def test_at_least_two_gibibytes_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a sixteenth of the memory is held, but at least 2 GiB."""
    monkeypatch.setattr(parquet, "CGROUP_LIMIT", Path("nowhere"))
    for memory, held in ((8 << 30, 2 << 30), (512 << 30, 32 << 30)):
        monkeypatch.setattr(
            parquet.os, "sysconf", lambda name, m=memory: 4096 if "SIZE" in name else m // 4096
        )
        assert parquet.default_held_bytes() == held


@pytest.mark.parametrize(("limit", "held"), [("137438953472\n", 8 << 30), ("max\n", 32 << 30)])
def test_a_containers_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, held: int
) -> None:
    """In a container, the memory is that of the control group, not of the machine."""
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(parquet, "CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(
        parquet.os, "sysconf", lambda name: 4096 if "SIZE" in name else (512 << 30) // 4096
    )
    assert parquet.default_held_bytes() == held


def images_column(count: int, kind: pa.DataType | None = None) -> pa.Array:
    """Return a column of `count` images in the Hugging Face layout."""
    return pa.array(
        [{"bytes": str(i).encode(), "path": f"{i}.jpg"} for i in range(count)],
        pa.struct([("bytes", kind or pa.binary()), ("path", pa.string())]),
    )


def hub_metadata(column: str, names: list[str]) -> dict[str, str]:
    """Return a schema's metadata as Hugging Face's datasets writes it for a ClassLabel."""
    features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_class_names_of_the_hub_are_read(tmp_path: Path) -> None:
    """The names of a ClassLabel are the classes, in their order, and -1 is no class."""
    table = pa.table({"image": images_column(3), "label": [1, 0, -1]})
    names = ["zebra", "ant", "cow"]
    pq.write_table(
        table.replace_schema_metadata(hub_metadata("label", names)), tmp_path / "a.parquet"
    )
    source = open_source(tmp_path)
    assert (list(source.labels or []), source.classes) == ([1, 0, -1], names)
    assert source.survey.summary == (
        "3 images in 2 of 3 classes (zebra, ant), 1 each, 1 without a label"
    )


def test_class_names_must_fit_the_labels_and_each_other(tmp_path: Path) -> None:
    """A label beyond the names is refused, and so are files that name other classes."""
    table = pa.table({"image": images_column(2), "label": [0, 1]})
    for name, names in (("a", ["cat", "dog"]), ("b", ["cat", "frog"])):
        metadata = hub_metadata("label", names)
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{name}.parquet")
    with pytest.raises(ImagesError, match=r"a\.parquet and \S+b\.parquet name other classes; wri"):
        open_source(tmp_path)
    pq.write_table(
        table.replace_schema_metadata(hub_metadata("label", ["cat"])), tmp_path / "c.parquet"
    )
    with pytest.raises(ImagesError, match=r"c\.parquet: expected labels from 0 to 0, .*, got 1"):
        open_source(tmp_path / "c.parquet")
    pq.write_table(
        table.replace_schema_metadata(hub_metadata("label", ["cat", "cat"])), tmp_path / "d.parquet"
    )
    with pytest.raises(ImagesError, match=r"d\.parquet: expected distinct class names, got cat tw"):
        open_source(tmp_path / "d.parquet")


def not_utf8(count: int) -> pa.Array:
    """Return a column of text whose bytes are not UTF-8, which Parquet and Arrow write unseen."""
    offsets = pa.array(range(0, 2 * count + 1, 2), pa.int32()).buffers()[1]
    return pa.Array.from_buffers(
        pa.string(), count, [None, offsets, pa.py_buffer(b"\xc3\x28" * count)]
    )


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """Labels and paths of other bytes are refused with the file's name and the column."""
    encoded = pa.array([b"0", b"1"])
    paths = pa.StructArray.from_arrays([encoded, not_utf8(2)], ["bytes", "path"])
    for table in (
        pa.table({"image": images_column(2), "label": not_utf8(2)}),
        pa.table({"image": paths, "label": [0, 1]}),
    ):
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ImagesError, match=r"a\.parquet: not a readable Parquet file.*UTF8"):
            open_source(tmp_path / "a.parquet")


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_column_that_comes_twice_is_refused(tmp_path: Path, column: str) -> None:
    """Which of two columns of one name holds the images, or the labels, is not guessed."""
    columns = {"image": pa.array([b"0", b"1"]), "label": pa.array([0, 1])}
    names = [*columns, column]
    table = pa.Table.from_arrays([columns[name] for name in names], names)
    pq.write_table(table, tmp_path / "a.parquet")
    for path in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(ImagesError, match=rf"a\.parquet: expected one column {column}, got 2"):
            open_source(path)


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        (["dog", "cat", None, ""], [1, 0, None, None], ["cat", "dog"]),
        (pa.array(["b", "a", "b", None]).dictionary_encode(), [1, 0, 1, None], ["a", "b"]),
        (pa.array(["x", "x", "w", "x"], pa.large_string()), [1, 1, 0, 1], ["w", "x"]),
        (pa.array([0.0, 1.0, float("nan"), None]), [0, 1, None, None], None),
        (pa.array([0, 2, 1, 0], pa.uint8()).dictionary_encode(), [0, 2, 1, 0], None),
        (pa.array([True, False, None, True]), [1, 0, None, 1], None),
    ],
)
def test_labels_of_every_writer_are_read(
    tmp_path: Path, labels: object, expected: list[int | None], classes: list[str] | None
) -> None:
    """Text is numbered by its sorted names; categorical, float and boolean labels are integers."""
    table = pa.table({"image": images_column(4), "label": labels})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert (list(source.labels or []), source.classes) == (expected, classes)


def test_text_labels_are_numbered_over_all_files(tmp_path: Path) -> None:
    """Files of other classes share one numbering; text and numbers together are refused."""
    for name, labels in (("a", ["dog", "cat"]), ("b", ["ant", "dog"]), ("c", [0, 1])):
        images = pa.array([{"bytes": b"1", "path": f"{name}{i}"} for i in range(2)])
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / f"{name}.parquet")
    with pytest.raises(
        ImagesError, match=r"a\.parquet has class names as labels, \S+c\.parquet numbers"
    ):
        open_source(tmp_path)
    (tmp_path / "c.parquet").unlink()
    source = open_source(tmp_path)
    assert (list(source.labels or []), source.classes) == ([2, 1, 0, 2], ["ant", "cat", "dog"])


def test_labels_that_are_no_classes_are_left_out(tmp_path: Path) -> None:
    """Fractions are no labels, which a note says; as the chosen label column they are refused."""
    pq.write_table(
        pa.table({"image": images_column(2), "label": [0.5, 1.0]}), tmp_path / "a.parquet"
    )
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.survey.notes == (
        "no labels: the column label of a.parquet holds double values, which are neither integers "
        "nor text",
    )
    with pytest.raises(ConfigError, match=r"`label_column` label: expected integers or text, got"):
        open_source(tmp_path, ImagesOptions(label_column="label"))


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    """The messages name the columns that can be passed, and these are read."""
    table = pa.table({"img": images_column(2), "fine_label": [1, 0]})
    metadata = hub_metadata("fine_label", ["a", "b"])
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"got columns img, fine_label; pass `image_column='img'"):
        open_source(tmp_path)
    source = open_source(tmp_path, ImagesOptions(image_column="img"))
    assert (source.labels, source.read(1)) == (None, b"1")
    assert source.survey.notes == (
        "a.parquet has no column label; pass `label_column` to read fine_label",
    )
    chosen = ImagesOptions(image_column="img", label_column="fine_label")
    source = open_source(tmp_path, chosen)
    assert (list(source.labels or []), source.classes) == ([1, 0], ["a", "b"])
    with pytest.raises(ConfigError, match=r"`label_column` x: expected a column of the file, got"):
        open_source(tmp_path, ImagesOptions(image_column="img", label_column="x"))


@pytest.mark.parametrize("held_bytes", [1 << 20, 1])
@pytest.mark.parametrize(
    "images",
    [
        [b"0", b"1", b"2"],
        pa.array([b"0", b"1", b"2"], pa.large_binary()),
        pa.array([b"0", b"1", b"2"], pa.binary_view()),
        images_column(3, pa.large_binary()),
        images_column(3, pa.binary_view()),
    ],
)
def test_every_type_of_bytes_is_read(tmp_path: Path, images: object, held_bytes: int) -> None:
    """Images are binary of any kind, alone or in a struct, held in memory or not."""
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    source = ParquetSource([tmp_path / "a.parquet"], held_bytes)
    assert [source.read(i) for i in range(3)] == [b"0", b"1", b"2"]
    assert [fetch() for _, fetch in source.fetches([2, 0])] == [b"2", b"0"]


def test_lists_of_numbers_are_refused(tmp_path: Path) -> None:
    """Bytes as a list of numbers are refused at the start, with their type."""
    lists = pa.array([{"bytes": [1, 2], "path": "1"}])
    pq.write_table(pa.table({"image": lists}), tmp_path / "a.parquet")
    with pytest.raises(
        ImagesError, match=r"bytes of the type binary, got list<.*; write the bytes"
    ):
        open_source(tmp_path)


def test_paths_without_bytes_are_refused(tmp_path: Path) -> None:
    """A file that only names images is refused; some rows without bytes are told."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": f"/data/{i}.jpg"} for i in range(2)]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    with pytest.raises(
        ImagesError, match=r"image\.bytes is null in every row, only image\.path is set.*embed"
    ):
        open_source(tmp_path)
    rows[0]["bytes"] = b"1"
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    assert open_source(tmp_path).survey.notes == ("1 of 2 rows have no bytes and will fail",)


def test_rows_can_be_the_names(tmp_path: Path) -> None:
    """With keys of rows, base names that repeat do not matter."""
    file = write_parquet(tmp_path / "train-00000-of-00001.parquet", ["1.jpg", "1.jpg"])
    source = open_source(file, ImagesOptions(keys="rows"))
    assert list(source.keys) == ["train-00000-of-00001:0", "train-00000-of-00001:1"]
    assert list(source.labels or []) == [0, 1]
