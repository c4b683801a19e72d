"""The codec's file: written and read back, and refused before memory is allocated."""

from pathlib import Path

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load, save
from store.builders import COARSE, FINE, tiny_plan

from dtcache.store.codec_file import codec_bytes, read_fit
from dtcache.store.layout import CODEC

MOST = {FINE: 1 << 16, COARSE: 1 << 16}


def written(root: Path, content: bytes) -> Path:
    """Write a codec's file into a folder and return the folder."""
    (root / CODEC).write_bytes(content)
    return root


def changed(**tensors: np.ndarray | None) -> bytes:
    """Return the tiny cache's file with tensors of the fine tap replaced, or removed if None."""
    values = load(zstandard.decompress(codec_bytes(tiny_plan().fit)))
    for name, tensor in tensors.items():
        if tensor is None:
            del values[f"{FINE}/{name}"]
        else:
            values[f"{FINE}/{name}"] = tensor
    return zstandard.compress(save(values))


def test_arrays_read_as_they_were_fitted(tmp_path: Path) -> None:
    """Every array has its values, shape and dtype, by dtcache and by safetensors alone."""
    fit = tiny_plan().fit
    found = read_fit(written(tmp_path, codec_bytes(fit)), "pca-dct-rans", MOST)
    by_safetensors = load(zstandard.decompress((tmp_path / CODEC).read_bytes()))
    for tap, arrays in fit.items():
        assert found[tap].keys() == arrays.keys()
        for name, values in arrays.items():
            for read in (found[tap][name], by_safetensors[f"{tap}/{name}"]):
                assert read.dtype == values.dtype
                np.testing.assert_array_equal(read, values)


def test_arrays_without_values_are_kept(tmp_path: Path) -> None:
    """A tap that is never coded has arrays of length zero, which keep their shapes."""
    fit = {FINE: {**tiny_plan().fit[FINE], "basis": np.zeros((8, 0), np.float16)}}
    found = read_fit(written(tmp_path, codec_bytes(fit)), "pca-dct-rans", {FINE: 1 << 16})
    assert found[FINE]["basis"].shape == (8, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not enough data for frame parameters"),
        (b"no zstd", "cannot get frame parameters"),
        (
            b"\x28\xb5\x2f\xfd\xe0" + (1 << 45).to_bytes(8, "little") + b"\x01\x00\x00",
            f"expected at most [0-9]+ bytes, got {1 << 45}",
        ),
        (b"\0" * (1 << 22), "expected at most [0-9]+ bytes, got 4194304"),
        (zstandard.compress(b"{}" * 9), "header"),
        (codec_bytes(tiny_plan().fit) + b"more", "extra|unused|compressed input"),
        (codec_bytes(tiny_plan().fit)[:-9], "zstd|decompress"),
        (changed(mean=None), f"expected the arrays of 2 taps, got no '{FINE}/mean'"),
        (
            changed(**{"x\x1b[2J": np.zeros(1)}),
            rf"expected the arrays of 2 taps, got '{FINE}/x\\x1b",
        ),
        (
            changed(mean=np.zeros(3)),
            f"{FINE}/mean: expected at most 65536 bytes of <f2, got 24 of <f8",
        ),
        (
            changed(mean=np.zeros(1 << 16, np.float16)),
            f"{FINE}/mean: expected at most 65536 bytes of <f2, got 131072 of <f2",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    """A damaged or hostile file is refused in one line that names it."""
    with pytest.raises(ValueError, match=rf"codec\.safetensors\.zst: (.*)({reason})"):
        read_fit(written(tmp_path, content), "pca-dct-rans", MOST)
