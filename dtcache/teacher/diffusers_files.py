"""The files of a teacher: found, bounded, whitelisted and loaded part by part; nothing that they
bring is run.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dtcache.errors import TeacherError, TeacherNotFoundError
from dtcache.hashing import file_sha256, read_json, sha256_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1024
DOWNLOADED = (
    "*.json",
    f"*{WEIGHTS}",
    "*diffusion_pytorch_model-0*-of-*.safetensors",
    f"text_encoder/{TEXT_WEIGHTS}",
    "tokenizer/merges.txt",
)
"""What is fetched of a hub repository: no pickles, no code, no variants, no safety checkers."""


def locate(where: str) -> Path:
    """Return the teacher's directory, downloading JSON and safetensors where a hub id is given."""
    path = Path(where)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", where) or where.startswith("."):
        raise TeacherNotFoundError(
            f"teacher {where}: no such directory; expected a diffusers directory or a Hugging Face "
            "id such as google/ddpm-cat-256"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(where, allow_patterns=list(DOWNLOADED)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise TeacherNotFoundError(
            f"teacher {where}: neither a directory here nor a model that the Hugging Face hub "
            f"served ({reason}); check the name, the network, or give a directory"
        ) from error


def read_config(path: Path, what: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return a JSON object. Raises TeacherNotFoundError where `what` is missing, TeacherError where
    it is not one.
    """
    if not path.is_file():
        raise TeacherNotFoundError(
            f"{path}: {what} is missing; expected a directory saved by save_pretrained"
        )
    try:
        return read_json(path, limit)
    except ValueError as error:
        raise TeacherError(f"{path}: {error}") from error


def read_class(folder: Path, what: str, allowed: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the class name and the configuration of a part. Raises TeacherError for a class that
    is not allowed.

    from_pretrained itself would make one class of another's directory without a word (design: trap
    2).
    """
    path = folder / "config.json"
    config = read_config(path, what)
    name = config.get("_class_name")
    if name not in allowed:
        raise TeacherError(
            f"{path}: expected _class_name {' or '.join(allowed)}, got {name!r}; dtcache cannot "
            "tap this kind of model"
        )
    return str(name), config


def weight_files(folder: Path, name: str = WEIGHTS) -> list[Path]:
    """Return the safetensors of a part: one file, or all that its index names.

    Raises TeacherNotFoundError where there are none, TeacherError where there are only pickles.
    """
    if (folder / name).is_file():
        return [folder / name]
    if (folder / f"{name}.index.json").is_file():
        return _sharded(folder, folder / f"{name}.index.json")
    pickled = sorted(
        p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix)
    )
    if pickled:
        raise TeacherError(
            f"{folder}: only pickled weights ({', '.join(pickled)}), which dtcache never loads "
            f"because unpickling runs code; expected {name}: load the model where you trust it and "
            "save_pretrained(safe_serialization=True)"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"found {', '.join(others)}: rename the full-precision file"
    if not others:
        hint = "where a repository has pickles alone, save it anew with save_pretrained(safe_serialization=True)"
    raise TeacherNotFoundError(f"{folder / name}: the weights are missing; {hint}")


def _sharded(folder: Path, index: Path) -> list[Path]:
    placed = read_config(index, "the index of the weights", MAX_INDEX_BYTES).get("weight_map")
    names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
    odd = next((name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)), None)
    if odd is not None or not 0 < len(names) <= MAX_SHARDS:
        raise TeacherError(
            f"{index}: expected 1 to {MAX_SHARDS} safetensors files beside it, got "
            f"{odd or len(names)}"
        )
    for name in names:
        if not (folder / name).is_file():
            raise TeacherNotFoundError(
                f"{folder / name}: the weights are missing, but {index.name} names them"
            )
    return [folder / name for name in names]


def load_part(cls: Any, folder: Path, weights: Sequence[Path], **more: Any) -> Any:
    """Return a module of `cls`: fp32, in evaluation mode, frozen, on the CPU, every tensor of it
    from `weights`.

    Raises TeacherError where the library cannot load it, or where files and configuration do not
    fit.
    """
    try:
        module, info = cls.from_pretrained(
            str(folder),
            use_safetensors=True,
            output_loading_info=True,
            torch_dtype=torch.float32,
            local_files_only=True,
            **more,
        )
    except (
        Exception
    ) as error:  # whatever the library makes of a truncated or contradictory directory
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(
            f"{folder}: cannot be loaded as {cls.__name__} ({reason}); save or download it again"
        ) from error
    # A missing key would leave uninitialised memory in the network, without a word (design: trap
    # 1).
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise TeacherError(
            f"{weights[0]}: the weights do not fit {folder / 'config.json'}: {len(keys)} {kind}, "
            f"such as {next(iter(keys))}; the two files belong to different models"
        )
    return module.eval().requires_grad_(False)


def hash_weights(root: Path, files: Sequence[Path]) -> str:
    """Return the SHA-256 of a teacher's only weight file, or of the canonical JSON of those of
    several, by path.
    """
    hashes = {path.relative_to(root).as_posix(): file_sha256(path) for path in files}
    return next(iter(hashes.values())) if len(hashes) == 1 else sha256_json(hashes)
