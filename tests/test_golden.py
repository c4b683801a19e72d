"""The cache of each format that dtcache reads stays readable; its bytes are never rewritten."""

from pathlib import Path

import numpy as np
import pytest
from codec.codec_samples import reference_decode, reference_sections

import dtcache
from dtcache.cache.cache import Cache
from dtcache.recipe import FORMAT_VERSION, array_of
from dtcache.store.layout import IMAGES

GOLDEN = Path(__file__).parent / "golden"
FORMATS = pytest.mark.parametrize(
    "root", sorted(GOLDEN.glob("format*")), ids=lambda path: path.name
)


def expected(root: Path) -> dict[str, np.ndarray]:
    """Return the writer's payloads and the features that its codec decoded."""
    with np.load(root / "expected.npz") as arrays:
        return dict(arrays)


def pairs(rows: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """Return all (row, view) pairs of some rows."""
    views = cache.reader.manifest.num_views
    return np.repeat(rows, views), np.tile(np.arange(views), len(rows))


def test_a_golden_cache_of_each_format_is_here() -> None:
    """The format has a golden cache, and all golden caches together stay small."""
    assert [path.name for path in sorted(GOLDEN.glob("format*"))] == [f"format{FORMAT_VERSION}"]
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 200_000


@FORMATS
def test_payloads_are_the_bytes_handed_in(root: Path) -> None:
    """Every payload of every array equals the written one byte for byte."""
    cache = dtcache.open(root / "cache")
    wanted = expected(root)
    for name in cache.reader.manifest.arrays:
        where = (
            pairs(wanted["rows"], cache) if name != IMAGES else (wanted["rows"], 0 * wanted["rows"])
        )
        found = cache.reader.payloads(name, *where)
        sizes = wanted[f"{name}/sizes"].tolist()
        assert (
            b"".join(p[:n].tobytes() for p, n in zip(found, sizes, strict=True))
            == wanted[f"{name}/payloads"].tobytes()
        )
        assert not any(p[n:].any() for p, n in zip(found, sizes, strict=True))


@FORMATS
def test_coefficients_are_those_that_were_encoded(root: Path) -> None:
    """The kernels and a reference decoder both return the quantiser's output."""
    cache = dtcache.open(root / "cache")
    wanted = expected(root)
    for name in cache.names:
        values = wanted[f"{name}/coefficients"].reshape(
            -1, wanted[f"{name}/coefficients"].shape[-1]
        )
        found, scalars = (
            parts[name] for parts in cache.coefficients(*pairs(wanted["rows"], cache), [name])
        )
        np.testing.assert_array_equal(found.numpy(), values)
        array = array_of(name)
        ends = np.cumsum(wanted[f"{array}/sizes"])
        for place, (start, end) in enumerate(
            zip(ends - wanted[f"{array}/sizes"], ends, strict=True)
        ):
            payload = wanted[f"{array}/payloads"][start:end].tobytes()
            section = reference_sections(payload, cache.names)[name]
            assert reference_decode(section, cache.fit[name]) == (
                values[place].tolist(),
                *scalars[place].tolist(),
            )


@FORMATS
def test_features_and_images_decode_to_what_they_did(root: Path) -> None:
    """Decoded images are equal, and decoded features are equal within fp32 rounding."""
    cache = dtcache.open(root / "cache")
    wanted = expected(root)
    rows = wanted["rows"]
    np.testing.assert_array_equal(cache.images(rows), wanted["pixels"])
    for name, features in cache.raw(cache.names, rows).items():
        np.testing.assert_allclose(
            features.numpy(), wanted[f"{name}/features"], rtol=1e-4, atol=1e-4
        )
