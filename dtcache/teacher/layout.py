"""Where a teacher's parts are in its directory, and what a directory holds that is no teacher."""

import re
from collections import deque
from pathlib import Path

from dtcache.errors import TeacherError, TeacherNotFoundError
from dtcache.teacher.diffusers_files import (
    AUXILIARY,
    SINGLE_FILES,
    is_auxiliary,
    read_config,
    single_file_advice,
)

NETWORKS = ("unet", "transformer")
UNUSED_PARTS = ("unet_ema", "controlnet", "adapter", "motion_adapter")
MAX_SEARCHED = 2000
"""Directory entries that the search for a nested model looks at."""


def find_network(root: Path) -> Path:
    """Return the folder of a teacher's network: unet/, transformer/, or the directory itself.

    Raises TeacherNotFoundError, naming what the directory holds instead, if there is no network.
    """
    for name in NETWORKS:
        if (root / name).is_dir():
            return root / name
    if (root / "config.json").is_file():
        return root
    raise TeacherNotFoundError(f"{root}: the network's configuration is missing; {_describe(root)}")


def layout_warnings(root: Path, folder: Path) -> list[str]:
    """Return a warning for each part beside the network in `folder` that dtcache does not use."""
    warnings = [
        f"{root / name} is not used: the features are those of {folder}"
        for name in UNUSED_PARTS
        if (root / name).is_dir()
    ]
    for place in dict.fromkeys((root, folder)):
        warnings += [
            f"{path} is not applied: the features are those of the network without it; to use a "
            "LoRA, call fuse_lora() and save_pretrained() in diffusers"
            for path in sorted(place.iterdir())
            if path.is_file() and is_auxiliary(path.name)
        ]
    return warnings


def _describe(root: Path) -> str:
    """Return what a directory without a network is, and what to pass instead."""
    nested = _nested_model(root)
    if nested is not None:
        return f"a model is in {nested}; pass that directory"
    if (root / "unet_ema").is_dir():
        return (
            "expected unet/, got only unet_ema/, as in a checkpoint of diffusers' training "
            "scripts; copy unet_ema/ to unet/ and add scheduler/ from the model that was trained"
        )
    if (root / "data.zarr").is_dir():
        return "this is a feature cache; pass the teacher that it was extracted with"
    if (root / "run.json").is_file():
        return (
            "this is a run of dtcache without a teacher: a student's run, or a dtcache teacher "
            "train that has saved none yet; pass a teacher"
        )
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    if "adapter_config.json" in names or any(map(is_auxiliary, names)):
        return (
            f"expected a whole model, got only parts added to one ({AUXILIARY}); in diffusers, "
            "load them into their model, call fuse_lora() and save_pretrained()"
        )
    single = [name for name in names if Path(name).suffix in SINGLE_FILES]
    if single:
        return f"expected a directory saved by save_pretrained, {single_file_advice(single[0])}"
    if (root / "model_index.json").is_file():
        pipeline = _pipeline(root)
        return (
            f"expected unet/ or transformer/, got the parts of a {pipeline}; dtcache does not "
            "support this kind of model"
        )
    return "expected a directory saved by save_pretrained, with unet/ or transformer/"


def _pipeline(root: Path) -> str:
    try:
        name = read_config(root / "model_index.json", "the pipeline's configuration")["_class_name"]
    except (KeyError, TeacherError):
        return "pipeline"
    return name if isinstance(name, str) and re.fullmatch(r"\w{1,80}", name) else "pipeline"


def _nested_model(root: Path) -> Path | None:
    """Return the first directory inside `root`, up to three levels down, that holds a network.

    The directories of a Hugging Face cache are models--OWNER--NAME/snapshots/HASH.
    """
    seen = 0
    waiting = deque([(root, 0)])
    while waiting:
        folder, depth = waiting.popleft()
        for path in folder.iterdir():
            seen += 1
            if seen > MAX_SEARCHED:
                return None
            if not path.is_dir() or path.is_symlink():
                continue
            is_network = path.name in NETWORKS and (path / "config.json").is_file()
            if is_network and folder != root:
                return folder
            if (path / "scheduler_config.json").is_file() and (path / "config.json").is_file():
                return path
            if depth < 3:
                waiting.append((path, depth + 1))
    return None
