"""Written scenes: the files of scene(), resumed runs, and folders that are refused."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtcache.errors import ConfigError, DiskError, ImagesError
from dtcache.images.coco import decode_shape
from dtcache.images.scenes import CLASSES, scene
from pipelines.write_scenes import write_scenes


def test_written_files_hold_the_scenes(tmp_path: Path) -> None:
    """The files are exactly the images and masks of scene(), and its boxes as COCO JSON."""
    write_scenes(tmp_path, seed=2, size=32, count=6, start=10)
    coco = json.loads((tmp_path / "boxes.json").read_text())
    objects = {(entry["image_id"], entry["category_id"]): entry for entry in coco["annotations"]}
    assert coco["categories"] == [{"id": 1 + i, "name": name} for i, name in enumerate(CLASSES)]
    assert len({entry["id"] for entry in coco["annotations"]}) == len(coco["annotations"])
    expected = {"boxes.json", "scenes.json", "masks/classes.toml"}
    for index in range(10, 16):
        item = scene(2, index, 32)
        name = f"{CLASSES[item.label]}/{index:06d}.png"
        expected |= {f"images/{name}", f"masks/{name}"}
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / name)), item.pixels)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / name)), item.mask)
        record = {"id": index, "file_name": name, "width": 32, "height": 32}
        assert record in coco["images"]
        for label, (x0, y0, x1, y1) in zip(
            item.box_labels.tolist(), item.boxes.tolist(), strict=True
        ):
            entry = objects.pop((index, 1 + label))
            assert entry["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            mask = decode_shape(entry["segmentation"], 32, 32)
            assert np.array_equal(mask == 1, item.mask == 1 + label)
            assert entry["area"] == mask.sum() and entry["iscrowd"] == 0
    assert {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    } == expected
    assert len(coco["images"]) == 6 and not objects


def test_writing_without_masks_leaves_them_out_and_a_later_run_adds_them(tmp_path: Path) -> None:
    """masks=False writes images only; a later run adds masks and keeps the images."""
    write_scenes(tmp_path, seed=0, size=16, count=3, masks=False)
    images = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/*/*.png")}
    assert len(images) == 3
    assert not (tmp_path / "masks").exists()
    write_scenes(tmp_path, seed=0, size=16, count=3)
    assert len(list(tmp_path.glob("masks/*/*.png"))) == 3
    assert {path: path.stat().st_mtime_ns for path in images} == images


def test_writing_again_skips_finished_files_and_mends_missing_ones(tmp_path: Path) -> None:
    """A second run keeps finished images and older boxes, and rewrites a lost image."""
    write_scenes(tmp_path, seed=0, size=16, count=5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.png")}
    lost = next(iter(before))
    content = lost.read_bytes()
    lost.unlink()
    done: list[int] = []
    write_scenes(tmp_path, seed=0, size=16, count=8, on_progress=done.append)
    assert done == [1] * 8
    assert lost.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != lost)
    assert len(json.loads((tmp_path / "boxes.json").read_text())["images"]) == 8


def test_a_run_cut_short_is_finished_by_the_next(tmp_path: Path) -> None:
    """After a failure between two scenes, a second run gives the files of an uninterrupted run."""

    done: list[int] = []

    def stop(finished: int) -> None:
        done.append(finished)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "cut", seed=0, size=16, count=4, on_progress=stop)
    write_scenes(tmp_path / "cut", seed=0, size=16, count=4)
    write_scenes(tmp_path / "whole", seed=0, size=16, count=4)
    files = [
        {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }
        for root in (tmp_path / "cut", tmp_path / "whole")
    ]
    assert files[0] == files[1]


def test_a_root_with_other_scenes_is_refused(tmp_path: Path) -> None:
    """A root with scenes of another seed or size is refused."""
    write_scenes(tmp_path, seed=0, size=16, count=1)
    with pytest.raises(
        ConfigError, match=r"holds other scenes: expected .*'seed': 1.*, got .*'seed': 0"
    ):
        write_scenes(tmp_path, seed=1, size=16, count=1)
    with pytest.raises(ConfigError, match="holds other scenes"):
        write_scenes(tmp_path, seed=0, size=32, count=1)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    """A folder with files and no scenes, or with damaged records, is refused and left unchanged."""
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not empty and holds no scenes: found manifest\.json"):
        write_scenes(tmp_path, seed=0, size=16, count=1)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    for text in ("{", "[]"):
        (tmp_path / "scenes.json").write_text(text)
        with pytest.raises(ImagesError, match=r"scenes\.json: not a record of scenes"):
            write_scenes(tmp_path, seed=0, size=16, count=1)


@pytest.mark.parametrize("text", ["{}", '{"images": [{}], "annotations": []}', '{"0": {}}'])
def test_boxes_that_are_not_coco_json_are_refused(tmp_path: Path, text: str) -> None:
    """A boxes.json without images and annotations is refused and left unchanged."""
    write_scenes(tmp_path, seed=0, size=16, count=1)
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ImagesError, match=r"boxes\.json: not a record of scenes as COCO JSON"):
        write_scenes(tmp_path, seed=0, size=16, count=2)
    assert (tmp_path / "boxes.json").read_text() == text


def test_impossible_requests_say_what_was_expected(tmp_path: Path) -> None:
    """Sizes under 16 and impossible counts or starts are refused before anything is written."""
    with pytest.raises(ConfigError, match="scene size: expected at least 16 pixels, got 8"):
        write_scenes(tmp_path / "new", seed=0, size=8, count=0)
    with pytest.raises(
        ConfigError, match="`start` 0 and `count` -1: expected 0 or more each, and a sum of at most"
    ):
        write_scenes(tmp_path / "new", seed=0, size=16, count=-1)
    with pytest.raises(ConfigError, match="`start` -2 and `count` 1: expected 0 or more"):
        write_scenes(tmp_path / "new", seed=0, size=16, count=1, start=-2)
    with pytest.raises(ConfigError, match="a sum of at most 10000000"):
        write_scenes(tmp_path / "new", seed=0, size=16, count=10**13)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_refuses_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk error says what could not be written, and a resume finishes the set."""
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="file: expected a folder, got a file; pass a different"):
        write_scenes(tmp_path / "file", seed=0, size=16, count=1)
    assert (tmp_path / "file").read_text() == "precious"

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(
            DiskError,
            match="No space left on device; free some space and run the same command again",
        ):
            write_scenes(tmp_path / "new", seed=0, size=16, count=1)
    write_scenes(tmp_path / "new", seed=0, size=16, count=1)
    assert len(list((tmp_path / "new" / "images").rglob("*.png"))) == 1
