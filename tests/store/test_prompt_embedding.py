"""The stored embedding of a prompt reads back as written, and any other file is refused."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from store.builders import begin, tiny_plan, write_cache

from dtcache.errors import CacheDamagedError
from dtcache.store.layout import PROMPT
from dtcache.store.prompt_embedding import MAX_BYTES, embedding_bytes, read_embedding
from dtcache.store.writer import CacheWriter

EMBEDDING = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def test_an_embedding_reads_as_it_was_written(tmp_path: Path) -> None:
    """The file is plain safetensors with one tensor, and its bytes are reproducible."""
    (tmp_path / PROMPT).write_bytes(embedding_bytes(EMBEDDING))
    assert np.array_equal(read_embedding(tmp_path), EMBEDDING)
    assert {name: x.tolist() for name, x in load_file(tmp_path / PROMPT).items()} == {
        "embedding": EMBEDDING.tolist()
    }
    assert embedding_bytes(EMBEDDING[:, ::-1]) == embedding_bytes(
        np.ascontiguousarray(EMBEDDING[:, ::-1])
    )


def test_other_files_are_damage(tmp_path: Path) -> None:
    """A missing, truncated, huge or ill-typed embedding is refused with its path."""
    path = tmp_path / PROMPT
    whole = embedding_bytes(EMBEDDING)
    with pytest.raises(
        CacheDamagedError, match=r"prompt\.safetensors: not the embedding of a prompt"
    ):
        read_embedding(tmp_path)
    for content in (b"", whole[:-1], whole[:20]):
        path.write_bytes(content)
        with pytest.raises(
            CacheDamagedError, match=r"prompt\.safetensors: not the embedding of a prompt"
        ):
            read_embedding(tmp_path)
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(
        CacheDamagedError, match=rf"expected at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"
    ):
        read_embedding(tmp_path)
    save_file({"other": EMBEDDING}, path)
    with pytest.raises(CacheDamagedError, match="not the embedding of a prompt"):
        read_embedding(tmp_path)
    for wrong in (EMBEDDING[0], EMBEDDING.astype(np.float64)):
        save_file({"embedding": wrong}, path)
        with pytest.raises(
            CacheDamagedError, match=r"expected fp32 \(tokens, channels\), got float"
        ):
            read_embedding(tmp_path)


def test_the_manifest_hashes_it(tmp_path: Path) -> None:
    """A resume refuses a changed embedding and removes one that a different begun cache left."""
    plan = tiny_plan()
    (tmp_path / PROMPT).write_bytes(b"left by a run that was cut short")
    writer = begin(tmp_path, plan)
    assert not (tmp_path / PROMPT).exists()
    assert PROMPT not in writer.manifest.files
    told = tmp_path / "told"
    told.mkdir()
    CacheWriter.create(told, plan.recipe, plan.arrays, plan.fit, plan.samples, None, EMBEDDING)
    assert np.array_equal(read_embedding(write_cache(told, plan)), EMBEDDING)
    (told / PROMPT).write_bytes(embedding_bytes(EMBEDDING + 1))
    with pytest.raises(
        CacheDamagedError, match=r"prompt\.safetensors: missing or not as the manifest says"
    ):
        CacheWriter.resume(told)
