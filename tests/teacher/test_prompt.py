"""A prompt's embedding equals Stable Diffusion's text encoder; unsuitable encoders are refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher.kinds import TEXT_CHANNELS, TOKENS, edit, save_stable_diffusion

from dtcache.errors import ConfigError, TeacherError
from dtcache.teacher import Prompt, load_teacher
from dtcache.teacher.diffusers_files import TEXT_WEIGHTS
from dtcache.teacher.prompt import embed_prompt

START = "<|startoftext|>"
END = "<|endoftext|>"
VOCABULARY = {
    START: 0,
    END: 1,
    **{letter: 2 + i for i, letter in enumerate(["a", "c", "t", "a</w>", "c</w>", "t</w>"])},
}


def save_text_encoder(root: Path) -> Any:
    """Write a small CLIP text encoder and tokenizer in Stable Diffusion's layout; return it."""
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=TEXT_CHANNELS,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    encoder.save_pretrained(root / "text_encoder")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text(json.dumps(VOCABULARY))
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer", **special}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return encoder


@pytest.fixture
def text(tmp_path: Path) -> Any:
    """The text encoder in `tmp_path`."""
    pytest.importorskip("transformers")
    return save_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("", [0, 1, 1, 1, 1, 1, 1]), ("A cat", [0, 5, 3, 2, 7, 1, 1])]
)
def test_the_embedding_is_the_text_encoders(
    text: Any, tmp_path: Path, prompt: str, tokens: list[int]
) -> None:
    """The embedding is the last hidden states of the padded tokens for any thread count."""
    with torch.inference_mode():
        wanted = text(torch.tensor([tokens]))[0][0].numpy()
    threads = torch.get_num_threads()
    found = embed_prompt(tmp_path, prompt)
    assert torch.get_num_threads() == threads
    assert (found.text, found.embedding_LD.shape) == (prompt, (TOKENS, TEXT_CHANNELS))
    assert found.embedding_LD == pytest.approx(wanted, abs=1e-6)


def test_weights_of_stable_diffusions_age_load(text: Any, tmp_path: Path) -> None:
    """Weights with the older text_model. prefix and position ids load as the same encoder."""
    wanted = embed_prompt(tmp_path, "cat")
    path = tmp_path / "text_encoder" / TEXT_WEIGHTS
    old = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in load_file(path).items()
    }
    old["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    save_file(old, path, metadata={"format": "pt"})
    assert embed_prompt(tmp_path, "cat").sha256 == wanted.sha256


def test_the_prompt_is_embedded_where_the_teacher_is_loaded(text: Any, tmp_path: Path) -> None:
    """The prompt is empty by default, and a stored embedding is used only for the same text."""
    save_stable_diffusion(tmp_path)
    empty, cat = (load_teacher(str(tmp_path), prompt=prompt).prompt for prompt in (None, "cat"))
    assert empty is not None
    assert cat is not None
    assert (empty.text, cat.text) == ("", "cat")
    assert empty.sha256 != cat.sha256
    stored = Prompt(text="cat", embedding_LD=cat.embedding_LD + 1)
    assert load_teacher(str(tmp_path), prompt="cat", stored=stored).prompt is stored
    assert load_teacher(str(tmp_path), prompt="a", stored=stored).prompt is not stored


def other_class(root: Path) -> None:
    edit(
        root / "text_encoder" / "config.json", lambda c: c.update(architectures=["T5EncoderModel"])
    )


def no_weights(root: Path) -> None:
    (root / "text_encoder" / TEXT_WEIGHTS).rename(root / "text_encoder" / "pytorch_model.bin")


def fewer_weights(root: Path) -> None:
    path = root / "text_encoder" / TEXT_WEIGHTS
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "final_layer_norm.bias" in name)]
    save_file(tensors, path, metadata={"format": "pt"})


def no_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "merges.txt").unlink()


def broken_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "vocab.json").write_text("{")


def huge_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "merges.txt").write_bytes(b"\n" * ((16 << 20) + 1))


def long_tokenizer(root: Path) -> None:
    edit(
        root / "tokenizer" / "tokenizer_config.json",
        lambda c: c.update(model_max_length=TOKENS + 1),
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_class, r"expected architectures \[CLIPTextModel\], got \['T5EncoderModel'\]"),
        (
            no_weights,
            r"expected model\.safetensors, got only pickled weights \(pytorch_model\.bin\), which "
            r"dtcache never loads",
        ),
        (
            fewer_weights,
            r"the weights do not fit .*: 1 missing_keys, such as .*final_layer_norm\.bias",
        ),
        (
            no_tokenizer,
            r"tokenizer: the tokenizer is missing; expected tokenizer\.json, or vocab\.json and "
            r"merges\.txt",
        ),
        (broken_tokenizer, r"tokenizer: transformers cannot use this tokenizer \("),
        (huge_tokenizer, r"merges\.txt: expected at most 16777216 bytes, got 16777217"),
        (
            long_tokenizer,
            r"expected to pad to at most 7 tokens, .*, got 8; the two belong to different models",
        ),
    ],
)
def test_a_bad_text_encoder_is_refused(
    text: Any, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """A part that is missing, pickled, damaged or of another model is refused by name."""
    damage(tmp_path)
    with pytest.raises(TeacherError, match=message):
        embed_prompt(tmp_path, "cat")


def test_a_prompt_that_is_too_long_is_refused(text: Any, tmp_path: Path) -> None:
    """A prompt that is too long is refused, not truncated."""
    with pytest.raises(
        ConfigError, match=r"`prompt`: expected at most 7 tokens, got 10; shorten it"
    ):
        embed_prompt(tmp_path, "a cat a cat")


def test_without_transformers_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without transformers, embedding a prompt names the extra to install."""
    save_stable_diffusion(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ConfigError,
        match=(
            r"needs the transformers library to embed its prompt; run pip install "
            r"'dtcache\[text\]'"
        ),
    ):
        load_teacher(str(tmp_path))
