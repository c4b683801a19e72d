"""A source's kind follows from what its path holds."""

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dtcache.errors import ConfigError, ImagesNotFoundError
from dtcache.images import open_source
from dtcache.images.source import split_of
from dtcache.options import ImagesOptions


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    """A missing path is refused by name."""
    with pytest.raises(ImagesNotFoundError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


@pytest.mark.shared
def test_real_parquet_and_folder_agree(shared_data: Path) -> None:
    """CIFAR-10 opens in both layouts, with ten classes."""
    parquet = open_source(shared_data / "cifar10-test.parquet")
    folder = open_source(shared_data / "cifar10-folder" / "test")
    assert (len(parquet.keys), len(set(parquet.labels or []))) == (10_000, 10)
    assert (len(folder.keys), len(folder.classes or [])) == (500, 10)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00005", "train"),
        ("validation-00000-of-00001-0123456789abcdef", "validation"),
        ("unsupervised-00000-of-00001", "unsupervised"),
        ("imagenet-val-03", "val"),
        ("cifar10-test", "test"),
        ("trainer-0", None),
        ("train_val", None),
        ("00000", None),
    ],
)
def test_a_split_is_a_word_of_the_file_name(name: str, split: str | None) -> None:
    """The split is one of the usual words, or what stands before Hugging Face's numbers."""
    assert split_of(name) == split


def write_splits(folder: Path) -> None:
    """Write two files of train and one of test, with one image each."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        image = pa.array([{"bytes": name.encode(), "path": f"{name}.jpg"}])
        pq.write_table(pa.table({"image": image}), folder / f"{name}.parquet")


def test_files_of_several_splits_are_refused(tmp_path: Path) -> None:
    """Files of two splits are refused with the option that chooses one or both."""
    write_splits(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"one split, got test, train; pass one of them as `split`, or all of them as "
        r"`split='test,train'`",
    ):
        open_source(tmp_path)
    train = open_source(tmp_path, ImagesOptions(split="train"))
    assert [key[:8] for key in train.keys] == ["train-00"] * 2
    assert train.survey.summary == (
        "2 images without labels; left out: 1 file of another split (test-00000-of-00001.parquet)"
    )
    assert len(open_source(tmp_path, ImagesOptions(split="train, test")).keys) == 3
    with pytest.raises(ConfigError, match=r"`split` val: expected one of test, train"):
        open_source(tmp_path, ImagesOptions(split="val"))


def test_a_split_of_a_folder_of_images_is_refused(tmp_path: Path) -> None:
    """A folder of image files has no splits to choose from."""
    (tmp_path / "1.jpg").touch()
    with pytest.raises(ConfigError, match=r"`split` train: \S+ is a folder of image files; pass"):
        open_source(tmp_path, ImagesOptions(split="train"))


def test_tables_beside_images_are_no_images(tmp_path: Path) -> None:
    """Parquet files without a column of images are metadata of tars, and counted."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("000000000.jpg"))
    pq.write_table(pa.table({"key": ["000000000"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").touch()
    source = open_source(tmp_path)
    assert list(source.keys) == ["000000000"]
    assert source.survey.summary == (
        "1 image without labels; left out: 1 file of another name (.json), 1 Parquet file without "
        "images (00000.parquet)"
    )


def test_images_beside_parquet_files_are_counted(tmp_path: Path) -> None:
    """If Parquet files hold the images, image files beside them are counted as left out."""
    write_splits(tmp_path)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "1.png").touch()
    (tmp_path / "2.png").touch()
    source = open_source(tmp_path, ImagesOptions(split="test"))
    assert "2 image files beside Parquet files (2.png, assets/1.png)" in source.survey.summary


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_a_fifo_is_no_file_of_images(tmp_path: Path, name: str) -> None:
    """A FIFO with the name of a table or an archive makes no reader wait."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(ImagesNotFoundError, match="no images under"):
        open_source(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert list(open_source(tmp_path).keys) == ["b.png"]
