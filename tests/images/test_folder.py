"""A folder as a source: its images, keys, labels and memory per sample."""

import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images import FolderSource, encoded, folder, open_source
from dtcache.images.encoded import FORMATS
from dtcache.options import ImagesOptions
from dtcache.rng import permuted
from dtcache.samples import SampleList
from dtcache.store.sample_index import hash_samples


def test_class_folders_give_labels(tmp_path: Path) -> None:
    """Top-level folders give alphabetical class indices, and keys are relative POSIX paths."""
    for name in ("cat/b.png", "cat/deep/a.JPG", "ant/x.webp", "ant/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    assert list(source.keys) == ["ant/x.webp", "cat/b.png", "cat/deep/a.JPG"]
    assert (list(source.labels), source.classes) == ([0, 1, 1], ["ant", "cat"])
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
    """A folder without images is refused, with the folder and the extensions in the message."""
    with pytest.raises(
        ImagesNotFoundError, match=r"no images under .*expected files ending in \.apng, \.avif"
    ):
        open_source(tmp_path)


def test_the_order_is_that_of_the_whole_paths(tmp_path: Path) -> None:
    """The order equals pathlib's listing sorted as strings, also for names around the slash."""
    names = [
        "a/b.jpg",
        "a-b/c.jpg",
        "a.b/c.jpg",
        "a.jpg",
        "a0/x.PNG",
        "a/-.jpg",
        "a/a/z.jpeg",
        "a/a.jpg",
        "a/a-/y.jpg",
    ]
    names += [
        "Z.jpg",
        "\u00e9/1.jpg",
        "a/.hidden.jpg",
        ".dot/1.png",
        "a/.jpg",
        "a/jpg",
        "a/x.jpg.txt",
        "a/x.tar.jpg",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("a/b.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("a", target_is_directory=True)
    paths = (
        p
        for p in tmp_path.rglob("*")
        if p.suffix.lower() in folder.EXTENSIONS
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(tmp_path).parts)
    )
    assert list(FolderSource(tmp_path).keys) == sorted(
        p.relative_to(tmp_path).as_posix() for p in paths
    )


def test_classes_sort_as_names(tmp_path: Path) -> None:
    """Labels follow the order of class names, although the keys of a-b sort before those of a."""
    for name in ("a/1.jpg", "a-b/1.jpg", "a-b/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = FolderSource(tmp_path)
    assert list(source.keys) == ["a-b/1.jpg", "a-b/2.jpg", "a/1.jpg"]
    assert (list(source.labels or []), source.classes) == ([1, 1, 0], ["a", "a-b"])


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\x1b[2J.jpg", b"caf\xe9.jpg"])
def test_names_that_cannot_be_printed_are_refused(tmp_path: Path, name: str | bytes) -> None:
    """Names that cannot be stored as UTF-8 or printed are refused."""
    open(bytes(tmp_path) + b"/" + (name if isinstance(name, bytes) else name.encode()), "w").close()
    with pytest.raises(
        ImagesError,
        match=r"UTF-8 file names without control characters, got '.*\\.*\.jpg'; rename it, or",
    ):
        FolderSource(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be listed is refused, so that its images are not silently missing."""
    (tmp_path / "a").mkdir()
    real = folder.os.scandir

    def scandir(path: Path) -> object:
        if path.name == "a":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(folder.os, "scandir", scandir)
    with pytest.raises(
        ImagesError, match=r"/a: cannot be listed \(Permission denied\); make it readable"
    ):
        FolderSource(tmp_path)


def test_a_huge_file_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file over the size limit is a failure and is not read into memory."""
    (tmp_path / "a.jpg").write_bytes(bytes(100))
    monkeypatch.setattr(encoded, "MAX_FILE_BYTES", 99)
    with pytest.raises(OSError, match="100 bytes, over the limit of 99"):
        FolderSource(tmp_path).read(0)


def test_a_sample_costs_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys of 49 characters, a sample takes under 80 bytes, and under 200 while opening."""
    count = 60_000

    def names(listing: object) -> Iterator[str]:
        return (
            f"class_{i // 1000:08}/n{i // 1000:08}_{i:08}_photograph.jpeg" for i in range(count)
        )

    monkeypatch.setattr(folder.Listing, "__iter__", names)
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    tracemalloc.start()
    source = FolderSource(Path("images"))
    samples = SampleList(source.keys, source.labels, permuted(count, seed=0, stream="rows"))
    hash_samples(samples)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrow = pa.total_allocated_bytes() - before
    assert source.keys[59_999] == "class_00000059/n00000059_00059999_photograph.jpeg"
    assert (kept + arrow) / count < 80
    assert (most + arrow) / count < 200
    assert pool.bytes_allocated() - before == arrow


def touch(root: Path, *names: str) -> Path:
    """Make empty files below a folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_extensions_are_those_of_the_decoder() -> None:
    """Every extension that Pillow registers for a decoded format is one of an image."""
    Image.init()
    formats = {name: kind for name, kind in Image.registered_extensions().items()}
    assert {name for name, kind in formats.items() if kind in FORMATS} == folder.EXTENSIONS


def test_hidden_names_are_no_classes(tmp_path: Path) -> None:
    """Hidden folders and __MACOSX give neither classes nor images, and are counted."""
    touch(tmp_path, "cat/1.jpg", "dog/1.jpg", "cat/._1.jpg", ".ipynb_checkpoints/1.jpg")
    touch(tmp_path, "__MACOSX/cat/1.jpg", ".DS_Store")
    source = open_source(tmp_path)
    assert (list(source.keys), source.classes) == (["cat/1.jpg", "dog/1.jpg"], ["cat", "dog"])
    assert "2 images in 2 classes (cat, dog), 1 each; left out: 4 hidden" in source.survey.summary


def test_everything_left_out_is_counted(tmp_path: Path) -> None:
    """Links to folders or to nowhere, special files and other files are counted by reason."""
    touch(tmp_path, "other/x.jpg")
    root = touch(tmp_path / "data", "cat/1.jpg", "cat/2.heic", "dog/1.jpg", "dog/notes")
    (root / "bird").symlink_to("../other", target_is_directory=True)
    (root / "cat" / "3.jpg").symlink_to("/nowhere/3.jpg")
    (root / "cat" / "4.jpg").symlink_to("4.jpg")
    os.mkfifo(root / "dog" / "2.jpg")
    summary = open_source(root).survey.summary
    assert summary.startswith("2 images in 2 classes (cat, dog), 1 each; left out: 1 link to a fol")
    for text in (
        "1 link to a folder (bird)",
        "2 links to nowhere (cat/",
        "2 files of other names (",
        "1 special file (dog/2.jpg)",
        "; `follow_links` reads links to folders",
    ):
        assert text in summary
    assert json.loads(json.dumps(open_source(root).survey.to_json()))["left_out"][
        "links to folders"
    ] == {"count": 1, "examples": ["bird"]}


def test_links_to_folders_can_be_followed(tmp_path: Path) -> None:
    """With follow_links, linked folders are classes; a link to a folder around it ends the walk."""
    touch(tmp_path, "real/bird/1.jpg", "real/cat/1.jpg")
    root = tmp_path / "subset"
    root.mkdir()
    for name in ("bird", "cat"):
        (root / name).symlink_to(f"../real/{name}", target_is_directory=True)
    with pytest.raises(
        ImagesNotFoundError,
        match=r"left out: 2 links to folders \((bird, cat|cat, bird)\); `follow_links` reads",
    ):
        open_source(root)
    (tmp_path / "real" / "cat" / "all").symlink_to("../../subset", target_is_directory=True)
    source = open_source(root, ImagesOptions(follow_links=True))
    assert (list(source.keys), source.classes) == (["bird/1.jpg", "cat/1.jpg"], ["bird", "cat"])
    assert "1 link to a folder around it (cat/all)" in source.survey.summary


def test_a_stray_image_is_named(tmp_path: Path) -> None:
    """An image beside the class folders takes all labels away, and a note says so."""
    source = open_source(touch(tmp_path, "cat/1.jpg", "dog/1.jpg", "overview.png"))
    assert source.labels is None
    assert source.survey.notes[0].startswith(
        "no labels: 2 of 3 images lie in sub-folders, 1 (such as overview.png) beside them"
    )


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["train/cat/1.jpg", "val/cat/1.jpg"], r"the classes train and val have the names of spl"),
        (["0/1.jpg", "2/1.jpg"], r"named by numbers.*class 2 has label 1; pad the names with ze"),
        (["caf\u00e9/1.jpg", "cafe\u0301/1.jpg"], r"two classes are named .* Unicode forms"),
    ],
)
def test_classes_that_may_not_be_meant_are_told(
    tmp_path: Path, names: list[str], note: str
) -> None:
    """Splits as classes, numbers out of order and equal names in two forms give a note."""
    (only,) = open_source(touch(tmp_path, *names)).survey.notes
    assert re.search(note, only)


def test_shards_of_img2dataset_are_no_classes(tmp_path: Path) -> None:
    """Folders that img2dataset numbers, beside their tables, are no classes."""
    touch(tmp_path, "00000/1.jpg", "00000/1.json", "00001/1.jpg")
    pq.write_table(pa.table({"url": ["x"], "key": ["1"]}), tmp_path / "00000.parquet")
    touch(tmp_path, "00001_stats.json")
    source = open_source(tmp_path)
    assert (list(source.keys), source.labels) == (["00000/1.jpg", "00001/1.jpg"], None)
    assert source.survey.notes == ("no labels: the folders 00000, 00001 are shards of img2dataset",)
    assert "1 Parquet file without images (00000.parquet)" in source.survey.summary


def test_archives_in_sub_folders_are_named(tmp_path: Path) -> None:
    """A Hub clone, whose Parquet files lie in data/, is refused with the folder to pass."""
    touch(tmp_path, "README.md", "data/x.txt")
    image = pa.array([{"bytes": b"1", "path": "1"}])
    pq.write_table(pa.table({"image": image}), tmp_path / "data" / "train.parquet")
    with pytest.raises(
        ImagesNotFoundError, match=r"the Parquet files lie in data/; pass \S+/data$"
    ):
        open_source(tmp_path)
    touch(tmp_path, "assets/example.png")
    with pytest.raises(
        ImagesError, match=r"got 1 image files, and Parquet files in data/; pass \S+/data, or a"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "Screenshot at 3.15\u202fPM",
        "\u5199\u771f\u30001",
        "\U0001f468\u200d\U0001f469",
        "\u200f\u0635",
    ],
)
def test_names_of_all_alphabets_are_read(tmp_path: Path, name: str) -> None:
    """Unusual spaces, joiners, emoji and directions are no control characters."""
    assert list(open_source(touch(tmp_path, f"a/{name}.png")).keys) == [f"a/{name}.png"]
