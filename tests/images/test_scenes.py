"""Scenes: reproducible, labelled by shape alone, and consistent with their own masks and boxes."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dtcache.errors import ConfigError
from dtcache.images.scenes import CLASSES, Scene, scene

_DIGEST = """
import hashlib
from dtcache.images.scenes import scene
digest = hashlib.sha256()
for index in range(40):
    item = scene(5, index, 48)
    for array in (item.pixels, item.mask, item.boxes, item.box_labels):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def some_scenes() -> list[Scene]:
    """Return the first 600 scenes of one stream."""
    return [scene(3, index) for index in range(600)]


def test_another_process_makes_the_same_scenes() -> None:
    """A scene depends on seed, index and size only, not on the process or its hash seed."""
    digests = [
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env=os.environ
            | {
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert len(digests[0].strip()) == 64
    assert digests[0] == digests[1]


def test_a_scene_does_not_depend_on_those_made_before(some_scenes: list[Scene]) -> None:
    """A scene does not depend on the scenes made before it."""
    alone = scene(3, 400)
    assert np.array_equal(alone.pixels, some_scenes[400].pixels)
    assert np.array_equal(alone.mask, some_scenes[400].mask)
    assert np.array_equal(alone.boxes, some_scenes[400].boxes)


def test_seed_and_index_each_change_the_scene(some_scenes: list[Scene]) -> None:
    """600 scenes are all different, and a different seed gives different scenes."""
    digests = {hashlib.sha256(item.pixels.tobytes()).digest() for item in some_scenes}
    assert len(digests) == 600
    assert not np.array_equal(scene(4, 0).pixels, some_scenes[0].pixels)
    assert not np.array_equal(scene(1, 11).pixels, scene(11, 1).pixels)


@pytest.mark.parametrize("size", [16, 33, 96])
def test_shapes_and_types_at_every_size(size: int) -> None:
    """Every field has the documented shape, type and range, at odd sizes and the smallest too."""
    for index in range(60):
        item = scene(0, index, size)
        assert (item.pixels.shape, item.pixels.dtype) == ((size, size, 3), np.uint8)
        assert (item.mask.shape, item.mask.dtype) == ((size, size), np.uint8)
        assert item.boxes.dtype == item.box_labels.dtype == np.int32
        assert item.boxes.shape == (len(item.box_labels), 4)
        assert 1 <= len(item.boxes) <= 3
        assert 0 <= item.label < len(CLASSES)


def test_the_layout_is_the_same_at_every_size() -> None:
    """A scene at 128 pixels averaged to 32 is nearly the scene at 32; boxes scale by four."""
    for index in range(20):
        small = scene(0, index, 32)
        large = scene(0, index, 128)
        averaged = large.pixels.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
        assert np.abs(averaged - small.pixels).mean() < 4
        assert small.label == large.label
        assert np.abs(large.boxes[-1] / 4 - small.boxes[-1]).max() <= 1


def test_the_label_is_the_class_with_the_largest_visible_area(some_scenes: list[Scene]) -> None:
    """The main object hides the others and is the largest, in every scene."""
    for item in some_scenes:
        areas = np.bincount(item.mask.ravel(), minlength=1 + len(CLASSES))[1:]
        assert areas.argmax() == item.label


def test_every_class_is_about_as_frequent(some_scenes: list[Scene]) -> None:
    """The labels of 600 scenes are uniform within chance."""
    counts = np.bincount([item.label for item in some_scenes], minlength=len(CLASSES))
    assert counts.min() > 0.6 * 600 / len(CLASSES)
    assert counts.max() < 1.4 * 600 / len(CLASSES)


def test_boxes_enclose_the_mask_of_their_class_exactly(some_scenes: list[Scene]) -> None:
    """Each box is the tight box around its class in the mask."""
    for item in some_scenes:
        assert set(item.box_labels + 1) == set(np.unique(item.mask)) - {0}
        assert item.box_labels[-1] == item.label
        for (left, top, right, bottom), label in zip(item.boxes, item.box_labels, strict=True):
            rows, columns = np.nonzero(item.mask == label + 1)
            assert (left, top, right, bottom) == (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )


def test_the_main_object_lies_within_the_frame_and_stands_out(some_scenes: list[Scene]) -> None:
    """The main object is rarely cut by the frame and almost always differs in colour."""
    boxes = np.array([item.boxes[-1] for item in some_scenes])
    assert np.mean((boxes[:, :2] > 0).all(axis=1) & (boxes[:, 2:] < 64).all(axis=1)) > 0.95
    contrasts = [
        np.abs(
            item.pixels[item.mask == item.label + 1].mean(axis=0)
            - item.pixels[item.mask == 0].mean(axis=0)
        ).max()
        for item in some_scenes
    ]
    assert np.mean(np.array(contrasts) > 20) > 0.95


def test_colour_statistics_tell_next_to_nothing_about_the_class(some_scenes: list[Scene]) -> None:
    """A linear classifier on mean and spread of the colours is within a few points of chance."""
    pixels = np.stack([item.pixels for item in some_scenes]).reshape(600, -1, 3) / 255
    labels = np.array([item.label for item in some_scenes])
    statistics = np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)], axis=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(
        statistics[:400], labels[:400]
    )
    assert model.score(statistics[400:], labels[400:]) < 1 / len(CLASSES) + 0.08


def test_the_silhouette_alone_tells_the_class(some_scenes: list[Scene]) -> None:
    """The main object's outline in its box is enough for a nearest-neighbour rule."""
    outlines = []
    for item in some_scenes:
        shape = Image.fromarray(((item.mask == item.label + 1) * 255).astype(np.uint8))
        cut = shape.crop(tuple(item.boxes[-1].tolist())).resize((16, 16), Image.Resampling.BOX)
        outlines.append(np.asarray(cut, np.float32).ravel())
    known = np.stack(outlines[:400])
    asked = np.stack(outlines[400:])
    labels = np.array([item.label for item in some_scenes])
    nearest = ((asked[:, None] - known[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert np.mean(labels[:400][nearest] == labels[400:]) > 0.9


def test_class_names_are_in_the_order_a_folder_tree_gives() -> None:
    """There are eight distinct, sorted class names, so labels agree with the written folders."""
    assert len(CLASSES) == 8
    assert list(CLASSES) == sorted(set(CLASSES))


def test_too_small_scenes_are_refused() -> None:
    """Sizes under 16 are refused with the least size."""
    with pytest.raises(ConfigError, match="scene size: expected at least 16 pixels, got 15"):
        scene(0, 0, 15)
