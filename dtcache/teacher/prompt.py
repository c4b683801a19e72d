"""The embedding of the prompt that conditions a text-conditioned denoiser."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtcache.errors import ConfigError, TeacherError, one_line
from dtcache.teacher.diffusers_files import (
    TEXT_WEIGHTS,
    load_part,
    read_config,
    require_full_precision,
    weight_files,
)

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files that make a tokenizer: one file, or the two of older models."""
MAX_TOKENIZER_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text and its embedding by the teacher's text encoder."""

    text: str
    embedding_LD: NDArray[np.float32]
    """The last hidden states of L tokens."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the values, little-endian fp32 in C order."""
        return hashlib.sha256(np.ascontiguousarray(self.embedding_LD, "<f4").tobytes()).hexdigest()


def require_text_encoder(root: Path) -> None:
    """Check that a directory's prompt can be embedded, before weights are read.

    Raises ConfigError if the `transformers` library is missing, and TeacherError if there is no
    text encoder or if it is of another class than CLIP's.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "a text-conditioned teacher needs the transformers library to embed its prompt; run "
            "pip install 'dtcache[text]'"
        ) from error
    path = root / "text_encoder" / "config.json"
    if not path.is_file() and (root / "image_encoder").is_dir():
        raise TeacherError(
            f"{root}: expected a text encoder, got image_encoder/ alone: this model is conditioned "
            "on images, which dtcache does not support; use a different teacher"
        )
    config = read_config(path, "the text encoder's configuration")
    if "CLIPTextModel" not in (config.get("architectures") or []):
        raise TeacherError(
            f"{path}: expected architectures [CLIPTextModel], got {config.get('architectures')}"
        )
    require_full_precision(path, config)


def embed_prompt(root: Path, text: str) -> Prompt:
    """Run a Stable Diffusion directory's CLIP text encoder on `text`, padded to full length.

    diffusers' pipeline embeds a prompt in the same way. The encoder runs in fp32 on one CPU thread.
    So the embedding is bit-identical on every device that computes the features. Raises ConfigError
    if the `transformers` library is missing or the prompt is too long, and TeacherError if the
    directory cannot be used.
    """
    require_text_encoder(root)
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = root / "text_encoder"
    encoder = load_part(CLIPTextModel, folder, weight_files(folder, TEXT_WEIGHTS))
    tokens = _tokenize(root / "tokenizer", CLIPTokenizer, text)
    if tokens.shape[1] > encoder.config.max_position_embeddings:
        raise TeacherError(
            f"{root / 'tokenizer'}: expected to pad to at most "
            f"{encoder.config.max_position_embeddings} tokens, the length of the text encoder, got "
            f"{tokens.shape[1]}; the two belong to different models, download the teacher again"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            # Without a mask, because Stable Diffusion attends to the padding too.
            embedding_LD = encoder(tokens)[0][0].float().numpy()
    finally:
        torch.set_num_threads(threads)
    return Prompt(text=text, embedding_LD=embedding_LD)


def _tokenize(folder: Path, tokenizer_class: Any, text: str) -> torch.Tensor:
    """Return the token numbers (1, L), padded to the tokenizer's maximum length."""
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise TeacherError(
            f"{folder}: the tokenizer is missing; expected tokenizer.json, or vocab.json and "
            "merges.txt"
        )
    for path in folder.iterdir():
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise TeacherError(
                f"{path}: expected at most {MAX_TOKENIZER_BYTES} bytes, got {path.stat().st_size}"
            )
    try:
        tokenizer = tokenizer_class.from_pretrained(str(folder), local_files_only=True)
        max_length = int(tokenizer.model_max_length)
        tokens = tokenizer(text, padding="max_length", max_length=min(max_length, 4096)).input_ids
    except Exception as error:  # transformers raises many types for damaged files
        raise TeacherError(
            f"{folder}: transformers cannot use this tokenizer ({one_line(error)}); download it "
            "again"
        ) from error
    if len(tokens) > max_length:
        raise ConfigError(
            f"`prompt`: expected at most {max_length} tokens, got {len(tokens)}; shorten it"
        )
    return torch.tensor([tokens], dtype=torch.long)
