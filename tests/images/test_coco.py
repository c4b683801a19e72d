"""COCO JSON: boxes and masks in the view, run lengths, and files that are refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dtcache.errors import ImagesError
from dtcache.images import coco as coco_module
from dtcache.images.coco import decode_shape, encode_mask, read_boxes
from dtcache.images.decode import resize_to_view
from dtcache.recipe import ViewSpec

Json = dict[str, Any]
STRETCHED = ViewSpec(height=10, width=40, resize_mode="stretch")
CROPPED = ViewSpec(height=10, width=10, resize_mode="crop")


def content() -> Json:
    """Return two images of 20 x 10 pixels: three objects, one of them a crowd, and none."""
    runs = {"size": [10, 20], "counts": [0, 100, 100]}
    return {
        "images": [
            {"id": 7, "file_name": "a/1.png", "width": 20, "height": 10},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 10},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 9,
                "bbox": [6, 2, 4, 4],
                "segmentation": [[6, 2, 10, 2, 10, 6, 6, 6]],
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 2,
                "bbox": [0, 0, 10, 10],
                "segmentation": runs,
            },
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [0, 0, 3, 10], "iscrowd": 1},
        ],
    }


def written(root: Path, values: object) -> Path:
    """Write a JSON file and return its path."""
    path = root / "boxes.json"
    path.write_text(json.dumps(values))
    return path


def test_objects_are_read_by_file_name(tmp_path: Path) -> None:
    """Classes are numbered by category id; an image without annotations has no objects."""
    boxes = read_boxes(written(tmp_path, content()))
    assert boxes.names == ("cat", "dog") and set(boxes.images) == {"a/1.png", "b.png"}
    objects = boxes.images["a/1.png"]
    assert objects.boxes_N4.tolist() == [[6, 2, 10, 6], [0, 0, 10, 10], [0, 0, 3, 10]]
    assert objects.classes_N.tolist() == [1, 0, 0]
    assert objects.crowd_N.tolist() == [False, False, True]
    assert boxes.images["b.png"].boxes_N4.shape == (0, 4)
    empty = boxes.in_view("b.png", STRETCHED, (10, 20), masks=True)
    assert empty.boxes_N4.shape == (0, 4)
    assert empty.masks_NHW is not None and empty.masks_NHW.shape == (0, 10, 40)


def test_the_view_stretches_or_crops_boxes_and_masks(tmp_path: Path) -> None:
    """Boxes follow the view's geometry, and objects outside the crop are left out."""
    boxes = read_boxes(written(tmp_path, content()))
    stretched = boxes.in_view("a/1.png", STRETCHED, (10, 20), masks=False)
    assert stretched.boxes_N4.tolist() == [[12, 2, 20, 6], [0, 0, 20, 10], [0, 0, 6, 10]]
    assert stretched.masks_NHW is None
    # The centre crop of 20 x 10 to 10 x 10 takes the columns from 5 to 14.
    cropped = boxes.in_view("a/1.png", CROPPED, (10, 20), masks=False)
    assert cropped.boxes_N4.tolist() == [[1, 2, 5, 6], [0, 0, 5, 10]]
    assert cropped.classes_N.tolist() == [1, 0] and not cropped.crowd_N.any()


@pytest.mark.parametrize("size", [(20, 10), (13, 29), (31, 7)])
@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
def test_the_geometry_is_that_of_the_images(
    tmp_path: Path, size: tuple[int, int], resize_mode: Any
) -> None:
    """A box in the view surrounds the same pixels as in the resized image, to one pixel."""
    height, width = size
    view = ViewSpec(height=32, width=24, resize_mode=resize_mode)
    image = np.zeros(size, np.uint8)
    x, y = width // 2 - 2, height // 2 - 2
    image[y : y + 4, x : x + 4] = 255
    resized = resize_to_view(Image.fromarray(image), view, Image.Resampling.NEAREST)
    values = content()
    values["images"] = [{"id": 7, "file_name": "a", "width": width, "height": height}]
    values["annotations"] = [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [x, y, 4, 4]}]
    boxes = read_boxes(written(tmp_path, values))
    (box,) = boxes.in_view("a", view, size, masks=False).boxes_N4.tolist()
    np.testing.assert_allclose(box, resized.getbbox(), atol=1)


def test_masks_are_polygons_or_run_lengths(tmp_path: Path) -> None:
    """A polygon fills its corners, and run lengths go down the columns."""
    pytest.importorskip("faster_coco_eval")
    values = content()
    values["annotations"].pop()
    boxes = read_boxes(written(tmp_path, values))
    same = ViewSpec(height=10, width=20, resize_mode="stretch")
    masks = boxes.in_view("a/1.png", same, (10, 20), masks=True).masks_NHW
    assert masks is not None
    square = np.zeros((10, 20), np.uint8)
    square[2:6, 6:10] = 1
    left = np.zeros((10, 20), np.uint8)
    left[:, :10] = 1
    np.testing.assert_array_equal(masks, [square, left])


def test_run_lengths_are_those_of_coco() -> None:
    """Run lengths, plain and compressed, decode as faster-coco-eval decodes them."""
    library = pytest.importorskip("faster_coco_eval.core.mask")
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((37, 53)) < density
        plain = encode_mask(mask)
        assert np.array_equal(decode_shape(plain, 37, 53), mask)
        compressed = library.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {"size": [37, 53], "counts": compressed["counts"].decode()}
        assert np.array_equal(decode_shape(text, 37, 53), mask)
        assert np.array_equal(library.decode(library.frPyObjects(plain, 37, 53)), mask)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, r"expected a mask, polygons or run lengths, got 'None'"),
        ([[0, 0, 1, 1]], r"expected polygons of x, y, \.\.\. with three corners"),
        ([[0, 0, 1, 1, 2]], r"expected polygons"),
        ([[0, 0, 90, 0, 0, 9]], r"expected corners inside the image of 5x4 pixels"),
        ([[0, 0, float("nan"), 0, 0, 3]], r"expected a finite number as corner"),
        ({"size": [5, 4], "counts": [20]}, r"expected a mask of the image's size, \[4, 5\]"),
        ({"size": [4, 5], "counts": [21]}, r"expected run lengths of 20 pixels, got 21"),
        ({"size": [4, 5], "counts": [-1, 21]}, r"expected run lengths of 0 or more"),
        ({"size": [4, 5], "counts": [10**18, 1]}, r"expected run lengths of 20 pixels"),
        ({"size": [4, 5], "counts": "\x1b["}, r"expected compressed run lengths"),
        ({"size": [4, 5], "counts": "oooo"}, r"which is cut short"),
        ({"size": [4, 5], "counts": "o" * 99}, r"expected compressed run lengths"),
    ],
)
def test_masks_that_do_not_fit_their_image_are_refused(shape: object, message: str) -> None:
    """A mask of another size, or that is none, is refused before its memory is taken."""
    with pytest.raises(ValueError, match=message):
        decode_shape(shape, 4, 5)


def changed(name: str, number: int, /, **values: object) -> Callable[[Json], None]:
    """Return a change of one entry of a list of COCO JSON."""
    return lambda content: content[name][number].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), r"expected a list of objects as images"),
        (lambda c: c.update(images=[]), r"expected images, got none"),
        (lambda c: c.update(annotations=[]), r"expected annotations, got none"),
        (lambda c: c.update(categories=[]), r"expected categories, got none"),
        (lambda c: c.update(annotations=[1]), r"expected a list of objects as annotations"),
        (changed("images", 1, id=7), r"image id '7': expected an integer of its own"),
        (changed("images", 1, id=True), r"image id 'True'"),
        (changed("images", 1, file_name="a/1.png"), r"image 3: expected a file_name of its own"),
        (changed("images", 1, file_name="\x1b[2J"), r"image 3: expected a file_name of its own"),
        (changed("images", 1, width=10**9), r"image b.png: expected a height and a width"),
        (changed("images", 1, width=0), r"image b.png: expected a height and a width"),
        (changed("categories", 0, name="cat"), r"category 2: expected a name of its own"),
        (changed("categories", 0, id=2), r"category id '2'"),
        (changed("annotations", 0, image_id=8), r"annotation 1: image_id '8' is not the id of an"),
        (changed("annotations", 0, category_id=1), r"annotation 1: category_id '1' is not the id"),
        (changed("annotations", 0, iscrowd=2), r"annotation 1: iscrowd: expected 0 or 1"),
        (changed("annotations", 0, bbox=[1, 2, 3]), r"image a/1.png: bbox: expected \[x, y, wid"),
        (changed("annotations", 0, bbox=[1, 2, 3, "4"]), r"bbox: expected a finite number as side"),
        (changed("annotations", 0, bbox=[5, 5, -3, 4]), r"bbox: expected a width and a height of"),
        (
            changed("annotations", 0, bbox=[6, 2, 16, 6]),
            r"its box leaves the image of 20x10 pixels: \[6, 2, 16, 6\]; expected \[x, y, width",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), r"not COCO JSON \('bbox'\)"),
        (
            lambda c: [annotation.update(bbox=[1, 1, 0, 5]) for annotation in c["annotations"]],
            r"expected objects with an area, got none",
        ),
    ],
)
def test_files_that_are_not_coco_json_are_refused(
    tmp_path: Path, change: Callable[[Json], None], message: str
) -> None:
    """Each error names the file, the entry and what was expected, on one line."""
    values = copy.deepcopy(content())
    change(values)
    with pytest.raises(ImagesError, match=message) as caught:
        read_boxes(written(tmp_path, values))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing file, a folder, no JSON, too many bytes and too many objects are refused."""
    with pytest.raises(ImagesError, match=r"none: cannot be read as COCO JSON \(No such file"):
        read_boxes(tmp_path / "none")
    with pytest.raises(ImagesError, match=r"cannot be read as COCO JSON \(expected a file, got a"):
        read_boxes(tmp_path)
    (tmp_path / "text").write_text("{")
    with pytest.raises(ImagesError, match=r"cannot be read as COCO JSON \(not JSON"):
        read_boxes(tmp_path / "text")
    path = written(tmp_path, content())
    with monkeypatch.context() as patch:
        patch.setattr(coco_module, "MAX_OBJECTS", 2)
        with pytest.raises(ImagesError, match=r"expected at most 2 objects in image a/1\.png"):
            read_boxes(path)
    monkeypatch.setattr(coco_module, "MAX_BYTES", 10)
    with pytest.raises(ImagesError, match=r"expected at most 10 bytes"):
        read_boxes(path)


def test_boxes_without_an_area_are_counted_and_left_out(tmp_path: Path) -> None:
    """COCO has a few boxes of no width; they do not stop the evaluation."""
    values = content()
    values["annotations"][0]["bbox"] = [6, 2, 0, 4]
    boxes = read_boxes(written(tmp_path, values))
    assert boxes.num_empty == 1 and boxes.images["a/1.png"].ids == (2, 3)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    """Width and height in the file must be those of the upright image."""
    boxes = read_boxes(written(tmp_path, content()))
    with pytest.raises(ImagesError, match=r"image b.png, 10x20 pixels, got 20x10; annotate"):
        boxes.in_view("b.png", STRETCHED, (20, 10), masks=False)
    with pytest.raises(ImagesError, match=r"annotation 3 of image a/1.png: expected a mask, polyg"):
        boxes.in_view("a/1.png", STRETCHED, (10, 20), masks=True)
