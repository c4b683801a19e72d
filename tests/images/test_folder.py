"""A folder as a source: its images, keys, labels and memory per sample."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images import FolderSource, folder, open_source
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
        ImagesNotFoundError, match=r"no images under .*expected files ending in \.bmp"
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
        p for p in tmp_path.rglob("*") if p.suffix.lower() in folder.EXTENSIONS and p.is_file()
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
        match=r"expected printable UTF-8 file names, got '.*\\.*\.jpg'; rename the file",
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
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 99)
    with pytest.raises(OSError, match="100 bytes, over the limit of 99"):
        FolderSource(tmp_path).read(0)


def test_a_sample_costs_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys of 49 characters, a sample takes under 80 bytes, and under 200 while opening."""
    count = 200_000

    def names(root: Path) -> Iterator[str]:
        return (
            f"class_{i // 1000:08}/n{i // 1000:08}_{i:08}_photograph.jpeg" for i in range(count)
        )

    monkeypatch.setattr(folder, "list_images", names)
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    tracemalloc.start()
    source = FolderSource(Path("images"))
    samples = SampleList(source.keys, source.labels, permuted(count, seed=0, stream="rows"))
    hash_samples(samples)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrow = pa.total_allocated_bytes() - before
    assert source.keys[199_999] == "class_00000199/n00000199_00199999_photograph.jpeg"
    assert (kept + arrow) / count < 80
    assert (most + arrow) / count < 200
    assert pool.bytes_allocated() - before == arrow
