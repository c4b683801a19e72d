"""A prompt's embedding: what a text-conditioned denoiser is told of every image alike."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtcache.errors import ConfigError, TeacherError, TeacherNotFoundError
from dtcache.teacher.diffusers_files import TEXT_WEIGHTS, load_part, read_config, weight_files

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""What a tokenizer can be made from: its one file, or the two that older models bring."""
MAX_TOKENIZER_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text and what its text encoder made of it, once."""

    text: str
    embedding_LD: NDArray[np.float32]
    """The last hidden states of L tokens."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the values, little-endian fp32 in C order."""
        return hashlib.sha256(np.ascontiguousarray(self.embedding_LD, "<f4").tobytes()).hexdigest()


def embed_prompt(root: Path, text: str) -> Prompt:
    """Run the CLIP text encoder of a Stable Diffusion directory, as its pipeline does: padded to
    the full length.

    In fp32 on one thread of the CPU, so that it is the same number for number whatever computes the
    features. Raises ConfigError without the `transformers` library or for a prompt that is too
    long, TeacherError for the directory.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError(
            "a text-conditioned teacher needs the transformers library, once, to embed its prompt; "
            "pip install 'dtcache[text]'"
        ) from error

    disable_progress_bar()
    folder = root / "text_encoder"
    config = read_config(folder / "config.json", "the text encoder's configuration")
    if "CLIPTextModel" not in (config.get("architectures") or []):
        raise TeacherError(
            f"{folder / 'config.json'}: expected architectures [CLIPTextModel], got "
            f"{config.get('architectures')}"
        )
    encoder = load_part(CLIPTextModel, folder, weight_files(folder, TEXT_WEIGHTS))
    tokens = _tokenize(root / "tokenizer", CLIPTokenizer, text)
    if tokens.shape[1] > encoder.config.max_position_embeddings:
        raise TeacherError(
            f"{root / 'tokenizer'}: pads to {tokens.shape[1]} tokens, but the text encoder takes "
            f"{encoder.config.max_position_embeddings}; the two belong to different models"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            # Stable Diffusion attends to the padding too: no mask.
            embedding_LD = encoder(tokens)[0][0].float().numpy()
    finally:
        torch.set_num_threads(threads)
    return Prompt(text=text, embedding_LD=embedding_LD)


def _tokenize(folder: Path, tokenizer_class: Any, text: str) -> torch.Tensor:
    """Return the token numbers (1, L), padded to the tokenizer's own length."""
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise TeacherNotFoundError(
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
        most = int(tokenizer.model_max_length)
        tokens = tokenizer(text, padding="max_length", max_length=min(most, 4096)).input_ids
    except Exception as error:  # whatever the library makes of damaged files
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(
            f"{folder}: transformers cannot use this tokenizer ({reason})"
        ) from error
    if len(tokens) > most:
        raise ConfigError(
            f"--prompt: expected at most {most} tokens, got {len(tokens)}; shorten it"
        )
    return torch.tensor([tokens], dtype=torch.long)
