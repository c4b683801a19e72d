"""The files of a teacher: limited in size, checked, and loaded without running their code."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtcache.build_limit import limited_build
from dtcache.errors import TeacherError, TeacherNotFoundError, one_line
from dtcache.hashing import file_sha256, sha256_json
from dtcache.json_files import read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1024
PARTS = ("unet", "transformer", "vae", "vqvae", "scheduler", "text_encoder", "tokenizer")
DOWNLOADED = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    f"{WEIGHTS}.index.json",
    *(f"{part}/*.json" for part in PARTS),
)
"""File patterns that are fetched from a hub repository first: the JSON of the known parts.

No pickles, code, variants, safety checkers or other models are ever fetched."""
AUXILIARY = "LoRA, textual inversion, ControlNet or IP-Adapter"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
LFS_POINTER = b"version https://git-lfs"
HUB_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_AUXILIARY = re.compile(r"lora|adapter_model|learned_embeds|ip[-_]adapter|controlnet", re.I)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True, slots=True)
class TeacherFolder:
    """A teacher's directory; that of a hub repository receives its weights on demand."""

    root: Path
    repository: str | None = None
    """The Hugging Face id; None for a directory of the user."""

    def fetch(self, weights: Iterable[Path], others: Iterable[Path] = ()) -> None:
        """Download weights, as one file or as the shards of their index, and other files.

        The paths are in `root`. Does nothing for a directory of the user. Raises TeacherError if
        the hub does not serve them.
        """
        if self.repository is None:
            return
        weights = list(weights)
        # The folder of a snapshot has the name of its commit.
        revision = self.root.name
        download_from_hub(self.repository, map(self._name, [*weights, *others]), revision)
        indices = {path: path.with_name(f"{path.name}.index.json") for path in weights}
        shards = [
            shard
            for path, index in indices.items()
            if not path.is_file() and index.is_file()
            for shard in _shards(index)
        ]
        if shards:
            download_from_hub(self.repository, map(self._name, shards), revision)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def locate(where: str) -> TeacherFolder:
    """Return the teacher's directory; of a hub id, download the JSON files alone.

    Raises TeacherNotFoundError if there is no such directory or hub model, and TeacherError if the
    hub cannot be reached.
    """
    path = Path(where)
    if path.is_dir():
        return TeacherFolder(path)
    if path.is_file() and path.suffix in SINGLE_FILES:
        raise TeacherNotFoundError(
            f"teacher {where}: expected a diffusers directory, {single_file_advice(path.name)}"
        )
    url = HUB_URL.match(where)
    if url is not None:
        raise TeacherNotFoundError(
            f"teacher {where}: expected a directory or a Hugging Face id, got an address; pass "
            f"{url[1]}"
        )
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", where) or where.startswith("."):
        raise TeacherNotFoundError(
            f"teacher {where}: no such directory; expected a diffusers directory or a Hugging Face "
            "id such as google/ddpm-cat-256"
        )
    return TeacherFolder(download_from_hub(where, DOWNLOADED), where)


def download_from_hub(
    repository: str, patterns: Iterable[str], revision: str | None = None
) -> Path:
    """Download the files that match `patterns` and return the folder of the snapshot.

    Raises TeacherNotFoundError if the hub has no such repository, TeacherError if it cannot be
    reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        # Any other error is a failure of the network or of the disk.
        is_unknown = isinstance(error, RepositoryNotFoundError | ValueError)
        failure = TeacherNotFoundError if is_unknown else TeacherError
        raise failure(
            f"teacher {repository}: not a directory, and the Hugging Face hub did not serve such a "
            f"model ({one_line(error)}); check the name and the network, or pass a directory"
        ) from error


def single_file_advice(name: str) -> str:
    """Return how to turn a checkpoint of one file into a teacher."""
    return (
        f"got {name!r}, a checkpoint in a single file; convert it with diffusers "
        "(StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)), or with "
        "dtcache teacher convert if it is an ADM checkpoint of OpenAI"
    )


def is_auxiliary(name: str) -> bool:
    """Return whether a file of this name holds weights that only add to a model, as LoRA does."""
    return bool(_AUXILIARY.search(name)) and Path(name).suffix in {".safetensors", ".bin", ".pt"}


def read_config(path: Path, title: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return a JSON object of at most `limit` bytes; messages call it `title`.

    Raises TeacherError if the file is missing or its content is not such an object.
    """
    if not path.is_file():
        raise TeacherError(
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
        reason = "dtcache does not support this kind of model"
        if name is None:
            reason = "this is no model of diffusers, such as a student's backbone; pass a teacher"
        raise TeacherError(
            f"{path}: expected _class_name {' or '.join(allowed)}, got {name!r}; {reason}"
        )
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise TeacherError(
                f"{path}: expected finite numbers, got {key} {value}; download it again"
            )
    require_full_precision(path, config)
    return str(name), config


def require_full_precision(path: Path, config: dict[str, Any]) -> None:
    """Raise TeacherError if a part's weights are quantised: other libraries would unpack them."""
    method = config.get("quantization_config")
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise TeacherError(
            f"{path}: expected fp32, fp16 or bf16 weights, got quantised ones ({name!r}); use the "
            "model from which they were quantised"
        )


def weight_files(folder: Path, name: str = WEIGHTS) -> list[Path]:
    """Return the safetensors files of a part: one file, or all files that its index names.

    Raises TeacherError if the part has no weights or only pickles, if it has both one file and an
    index, or if a file is a pointer of Git LFS.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).is_file() and index.is_file():
        raise TeacherError(
            f"{folder}: expected {name} or {index.name} with its shards, got both, which may hold "
            "different weights; delete one of them"
        )
    files: list[Path] = []
    if (folder / name).is_file():
        files = [folder / name]
    elif index.is_file():
        files = _sharded(folder, index)
    for path in files:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise TeacherError(
                    f"{path}: expected weights, got a pointer of Git LFS to them; run git lfs pull "
                    "in the repository, or pass the Hugging Face id"
                )
    if files:
        return files
    if (folder / name).is_symlink():
        raise TeacherError(
            f"{folder / name}: the weights are a link to {(folder / name).readlink()}, which does "
            "not exist; download the teacher again, or copy it with its links followed (cp -rL)"
        )
    pickled = sorted(
        p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix)
    )
    if pickled:
        raise TeacherError(
            f"{folder}: expected {name}, got only pickled weights ({', '.join(pickled)}), which "
            "dtcache never loads because unpickling runs code; load the model where you trust it "
            "and call save_pretrained(safe_serialization=True)"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors") if not is_auxiliary(p.name))
    raise TeacherError(f"{folder / name}: the weights are missing; {_hint(name, others)}")


def _hint(name: str, others: Sequence[str]) -> str:
    """Return the fix for a part that lacks the weights `name` but has safetensors `others`."""
    if not others:
        return (
            "if the repository has only pickles or another variant, load it where you trust it "
            "and save it again with save_pretrained(safe_serialization=True)"
        )
    variant = re.search(r"\.(\w+)[-.]", others[0].removeprefix(name.partition(".")[0]))
    fix = f"rename the file to {name}"
    if _SHARD.search(others[0]):
        argument = f'variant="{variant[1]}"' if variant else "variant=..."
        fix = f"load them with from_pretrained({argument}) and save them with save_pretrained()"
    return f"got {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}; {fix}"


def _sharded(folder: Path, index: Path) -> list[Path]:
    shards = _shards(index)
    for path in shards:
        if not path.is_file():
            raise TeacherError(f"{path}: the weights are missing, but {index.name} names them")
    return shards


def _shards(index: Path) -> list[Path]:
    """Return the paths of the files that an index names, sorted; they may not exist."""
    file_of = read_config(index, "the index of the weights", MAX_INDEX_BYTES).get("weight_map")
    names = sorted({str(name) for name in file_of.values()}) if isinstance(file_of, dict) else []
    odd = next((name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)), None)
    if odd is not None or not 0 < len(names) <= MAX_SHARDS:
        raise TeacherError(
            f"{index}: expected 1 to {MAX_SHARDS} safetensors files beside it, got "
            f"{odd or len(names)}"
        )
    return [index.with_name(name) for name in names]


def load_part(cls: Any, folder: Path, weights: Sequence[Path], **more: Any) -> Any:
    """Return a module of `cls` with every tensor from `weights`.

    The module is fp32, in evaluation mode, frozen, on the CPU. Raises TeacherError if the library
    cannot load the part, or if weights and configuration do not fit together.
    """
    try:
        with limited_build(weights):
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
