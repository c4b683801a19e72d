"""Sources: what is an image, what is its key, what is its label."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images import open_source, permuted


def write_parquet(path: Path, paths: list[str | None], *, labels: bool = True) -> Path:
    """Write the Hugging Face layout with bytes b"0", b"1", ..."""
    image = pa.array(
        [{"bytes": str(i).encode(), "path": p} for i, p in enumerate(paths)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    columns = {"image": image} | ({"label": pa.array(range(len(paths)), pa.int64())} if labels else {})
    pq.write_table(pa.table(columns), path)
    return path


def test_class_folders_give_labels(tmp_path: Path) -> None:
    """The first level of folders gives alphabetical class indices, and keys are relative POSIX paths."""
    for name in ("cat/b.png", "cat/deep/a.JPG", "ant/x.webp", "ant/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    assert source.keys == ["ant/x.webp", "cat/b.png", "cat/deep/a.JPG"]
    assert (source.labels, source.classes) == ([0, 1, 1], ["ant", "cat"])
    assert source.read(1) == b"cat/b.png"


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    """A folder with an image at its top has no classes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    (tmp_path / "2.png").touch()
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.classes is None


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """No images is an error that says where it looked and for what."""
    with pytest.raises(ImagesNotFoundError, match=r"no images under .*expected files ending in \.bmp"):
        open_source(tmp_path)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    """A path that is not there is named."""
    with pytest.raises(ImagesNotFoundError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_parquet_paths_are_keys_where_unique(tmp_path: Path) -> None:
    """Unique paths are keys; labels come with them."""
    source = open_source(write_parquet(tmp_path / "a.parquet", ["x/1.png", "x/2.png"]))
    assert source.keys == ["x/1.png", "x/2.png"]
    assert source.labels == [0, 1]
    assert source.read(1) == b"1"


@pytest.mark.parametrize("paths", [["same", "same"], [None, "a"]])
def test_parquet_rows_are_keys_where_paths_are_not_unique(tmp_path: Path, paths: list[str | None]) -> None:
    """Repeated or missing paths give file:row keys."""
    assert open_source(write_parquet(tmp_path / "a.parquet", paths)).keys == ["a:0", "a:1"]


def test_a_folder_of_parquet_files_is_one_source(tmp_path: Path) -> None:
    """Files are read in the order of their names, and rows across files are found."""
    write_parquet(tmp_path / "b.parquet", ["3", "4"], labels=False)
    write_parquet(tmp_path / "a.parquet", ["1"], labels=False)
    source = open_source(tmp_path)
    assert source.keys == ["1", "3", "4"]
    assert source.labels is None
    assert [source.read(i) for i in range(3)] == [b"0", b"0", b"1"]


def test_parquet_of_another_layout_is_refused(tmp_path: Path) -> None:
    """The columns that were found are named."""
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ImagesError, match=r"expected a column image: struct<bytes, path>.*got columns pixels"):
        open_source(tmp_path / "a.parquet")


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    """A file that is no Parquet is an error of ours, with its name."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImagesError, match=r"a\.parquet: not a readable Parquet file"):
        open_source(tmp_path / "a.parquet")


def test_permuted_is_a_permutation_of_its_seed() -> None:
    """The order depends on count, seed and stream, and on nothing else."""
    first = permuted(100, seed=1, stream="rows")
    assert sorted(first) == list(range(100))
    assert (first == permuted(100, seed=1, stream="rows")).all()
    assert (first != permuted(100, seed=2, stream="rows")).any()
    assert (first != permuted(100, seed=1, stream="other")).any()


@pytest.mark.shared
def test_real_parquet_and_folder_agree(shared_data: Path) -> None:
    """CIFAR-10 opens in both layouts, with ten classes."""
    parquet = open_source(shared_data / "cifar10-test.parquet")
    folder = open_source(shared_data / "cifar10-folder" / "test")
    assert (len(parquet.keys), len(set(parquet.labels or []))) == (10_000, 10)
    assert (len(folder.keys), len(folder.classes or [])) == (500, 10)
