"""The files of a teacher: limited in size, checked, and loaded without running their code."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dtcache.errors import TeacherError, TeacherNotFoundError, one_line
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
"""File patterns fetched from a hub repository: no pickles, code, variants or safety checkers."""


def locate(where: str) -> Path:
    """Return the teacher's directory; download JSON and safetensors if `where` is a hub id.

    Raises TeacherNotFoundError if there is no such directory or hub model.
    """
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
            f"teacher {where}: not a directory, and the Hugging Face hub did not serve such a "
            f"model ({reason}); check the name and the network, or pass a directory"
        ) from error


def read_config(path: Path, title: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return a JSON object of at most `limit` bytes; messages call it `title`.

    Raises TeacherNotFoundError if the file is missing, TeacherError if its content is not such an
    object.
    """
    if not path.is_file():
        raise TeacherNotFoundError(
            f"{path}: {title} is missing; expected a directory saved by save_pretrained"
        )
    try:
        return read_json(path, limit)
    except ValueError as error:
        raise TeacherError(f"{path}: {error}") from error


def read_class(folder: Path, title: str, allowed: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the class name and the configuration of a part.

    Raises TeacherError if the class is not allowed: `from_pretrained` alone would build one class
    from the directory of another without a warning.
    """
    path = folder / "config.json"
    config = read_config(path, title)
    name = config.get("_class_name")
    if name not in allowed:
        raise TeacherError(
            f"{path}: expected _class_name {' or '.join(allowed)}, got {name!r}; dtcache does not "
            "support this kind of model"
        )
    return str(name), config


def weight_files(folder: Path, name: str = WEIGHTS) -> list[Path]:
    """Return the safetensors files of a part: one file, or all files that its index names.

    Raises TeacherNotFoundError if the part has no weights, and TeacherError if it has only pickles.
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
            f"{folder}: expected {name}, got only pickled weights ({', '.join(pickled)}), which "
            "dtcache never loads because unpickling runs code; load the model where you trust it "
            "and call save_pretrained(safe_serialization=True)"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"got {', '.join(others)}; rename the full-precision file"
    if not others:
        hint = (
            "if the repository has only pickles, save it again with "
            "save_pretrained(safe_serialization=True)"
        )
    raise TeacherNotFoundError(f"{folder / name}: the weights are missing; {hint}")


def _sharded(folder: Path, index: Path) -> list[Path]:
    file_of = read_config(index, "the index of the weights", MAX_INDEX_BYTES).get("weight_map")
    names = sorted({str(name) for name in file_of.values()}) if isinstance(file_of, dict) else []
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
    """Return a module of `cls` with every tensor from `weights`.

    The module is fp32, in evaluation mode, frozen, on the CPU. Raises TeacherError if the library
    cannot load the part, or if weights and configuration do not fit together.
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
    except Exception as error:  # the libraries raise many types for damaged directories
        raise TeacherError(
            f"{folder}: cannot be loaded as {cls.__name__} ({one_line(error)}); save or download "
            "it again"
        ) from error
    # from_pretrained leaves a missing tensor uninitialised, without an error.
    mismatches = {kind: keys for kind, keys in info.items() if keys}
    if mismatches:
        kind, keys = next(iter(mismatches.items()))
        raise TeacherError(
            f"{weights[0]}: the weights do not fit {folder / 'config.json'}: {len(keys)} {kind}, "
            f"such as {next(iter(keys))}; the two files belong to different models"
        )
    return module.eval().requires_grad_(False)


def hash_weights(root: Path, files: Sequence[Path]) -> str:
    """Return one SHA-256 for the weight files of a teacher.

    For one file this is the file's hash; for several files, the hash of the canonical JSON of their
    hashes by path.
    """
    hashes = {path.relative_to(root).as_posix(): file_sha256(path) for path in files}
    return next(iter(hashes.values())) if len(hashes) == 1 else sha256_json(hashes)
