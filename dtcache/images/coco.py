"""Objects of images as COCO JSON: boxes, and masks as polygons or run lengths.

N objects per image; boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtcache.errors import ConfigError, ImagesError, one_line
from dtcache.images.decode import MAX_PIXELS, resize_to_view
from dtcache.json_files import read_json
from dtcache.names import is_fit
from dtcache.recipe import Json, ViewSpec

MAX_BYTES = 1 << 30
"""Most bytes of a file; those of COCO 2017 have 470 million."""
MAX_VALUES = 1 << 27
"""Most JSON values of a file, of which polygons have two per corner."""
MAX_OBJECTS = 1000
"""Most objects of an image, which bounds the memory of its masks."""
MAX_NUMBER = 1 << 53
"""Largest id; larger integers are not exact in every JSON reader."""
TOLERANCE = 1.0
"""Pixels that a box or a polygon may exceed its image by, since annotations are rounded."""

Mask = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """The objects of one image, in the pixels of the upright image."""

    height: int
    width: int
    boxes_N4: NDArray[np.float64]
    classes_N: NDArray[np.int64]
    """Class numbers, from 0."""
    crowd_N: NDArray[np.bool_]
    """Regions of many objects: not trained on, and ignored in scores."""
    ids: tuple[Any, ...]
    """Annotation ids, for messages."""
    shapes: tuple[Any, ...]
    """The `segmentation` of each object: polygons, run lengths, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewObjects:
    """The objects of one image in the geometry of the view."""

    boxes_N4: NDArray[np.float32]
    """Boxes clipped to the view."""
    classes_N: NDArray[np.int64]
    crowd_N: NDArray[np.bool_]
    masks_NHW: Mask | None
    """0 or 1; None if masks were not requested."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxFile:
    """The objects of a set of images."""

    path: Path
    names: tuple[str, ...]
    """Class names by number, in the order of their category ids."""
    images: Mapping[str, Objects]
    """By file name; images without an object are in it too."""
    num_empty: int
    """Boxes without an area, which are left out."""

    def in_view(
        self, key: str, view: ViewSpec, size: tuple[int, int], *, masks: bool
    ) -> ViewObjects:
        """Return an image's objects in the view's geometry.

        Objects that the view cuts to less than a pixel are left out. `size` is the (height, width)
        of the upright image. Raises ImagesError if the file has another size, if an object has
        no mask although `masks` are requested, or if its mask cannot be read.
        """
        objects = self.images[key]
        if (objects.height, objects.width) != size:
            raise ImagesError(
                f"{self.path}: expected the size of image {key}, {size[1]}x{size[0]} pixels, got "
                f"{objects.width}x{objects.height}; annotate the upright images"
            )
        left, top, scale_x, scale_y = _geometry(objects.height, objects.width, view)
        scales = np.array([scale_x, scale_y, scale_x, scale_y])
        boxes_N4 = (objects.boxes_N4 - [left, top, left, top]) * scales
        boxes_N4 = boxes_N4.clip(0, [view.width, view.height, view.width, view.height])
        is_kept_N = ((boxes_N4[:, 2:] - boxes_N4[:, :2]) >= 1).all(1)
        masks_NHW: list[Mask] = []
        if masks:
            for number in np.flatnonzero(is_kept_N).tolist():
                mask = self._mask(key, objects, number, view)
                is_kept_N[number] = mask.any()
                masks_NHW += [mask] if is_kept_N[number] else []
        blank = np.zeros((0, view.height, view.width), np.uint8)
        return ViewObjects(
            boxes_N4=boxes_N4[is_kept_N].astype(np.float32),
            classes_N=objects.classes_N[is_kept_N],
            crowd_N=objects.crowd_N[is_kept_N],
            masks_NHW=(np.stack(masks_NHW) if masks_NHW else blank) if masks else None,
        )

    def _mask(self, key: str, objects: Objects, number: int, view: ViewSpec) -> Mask:
        """Return the mask (H, W) of an object in the view, by nearest pixels."""
        title = f"{self.path}: annotation {str(objects.ids[number])[:40]} of image {key}"
        try:
            mask = decode_shape(objects.shapes[number], objects.height, objects.width)
        except ValueError as error:
            raise ImagesError(f"{title}: {one_line(error)}; mend its segmentation") from error
        return np.asarray(resize_to_view(Image.fromarray(mask), view, Image.Resampling.NEAREST))


def read_boxes(path: Path) -> BoxFile:
    """Read the objects of COCO JSON: `images`, `annotations` and `categories`.

    Raises ImagesError for a file that cannot be read, is too large or is not COCO JSON, for a box
    that leaves its image by more than a pixel, and for a file without images or without objects.
    """
    try:
        content = read_json(path, MAX_BYTES, MAX_VALUES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImagesError(
            f"{path}: cannot be read as COCO JSON ({one_line(ValueError(reason))}); pass a file "
            "with images, annotations and categories"
        ) from error
    try:
        return _parsed(path, content)
    except (KeyError, TypeError) as error:
        raise ImagesError(
            f"{path}: not COCO JSON ({one_line(error)}); expected images, annotations and "
            "categories, with the fields of COCO"
        ) from error


def encode_mask(mask: NDArray[np.bool_]) -> Json:
    """Return a mask (H, W) as uncompressed run lengths: column by column, zeros first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = [*changes.tolist(), flat.size]
    counts = np.diff([0, *ends]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[:1].any() else counts}


def decode_shape(shape: Any, height: int, width: int) -> Mask:
    """Return a `segmentation`, polygons or run lengths, as a mask (H, W) of 0 and 1.

    Polygons are filled as pycocotools does it. Raises ValueError for anything else, for another
    size than the image's, and for corners outside the image.
    """
    if isinstance(shape, dict):
        return _decode_runs(shape, height, width)
    if not isinstance(shape, list) or not shape:
        raise ValueError(f"expected a mask, polygons or run lengths, got {str(shape)[:40]!r}")
    polygons = []
    for corners in shape:
        if not isinstance(corners, list) or len(corners) < 6 or len(corners) % 2:
            raise ValueError(
                f"expected polygons of x, y, ... with three corners or more, got "
                f"{str(corners)[:40]!r}"
            )
        xy = np.array([_number("corner", value) for value in corners]).reshape(-1, 2)
        if (xy < -TOLERANCE).any() or (xy > np.array([width, height]) + TOLERANCE).any():
            raise ValueError(
                f"expected corners inside the image of {width}x{height} pixels, got a polygon from "
                f"{xy.min(0).tolist()} to {xy.max(0).tolist()}"
            )
        polygons.append(xy.clip(0, [width, height]).ravel().tolist())
    coco = require_coco()
    filled: Mask = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))
    return filled.reshape(height, width)


def require_coco() -> Any:
    """Return the masks of faster-coco-eval. Raises ConfigError if it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ConfigError(
            f"`task='detection'`: faster-coco-eval cannot be imported ({one_line(error)}); run pip "
            "install 'dtcache[detection]'"
        ) from error
    return mask


def _decode_runs(shape: Json, height: int, width: int) -> Mask:
    """Return run lengths as a mask. Raises ValueError unless they fill the image exactly."""
    if shape.get("size") != [height, width]:
        raise ValueError(
            f"expected a mask of the image's size, [{height}, {width}], got "
            f"{str(shape.get('size'))[:40]}"
        )
    counts = shape.get("counts")
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or any(type(n) is not int or n < 0 for n in counts):
        raise ValueError(f"expected run lengths of 0 or more, got {str(counts)[:40]!r}")
    if sum(counts) != height * width:
        raise ValueError(f"expected run lengths of {height * width} pixels, got {sum(counts)}")
    values = np.arange(len(counts), dtype=np.int64) % 2
    flat = np.repeat(values.astype(np.uint8), counts)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _uncompressed(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed text.

    Each length has 5 bits per character, lowest first, with a bit that says whether more follow;
    from the fourth on it is the difference from the length two before (`rleFrString` of COCO's
    maskApi.c).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError(f"expected compressed run lengths, got {text[:40]!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(f"expected compressed run lengths, got {text[-40:]!r}, which is cut short")
    return counts


def _geometry(height: int, width: int, view: ViewSpec) -> tuple[float, float, float, float]:
    """Return left, top, scale of x and scale of y of the view in its image, as Pillow's `fit`."""
    if view.resize_mode == "stretch":
        return 0.0, 0.0, view.width / width, view.height / height
    scale = max(view.width / width, view.height / height)
    left = (width - view.width / scale) / 2
    top = (height - view.height / scale) / 2
    return left, top, scale, scale


def _parsed(path: Path, content: Json) -> BoxFile:
    lists = {name: content.get(name) for name in ("images", "annotations", "categories")}
    for name, entries in lists.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ImagesError(f"{path}: expected a list of objects as {name}, as in COCO JSON")
        if not entries:
            raise ImagesError(f"{path}: expected {name}, got none; pass annotated images")
    images, annotations, categories = (cast(list[Json], entries) for entries in lists.values())
    numbers, names = _categories(path, categories)
    sizes = _images(path, images)
    by_image: dict[int, list[tuple[Json, list[float]]]] = {number: [] for number in sizes}
    num_empty = 0
    for annotation in annotations:
        title = f"{path}: annotation {str(annotation.get('id'))[:40]}"
        image = annotation["image_id"]
        if type(image) is not int or image not in sizes:
            raise ImagesError(f"{title}: image_id {str(image)[:40]!r} is not the id of an image")
        category = annotation["category_id"]
        if type(category) is not int or category not in numbers:
            raise ImagesError(
                f"{title}: category_id {str(category)[:40]!r} is not the id of a category"
            )
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise ImagesError(f"{title}: iscrowd: expected 0 or 1")
        name, height, width = sizes[image]
        box = _box(f"{title} of image {name}", annotation["bbox"], height, width)
        if box[2] <= box[0] or box[3] <= box[1]:
            num_empty += 1
        else:
            by_image[image].append((annotation, box))
            if len(by_image[image]) > MAX_OBJECTS:
                raise ImagesError(f"{path}: expected at most {MAX_OBJECTS} objects in image {name}")
    if not any(by_image.values()):
        raise ImagesError(f"{path}: expected objects with an area, got none; pass annotated images")
    return BoxFile(
        path=path,
        names=names,
        num_empty=num_empty,
        images={
            name: Objects(
                height=height,
                width=width,
                boxes_N4=np.array([box for _, box in by_image[number]], float).reshape(-1, 4),
                classes_N=np.array(
                    [numbers[entry["category_id"]] for entry, _ in by_image[number]], np.int64
                ),
                crowd_N=np.array(
                    [bool(entry.get("iscrowd", 0)) for entry, _ in by_image[number]], np.bool_
                ),
                ids=tuple(entry.get("id") for entry, _ in by_image[number]),
                shapes=tuple(entry.get("segmentation") for entry, _ in by_image[number]),
            )
            for number, (name, height, width) in sizes.items()
        },
    )


def _categories(path: Path, categories: Sequence[Json]) -> tuple[dict[int, int], tuple[str, ...]]:
    """Return class numbers by category id, and the names in the order of the ids."""
    names: dict[int, str] = {}
    for category in categories:
        number = _id(path, "category", category["id"], names)
        name = category["name"]
        if not isinstance(name, str) or not name or not is_fit(name) or name in names.values():
            raise ImagesError(
                f"{path}: category {number}: expected a name of its own, got {str(name)[:40]!r}"
            )
        names[number] = name
    ordered = sorted(names)
    return {number: i for i, number in enumerate(ordered)}, tuple(names[n] for n in ordered)


def _images(path: Path, images: Sequence[Json]) -> dict[int, tuple[str, int, int]]:
    """Return (file name, height, width) by image id."""
    sizes: dict[int, tuple[str, int, int]] = {}
    seen: set[str] = set()
    for image in images:
        number = _id(path, "image", image["id"], sizes)
        name = image["file_name"]
        if not isinstance(name, str) or not is_fit(name) or name in seen:
            raise ImagesError(
                f"{path}: image {number}: expected a file_name of its own, got {str(name)[:80]!r}"
            )
        seen.add(name)
        height, width = image["height"], image["width"]
        if any(type(side) is not int or side < 1 for side in (height, width)) or (
            height * width > MAX_PIXELS
        ):
            raise ImagesError(
                f"{path}: image {name}: expected a height and a width of 1 or more and at most "
                f"{MAX_PIXELS} pixels, got {str(width)[:20]}x{str(height)[:20]}"
            )
        sizes[number] = (name, height, width)
    return sizes


def _id(path: Path, kind: str, value: Any, seen: Mapping[int, Any]) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER or value in seen:
        raise ImagesError(
            f"{path}: {kind} id {str(value)[:40]!r}: expected an integer of its own, 0 or more"
        )
    return value


def _box(title: str, value: Any, height: int, width: int) -> list[float]:
    """Return x0, y0, x1, y1 of [x, y, width, height], clipped to the image. Raises ImagesError."""
    try:
        if not isinstance(value, list) or len(value) != 4:
            raise ValueError(f"expected [x, y, width, height], got {str(value)[:40]!r}")
        x, y, w, h = (_number("side", number) for number in value)
        if w < 0 or h < 0:
            raise ValueError(f"expected a width and a height of 0 or more, got {w:g} and {h:g}")
    except ValueError as error:
        raise ImagesError(f"{title}: bbox: {one_line(error)}") from error
    if min(x, y) < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        raise ImagesError(
            f"{title}: its box leaves the image of {width}x{height} pixels: [{x:g}, {y:g}, {w:g}, "
            f"{h:g}]; expected [x, y, width, height] in pixels, not two corners"
        )
    return [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError(f"expected a finite number as {name}, got {str(value)[:40]!r}")
    return float(value)
