"""Write a data set of generated scenes: images, masks and boxes."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dtcache.atomic_files import disk_errors
from dtcache.errors import ConfigError
from dtcache.images.masks import CLASSES_FILE
from dtcache.images.scenes import CLASSES, VERSION, require_scene_size, scene
from dtcache.options.toml import config_text


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

    The files are images/<class>/<index>.png and masks/<class>/<index>.png. boxes.json maps each
    index to its "label", "boxes" [n][4] and "labels" [n]; masks/classes.toml names the values of
    masks. Finished scenes are skipped, so an interrupted run can be repeated and a set can grow.
    Only one process at a time may write to a root. `on_progress` is called with 1 for each finished
    scene. Raises ConfigError if `size` is under 16, `count` or `start` is negative, or root holds
    scenes of another seed or size, and DiskError if a write fails.
    """
    require_scene_size(size)
    if count < 0 or start < 0:
        raise ConfigError(
            f"scene range: expected start and count of 0 or more, got start {start}, count {count}"
        )
    boxes_path = root / "boxes.json"
    recipe_path = root / "scenes.json"
    recipe = {"seed": seed, "size": size, "version": VERSION}
    # Finished files may be skipped only if they show the requested scenes.
    with disk_errors(root):
        existing = json.loads(recipe_path.read_text()) if recipe_path.exists() else recipe
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
    entries = json.loads(boxes_path.read_text()) if boxes_path.exists() else {}
    for index in range(start, start + count):
        entry = entries.get(str(index))
        if entry is None or not all(
            path.exists() for path in _paths(root, index, entry["label"], masks)
        ):
            item = scene(seed, index, size)
            for path, array in zip(
                _paths(root, index, item.label, masks), (item.pixels, item.mask), strict=False
            ):
                if not path.exists():
                    Image.fromarray(array).save(png := io.BytesIO(), format="PNG")
                    _write(path, png.getvalue())
            entry = {
                "label": item.label,
                "boxes": item.boxes.tolist(),
                "labels": item.box_labels.tolist(),
            }
            entries[str(index)] = entry
        if on_progress is not None:
            on_progress(1)
    _write(boxes_path, json.dumps(entries).encode())


def _paths(root: Path, index: int, label: int, masks: bool) -> list[Path]:
    return [
        root / kind / CLASSES[label] / f"{index:06d}.png"
        for kind in ("images", "masks")[: 1 + masks]
    ]


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")  # not the extension of an image
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
