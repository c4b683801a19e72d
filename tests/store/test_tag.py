"""A payload that was moved is refused by name, even if an attacker made every hash match."""

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c
from store.builders import COARSE, FEATURES, FINE, VIEWS, Plan, tiny_plan, write_cache
from support.files import exchange_chunks
from support.fuzz.caches import sign_shards

from dtcache.cache.cache import Cache
from dtcache.codec import make_tap_codec, sha256_fit
from dtcache.errors import CacheDamagedError
from dtcache.store.layout import IMAGES, payload_arrays
from dtcache.store.reader import CacheReader
from dtcache.store.tag import tag_seed, tagged, untagged

pytestmark = pytest.mark.usefixtures("no_fsync")

LATER = "t151"
MOVED = "it is not the payload of this cache, array, row and view"


def two_timesteps() -> Plan:
    """Return a plan whose second timestep has the features and the codec of the first."""
    plan = tiny_plan()
    recipe = plan.recipe
    again = {FINE: f"{LATER}/stride2", COARSE: f"{LATER}/stride4"}
    codec = recipe.codec
    names = [*again, *again.values()]
    arrays = plan.fit | {again[name]: of_tap for name, of_tap in plan.fit.items()}
    fit = {name: make_tap_codec(codec.name, of_tap) for name, of_tap in arrays.items()}
    recipe = replace(
        recipe,
        teacher=replace(recipe.teacher, timesteps=(150, 151), alpha_bars=(0.75, 0.75)),
        codec=replace(
            codec,
            fit_sha256=sha256_fit(fit),
            noise_share=dict.fromkeys(names, 0.1),
            noise_floor=dict.fromkeys(names, 0.1),
            determined_error=dict.fromkeys(names, 0.1),
        ),
    )
    image_bound, bound = (plan.arrays[name].length - 4 for name in (IMAGES, FEATURES))
    return replace(
        plan,
        recipe=recipe,
        arrays=payload_arrays(recipe, image_bound, {FEATURES: bound, LATER: bound}),
        fit=arrays,
        shards=[
            replace(
                shard,
                payloads={**shard.payloads, LATER: shard.payloads[FEATURES]},
                sums=shard.sums | {again[name]: sums for name, sums in shard.sums.items()},
            )
            for shard in plan.shards
        ],
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of two timesteps, to be damaged."""
    return write_cache(tmp_path / "cache", two_timesteps())


@pytest.mark.parametrize(
    ("name", "second", "row", "view"),
    [(FEATURES, 1, 0, 1), (FEATURES, VIEWS, 1, 0), (LATER, 2 * VIEWS + 1, 2, 1), (IMAGES, 3, 3, 0)],
)
def test_a_payload_of_another_row_or_view(
    root: Path, name: str, second: int, row: int, view: int
) -> None:
    """Two exchanged payloads of a shard are refused with sample and view; the others are read."""
    array = two_timesteps().arrays[name]
    path = root / array.object_path(0)
    exchange_chunks(path, array, 0, second)
    sign_shards(root, [path])
    reader = CacheReader(root)
    for wrong_row, wrong_view in ((0, 0), (row, view)):
        key = tiny_plan().samples[wrong_row].key
        with pytest.raises(
            CacheDamagedError,
            match=rf"{path}: sample {key} of {name}, view {wrong_view}: {MOVED}; run dtcache",
        ):
            reader.payloads(name, [wrong_row], [wrong_view])
    assert reader.payloads(name, [2 if row != 2 else 1], [0])[0].any()


@pytest.mark.parametrize(("name", "source"), [(FEATURES, LATER), (LATER, FEATURES)])
def test_a_payload_of_another_timestep(root: Path, name: str, source: str) -> None:
    """The shard of another timestep, equal in every byte but the tags, is refused."""
    path = root / "data.zarr" / name / "c.0.0.0"
    shutil.copyfile(root / "data.zarr" / source / "c.0.0.0", path)
    sign_shards(root, [path])
    with pytest.raises(CacheDamagedError, match=MOVED):
        CacheReader(root).payloads(name, [1], [1])


def test_a_payload_of_another_shard(root: Path) -> None:
    """A shard in the place of another one is refused."""
    path = root / "data.zarr" / FEATURES / "c.1.0.0"
    shutil.copyfile(path.with_name("c.0.0.0"), path)
    sign_shards(root, [path])
    with pytest.raises(CacheDamagedError, match=MOVED):
        CacheReader(root).payloads(FEATURES, [4], [0])


def test_a_payload_of_another_cache(root: Path, tmp_path: Path) -> None:
    """The shard of a cache with another seed and the same features is refused."""
    plan = two_timesteps()
    recipe = replace(plan.recipe, seed=99)
    image_bound, bound = (plan.arrays[name].length - 4 for name in (IMAGES, FEATURES))
    other = write_cache(
        tmp_path / "other",
        replace(
            plan,
            recipe=recipe,
            arrays=payload_arrays(recipe, image_bound, {FEATURES: bound, LATER: bound}),
        ),
    )
    name = f"data.zarr/{FEATURES}/c.0.0.0"
    shutil.copyfile(other / name, root / name)
    sign_shards(root, [root / name])
    with pytest.raises(CacheDamagedError, match=MOVED):
        Cache(root).features([tiny_plan().samples[0].key])


def test_a_failed_sample_in_the_place_of_another_is_not_decoded(root: Path) -> None:
    """An empty payload has no tag; the decoder refuses it with the sample's key."""
    array = two_timesteps().arrays[FEATURES]
    path = root / array.object_path(1)
    exchange_chunks(path, array, 0, VIEWS)  # row 5 failed
    sign_shards(root, [path])
    with pytest.raises(
        CacheDamagedError, match=f"t150 of sample {tiny_plan().samples[4].key}: a payload does not"
    ):
        Cache(root).coefficients([4], [0], [FINE])


@pytest.mark.parametrize("size", [1, 7, 8, 9, 60])
@pytest.mark.parametrize("zeros", [0, 3])
def test_the_tag_is_that_of_the_specification(size: int, zeros: int) -> None:
    """The tag is a CRC-32C over fingerprint, array, row, view and content; padding is free."""
    content = np.random.default_rng(size).bytes(size - 1) + b"\7" + bytes(zeros)
    text = "f" * 64 + "t150"
    wanted = crc32c(text.encode() + struct.pack("<QI", 1 << 40, 5) + content.rstrip(b"\0"))
    seed = tag_seed("f" * 64, "t150")
    payload = tagged(seed, 1 << 40, 5, content)
    assert payload == struct.pack("<I", wanted) + content
    padded = np.frombuffer(payload + bytes(9), np.uint8)
    assert untagged(seed, 1 << 40, 5, padded).tobytes() == content + bytes(9)
    for bit in range(8 * len(payload)):
        wrong = padded.copy()
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheDamagedError, match=MOVED):
            untagged(seed, 1 << 40, 5, wrong)


def test_content_that_is_missing_has_no_tag() -> None:
    """Empty content gives an empty payload, and zeros are read as empty content."""
    seed = tag_seed("f" * 64, "t150")
    assert tagged(seed, 3, 0, b"") == b""
    assert not len(untagged(seed, 3, 0, np.zeros(48, np.uint8)))
