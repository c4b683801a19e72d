"""Write a data set of generated scenes: images, masks and boxes."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dtcache.atomic_files import disk_errors, is_system_file
from dtcache.errors import ConfigError, ImagesError, one_line
from dtcache.images.coco import encode_mask
from dtcache.images.masks import CLASSES_FILE
from dtcache.images.scenes import CLASSES, VERSION, Scene, require_scene_size, scene
from dtcache.options.field import MAX_SCENES
from dtcache.options.toml import config_text
from dtcache.recipe import Json

RECIPE = "scenes.json"
"""The file of a set of scenes that records their seed, size and version."""
MOST_OBJECTS = 10
"""Ids of annotations that an image has; a scene has at most three objects."""


def write_scenes(
    root: Path,
    *,
    seed: int,
    size: int,
    count: int,
    start: int = 0,
    masks: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write scenes start .. start + count - 1 as PNG images and masks, with boxes.json.

    The files are images/<class>/<index>.png and masks/<class>/<index>.png; masks/classes.toml names
    the values of masks. boxes.json is COCO JSON: the id of an image is its index, that of a
    category 1 + the class, and each object has its box, area and mask as run lengths. Finished
    scenes are skipped, so an interrupted run can be repeated and a set can grow. Only one process
    at a time may write to a root. `on_progress` is called with 1 for each finished scene. Raises
    ConfigError if `size` is under 16, if `count` or `start` is negative, if their sum exceeds
    `MAX_SCENES`, or if root holds scenes of another seed or size or other files, ImagesError if the
    records in root are damaged, and DiskError if a write fails.
    """
    require_scene_size(size)
    if count < 0 or start < 0 or start + count > MAX_SCENES:
        raise ConfigError(
            f"`start` {start} and `count` {count}: expected 0 or more each, and a sum of at most "
            f"{MAX_SCENES}; pass other numbers"
        )
    _require_scenes(root)
    boxes_path = root / "boxes.json"
    recipe_path = root / RECIPE
    recipe = {"seed": seed, "size": size, "version": VERSION}
    # Finished files may be skipped only if they show the requested scenes.
    existing = _read(recipe_path, recipe)
    if existing != recipe:
        raise ConfigError(
            f"{root} holds other scenes: expected {recipe}, got {existing}; pass a different "
            "directory"
        )
    _write(recipe_path, json.dumps(recipe).encode())
    if masks:
        _write(
            root / "masks" / CLASSES_FILE, config_text({"names": ("background", *CLASSES)}).encode()
        )
    images, objects = _read_boxes(boxes_path)
    for index in range(start, start + count):
        image = images.get(index)
        if image is None or not all(
            path.exists() for path in _paths(root, image["file_name"], masks)
        ):
            item = scene(seed, index, size)
            image = {
                "id": index,
                "file_name": f"{CLASSES[item.label]}/{index:06d}.png",
                "width": size,
                "height": size,
            }
            for path, array in zip(
                _paths(root, image["file_name"], masks), (item.pixels, item.mask), strict=False
            ):
                if not path.exists():
                    Image.fromarray(array).save(png := io.BytesIO(), format="PNG")
                    _write(path, png.getvalue())
            images[index] = image
            objects[index] = _annotations(index, item)
        if on_progress is not None:
            on_progress(1)
    order = sorted(images)
    coco = {
        "images": [images[index] for index in order],
        "annotations": [entry for index in order for entry in objects[index]],
        "categories": [{"id": 1 + i, "name": name} for i, name in enumerate(CLASSES)],
    }
    _write(boxes_path, json.dumps(coco).encode())


def _annotations(index: int, item: Scene) -> list[Json]:
    """Return the objects of a scene as COCO annotations. Each class is in a scene at most once."""
    annotations = []
    for number, (label, (x0, y0, x1, y1)) in enumerate(
        zip(item.box_labels.tolist(), item.boxes.tolist(), strict=True)
    ):
        mask = item.mask == 1 + label
        annotations.append(
            {
                "id": MOST_OBJECTS * index + number + 1,
                "image_id": index,
                "category_id": 1 + label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": encode_mask(mask),
            }
        )
    return annotations


def _read_boxes(path: Path) -> tuple[dict[int, Json], dict[int, list[Json]]]:
    """Return the images and the objects of boxes.json by index, none if there is no file."""
    content = _read(path, {"images": [], "annotations": []})
    try:
        images = {
            int(image["id"]): {**image, "file_name": str(image["file_name"])}
            for image in content["images"]
        }
        objects: dict[int, list[Json]] = {index: [] for index in images}
        for annotation in content["annotations"]:
            objects[annotation["image_id"]].append(annotation)
    except (KeyError, TypeError, ValueError) as error:
        raise ImagesError(
            f"{path}: not a record of scenes as COCO JSON ({one_line(error)}); pass a different "
            "directory"
        ) from error
    return images, objects


def _require_scenes(root: Path) -> None:
    """Raise ConfigError if a folder holds other files than scenes, or if it is a file."""
    with disk_errors(root):
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root}: expected a folder, got a file; pass a different directory")
        entries = root.iterdir() if root.exists() else ()
        names = {p.name for p in entries if not is_system_file(p.name)}
    # RECIPE is written first, through a temporary file.
    others = sorted(names - {Path(RECIPE).with_suffix(".tmp").name})
    if others and RECIPE not in names:
        raise ConfigError(
            f"{root} is not empty and holds no scenes: found {others[0]}; pass a different "
            "directory"
        )


def _read(path: Path, default: Json) -> Json:
    """Return the JSON object in a file, or `default` without one. Raises ImagesError."""
    with disk_errors(path):
        text = path.read_text() if path.exists() else None
    try:
        value = json.loads(text) if text is not None else default
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ImagesError(
            f"{path}: not a record of scenes ({error}); pass a different directory"
        ) from error
    return value


def _paths(root: Path, name: str, masks: bool) -> list[Path]:
    return [root / kind / name for kind in ("images", "masks")[: 1 + masks]]


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")  # not the extension of an image
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
