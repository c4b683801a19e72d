"""Manifests and commit records round-trip; damage, newer versions and mismatches are refused."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from store.builders import FEATURES, VIEWS, tiny_plan
from support.hostile import reseal

from dtcache.errors import (
    CacheDamagedError,
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    CacheNotFoundError,
)
from dtcache.hashing import canonical_json, sha256_json
from dtcache.json_files import with_own_hash
from dtcache.recipe import ConditionSpec, Json, Recipe
from dtcache.store.commits import (
    CodecSums,
    CommitRecord,
    ShardObject,
    commit_path,
    read_commits,
    total_sums,
    write_commit,
)
from dtcache.store.layout import IMAGES
from dtcache.store.manifest import (
    CacheManifest,
    new_manifest,
    read_manifest,
    require_same,
    write_manifest,
)
from dtcache.store.parquet_tables import TablePart


def tiny_manifest() -> CacheManifest:
    """Return the manifest of the tiny plan's cache, sealed."""
    plan = tiny_plan()
    manifest = new_manifest(
        plan.recipe,
        plan.arrays,
        ["red", "grün"],
        {"samples.parquet": "0" * 64},
        (TablePart(bytes=7, sha256="2" * 64),),
    )
    return manifest.sealed(
        {"shards.parquet": "1" * 64, "failures.parquet": "3" * 64},
        manifest.samples,
        {"t150/stride2": CodecSums(squared_error=0.1, energy=3.0, section_bytes=7)},
    )


def tiny_record(shard: int = 0) -> CommitRecord:
    """Return a commit record in which every kind of field has a value."""
    return CommitRecord(
        shard=shard,
        fingerprint="f" * 64,
        objects=(ShardObject(path="data.zarr/images/c.0.0", size=5, sha256="e" * 64),),
        content_sha256=("d" * 64, None),
        failures=tiny_plan().shards[1].failures,
        sums={"t150/stride2": CodecSums(squared_error=0.1 + shard, energy=1e-3, section_bytes=7)},
    )


def test_manifest_round_trips(tmp_path: Path) -> None:
    """A manifest reads back equal, as canonical JSON without a clock or a path."""
    write_manifest(tmp_path, tiny_manifest())
    found = read_manifest(tmp_path)
    assert found == tiny_manifest()
    assert (found.num_samples, found.num_views) == (10, 2)
    assert found.files == {
        "samples.parquet": "0" * 64,
        "shards.parquet": "1" * 64,
        "failures.parquet": "3" * 64,
    }
    text = (tmp_path / "manifest.json").read_bytes()
    assert canonical_json(json.loads(text)) == text
    assert str(tmp_path).encode() not in text
    assert found.fingerprint == sha256_json(found.recipe) == tiny_plan().recipe.fingerprint


def test_every_flipped_character_of_a_manifest_is_found(tmp_path: Path) -> None:
    """A flipped bit in a manifest raises CacheDamagedError, or CacheError for another format."""
    write_manifest(tmp_path, tiny_manifest())
    path = tmp_path / "manifest.json"
    text = path.read_bytes()
    for place in range(0, len(text), 2):
        damaged = bytearray(text)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(
            CacheError, match=r"checksum does not match|not a manifest of dtcache|expected format 2"
        ):
            read_manifest(tmp_path)


def test_every_truncated_manifest_is_found(tmp_path: Path) -> None:
    """A manifest truncated at any length raises CacheDamagedError."""
    write_manifest(tmp_path, tiny_manifest())
    path = tmp_path / "manifest.json"
    text = path.read_bytes()
    for size in range(0, len(text), 17):
        path.write_bytes(text[:size])
        with pytest.raises(CacheDamagedError, match="not a manifest of dtcache"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    "value", ["[]", "3", "null", '{"format":2}', '{"format":2,"sha256":3}', '{"format":[]}']
)
def test_json_that_is_no_manifest(tmp_path: Path, value: str) -> None:
    """JSON of another kind raises CacheError, never a bare KeyError or TypeError."""
    (tmp_path / "manifest.json").write_text(value)
    with pytest.raises(
        CacheError, match=r"not a manifest of dtcache|checksum does not match|expected format 2"
    ):
        read_manifest(tmp_path)


MEASURED = {
    "images": 8,
    "flip": {"t150/stride2": 0.5},
    "box": None,
    "crop": None,
    "crop_interior": None,
}


def with_recipe(changes: dict, teacher: dict) -> CacheManifest:
    """Return the tiny manifest with changed recipe fields and a valid hash."""
    manifest = tiny_manifest()
    recipe = {**manifest.recipe, **changes, "teacher": {**manifest.recipe["teacher"], **teacher}}
    return replace(manifest, recipe=recipe)


@pytest.mark.parametrize(
    ("changes", "teacher"),
    [
        ({}, {"ddim_steps": "20"}),
        ({}, {"ddim_steps": -1}),
        ({}, {"alpha_bars": []}),
        ({}, {"alpha_bars": [1.5]}),
        ({}, {"alpha_bars": ["much"]}),
        ({"round_trip": {"t50": 0.1}}, {}),
        ({"round_trip": {"t150": -0.1}}, {}),
        ({"equivariance": 3}, {}),
        ({"equivariance": {**MEASURED, "images": None}}, {}),
        ({"equivariance": {**MEASURED, "flip": {"t9/stride2": 0.5}}}, {}),
        ({"equivariance": {**MEASURED, "crop": {"t150/stride2": "0.5"}}}, {}),
        ({"equivariance": {**MEASURED, "box": {"top": 0}}}, {}),
        ({"equivariance": {"images": 8}}, {}),
    ],
)
def test_measurements_that_cannot_be_are_damage(
    tmp_path: Path, changes: dict, teacher: dict
) -> None:
    """Impossible measurements in a manifest are damage, even if its hash is valid."""
    write_manifest(
        tmp_path,
        with_recipe({"equivariance": MEASURED, "round_trip": {"t150": 0.0}}, {"ddim_steps": 2}),
    )
    assert read_manifest(tmp_path).recipe["equivariance"] == MEASURED
    write_manifest(tmp_path, with_recipe(changes, teacher))
    with pytest.raises(CacheDamagedError, match="not a manifest of dtcache"):
        read_manifest(tmp_path)


def with_sizes(recipe: dict, arrays: dict) -> CacheManifest:
    """Return the tiny manifest with changed recipe fields and arrays and a valid hash."""
    manifest = with_recipe(recipe, {})
    return replace(
        manifest, arrays={n: replace(a, **arrays.get(n, {})) for n, a in manifest.arrays.items()}
    )


ALL = (IMAGES, FEATURES)
L = {name: array.length for name, array in tiny_plan().arrays.items()}


def of_rows(count: int, shard_rows: int) -> dict:
    """Return changes that give every array `count` rows in shards of `shard_rows` rows."""
    shapes = {
        IMAGES: (count, L[IMAGES]),
        FEATURES: (count, VIEWS, L[FEATURES]),
    }
    return {name: {"shape": shape, "shard_rows": shard_rows} for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("recipe", "arrays"),
    [
        ({}, {FEATURES: {"shape": (2**50, VIEWS, L[FEATURES])}}),
        ({}, {IMAGES: {"shape": (9, L[IMAGES])}}),
        ({}, {IMAGES: {"shape": (10, VIEWS, L[IMAGES])}}),
        ({}, {FEATURES: {"shape": (10, VIEWS + 1, L[FEATURES])}}),
        ({}, {FEATURES: {"shape": (10, L[FEATURES])}}),
        ({}, {FEATURES: {"shard_rows": 1}}),
        ({}, {name: {"shard_rows": 1} for name in ALL}),
        ({"store_images": False}, {}),
        ({"flips": False}, {}),
        ({"num_samples": 2**50, "shard_rows": 1}, of_rows(2**50, 1)),
        ({"num_samples": 2**30 + 1, "shard_rows": 2**20}, of_rows(2**30 + 1, 2**20)),
        ({"num_samples": 10**6 + 1, "shard_rows": 1}, of_rows(10**6 + 1, 1)),
    ],
)
def test_sizes_that_contradict_each_other_are_damage(
    tmp_path: Path, recipe: dict, arrays: dict
) -> None:
    """Array shapes that contradict samples, views or shards, or exceed the bounds, are damage."""
    write_manifest(tmp_path, with_sizes(recipe, arrays))
    with pytest.raises(
        CacheDamagedError,
        match=r"not a manifest of dtcache .*(arrays that are not|samples in shards)",
    ):
        read_manifest(tmp_path)


def test_the_largest_sizes_are_read(tmp_path: Path) -> None:
    """2^30 samples and a million shards are within the bounds."""
    for count, rows in ((2**30, 2**20), (10**6, 1)):
        write_manifest(
            tmp_path, with_sizes({"num_samples": count, "shard_rows": rows}, of_rows(count, rows))
        )
        assert read_manifest(tmp_path).arrays[FEATURES].num_shards == count // rows


def test_a_map_beyond_any_payload_is_damage(tmp_path: Path) -> None:
    """A map larger than any payload is refused, even if each side is within bounds."""
    tap = tiny_plan().recipe.to_json()["teacher"]["taps"][0]
    write_manifest(
        tmp_path, with_recipe({}, {"taps": [{**tap, "height": 1 << 14, "width": 1 << 14}]})
    )
    with pytest.raises(CacheDamagedError, match=r"not a manifest of dtcache .*tap "):
        read_manifest(tmp_path)


Place = tuple[str | int, ...]
"""The keys and list indices that lead to a field of a JSON value."""


def fields_of(value: object, place: Place = ()) -> Iterator[Place]:
    """Yield the places of all fields in a JSON value, and of the first item of a list."""
    if isinstance(value, list):
        value = dict(enumerate(value[:1]))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*place, key)
            yield from fields_of(inner, (*place, key))


def full_json() -> Json:
    """Return a manifest's JSON in which every kind of field has a value."""
    manifest = with_recipe({"equivariance": MEASURED, "round_trip": {"t150": 0.0}}, {"snrs": [3.0]})
    value: Json = json.loads(canonical_json(manifest.to_json()))
    del value["sha256"]
    return value


def may_lack(place: Place, was: object) -> bool:
    """Return whether a field may be missing or None."""
    return (
        was is None
        or place[0] in ("classes", "files", "sums")
        or (place[0] == "samples" and len(place) == 2)
        or place[:2] in (("recipe", "equivariance"), ("recipe", "round_trip"))
        or place[:3] == ("recipe", "teacher", "snrs")
    )


def test_no_field_may_be_missing_or_of_another_type(tmp_path: Path) -> None:
    """Each field of a manifest, replaced by another type, an enormous value or none, is damage."""
    places = [place for place in fields_of(full_json()) if place[0] != "format"]
    assert len(places) > 70
    for place in places:
        for other in ([[]], {"a": {}}, "text", 10**40, True, None, "nothing"):
            value = full_json()
            inner = value
            for key in place[:-1]:
                inner = inner[key]
            was = inner[place[-1]]
            if type(other) is type(was) and other not in ("nothing", 10**40):
                continue
            inner[place[-1]] = other
            if other == "nothing":
                del inner[place[-1]]
            (tmp_path / "manifest.json").write_bytes(canonical_json(with_own_hash(value)))
            try:
                read_manifest(tmp_path)
            except CacheDamagedError as error:
                assert len(str(error)) < 600
            else:
                assert other in (None, "nothing") and may_lack(place, was), (place, other)


@pytest.mark.parametrize(
    ("files", "is_valid"),
    [
        ({"samples.parquet": "0" * 64, "failures.parquet": "0" * 64}, True),
        (
            {
                name: "0" * 64
                for name in (
                    "samples.parquet",
                    "failures.parquet",
                    "data.zarr/zarr.json",
                    "codec.safetensors.zst",
                    "prompt.safetensors",
                )
            },
            True,
        ),
        ({"/etc/passwd": "0" * 64}, False),
        ({"../other/samples.parquet": "0" * 64}, False),
        ({"data.zarr/../../zarr.json": "0" * 64}, False),
        ({"data.zarr//zarr.json": "0" * 64}, False),
        ({"samples.parquet": "0" * 63}, False),
        ({"samples.parquet": "G" * 64}, False),
    ],
)
def test_a_manifest_names_only_files_of_its_cache(
    tmp_path: Path, files: dict, is_valid: bool
) -> None:
    """A path outside the cache, or a text that is no SHA-256, is damage."""
    write_manifest(tmp_path, replace(tiny_manifest(), files=files))
    if is_valid:
        assert read_manifest(tmp_path).files == files
    else:
        with pytest.raises(CacheDamagedError, match=r"not a manifest of dtcache .files: '"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "arrays", "reason"),
    [
        (
            {},
            {IMAGES: {"shape": (10, 3000)}},
            "array images: expected payloads of at most 2816 bytes, got 3000",
        ),
        (
            {},
            {FEATURES: {"shape": (10, VIEWS, 1 << 28)}},
            "array t150: expected payloads of at most 4448 bytes, got 268435456",
        ),
        ({}, {FEATURES: {"shape": (10, VIEWS, 1 << 29)}}, "array 't150' of shape"),
        ({"codec": None}, {}, "recipe.codec: expected an object"),
    ],
)
def test_payloads_beyond_what_their_values_need_are_damage(
    tmp_path: Path, recipe: dict, arrays: dict, reason: str
) -> None:
    """A frame of 256 million bytes for 64 values is refused by the manifest."""
    write_manifest(tmp_path, with_sizes(recipe, arrays))
    with pytest.raises(CacheDamagedError, match=f"not a manifest of dtcache .*{reason}"):
        read_manifest(tmp_path)


def test_codec_arrays_are_bounded_together(tmp_path: Path) -> None:
    """Taps whose codec arrays would take more than 512 MB are refused before they are read."""
    tap = tiny_plan().recipe.to_json()["teacher"]["taps"][0]
    write_manifest(tmp_path, with_recipe({}, {"taps": [{**tap, "channels": 1 << 14}] * 2}))
    with pytest.raises(CacheDamagedError, match="not a manifest of dtcache"):
        read_manifest(tmp_path)


def test_json_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest or record beyond the size limit, or nested too deep, is damage."""
    (tmp_path / "commits").mkdir()
    monkeypatch.setattr("dtcache.store.manifest.MAX_MANIFEST_BYTES", 1 << 17)
    monkeypatch.setattr("dtcache.store.commits.MAX_COMMIT_BYTES", 1 << 17)
    for content, reason in (
        ("[" * (1 << 17), "nested too deep"),
        (" " * (1 << 17) + "1", "at most 131072 bytes, got 131073"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        commit_path(tmp_path, 0).write_text(content)
        with pytest.raises(CacheDamagedError, match=rf"not a manifest of dtcache .*{reason}"):
            read_manifest(tmp_path)
        with pytest.raises(CacheDamagedError, match=rf"not a commit record of dtcache .*{reason}"):
            read_commits(tmp_path)


@pytest.mark.parametrize(
    ("version", "fix"),
    [("3", "install the dtcache that wrote it, or a newer one"), ("1", "extract again")],
)
def test_other_formats_are_refused(tmp_path: Path, version: str, fix: str) -> None:
    """Another format is refused with its number and the next step, even if fields are unknown."""
    (tmp_path / "manifest.json").write_text(f'{{"format":{version},"unknown":true}}')
    with pytest.raises(CacheFormatError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/manifest.json: expected format 2, got {version}; {fix}"
    )


def test_a_sealed_manifest_names_its_sample_index(tiny_copy: Path) -> None:
    """Readers look up the hash of samples.parquet, so a manifest without it is damaged."""
    reseal(tiny_copy, lambda manifest: manifest["files"].pop("samples.parquet"))
    with pytest.raises(CacheDamagedError, match=r"files: samples\.parquet is missing"):
        read_manifest(tiny_copy)


def test_missing_manifest(tmp_path: Path) -> None:
    """A folder without a manifest is not a cache."""
    with pytest.raises(
        CacheNotFoundError,
        match=r"is not a cache: expected manifest.json in it; pass a folder made by",
    ):
        read_manifest(tmp_path)


def test_require_same_names_the_dotted_field(tmp_path: Path) -> None:
    """The first differing field is named with its dotted path and both values."""
    found = tiny_plan().recipe.to_json()
    require_same(tmp_path, found, copy.deepcopy(found))
    require_same(tmp_path, found, {"view": {"height": 8}, "seed": 3})
    for path, value, message in (
        (
            ("seed",),
            4,
            r"seed is 3 in the cache, 4 in this run; pass the same options",
        ),
        (
            ("view", "resize_mode"),
            "stretch",
            r'view\.resize_mode is "crop" in the cache, "stretch" in this run',
        ),
        (
            ("teacher", "weights_sha256"),
            "c" * 64,
            r'teacher\.weights_sha256 is "a{56}\.\.\. in the cache, "c{56}\.\.\. in',
        ),
        (
            ("codec", "noise_share", "t150/stride2"),
            0.5,
            r"codec\.noise_share\.t150/stride2 is 0\.1 in the cache, 0\.5 in",
        ),
        (("new",), 1, r"new is null in the cache, 1 in this run"),
    ):
        wanted = copy.deepcopy(found)
        place = wanted
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        with pytest.raises(CacheMismatchError, match=message):
            require_same(tmp_path, found, wanted)


def test_fingerprint_covers_every_field() -> None:
    """Changing any field of the recipe changes its fingerprint."""
    recipe = tiny_plan().recipe
    others = [
        replace(recipe, seed=4),
        replace(recipe, flips=False),
        replace(recipe, shard_rows=8),
        replace(recipe, num_samples=11),
        replace(recipe, samples_sha256=""),
        replace(recipe, noise="other"),
        replace(recipe, view=replace(recipe.view, resize_mode="stretch")),
        replace(recipe, codec=replace(recipe.codec, fit_sha256="")),
        replace(recipe, teacher=replace(recipe.teacher, timesteps=(151,))),
        replace(recipe, teacher=replace(recipe.teacher, device_type="cuda")),
    ]
    assert len({recipe.fingerprint, *(o.fingerprint for o in others)}) == 11


def told(condition: ConditionSpec) -> Recipe:
    """Return the tiny recipe with a condition on its teacher."""
    recipe = tiny_plan().recipe
    return replace(recipe, teacher=replace(recipe.teacher, condition=condition))


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        (ConditionSpec(kind="label"), {"kind": "label"}),
        (ConditionSpec(kind="null"), {"kind": "null"}),
        (ConditionSpec(kind="class", number=0), {"kind": "class", "number": 0}),
        (
            ConditionSpec(kind="prompt", prompt="", embedding_sha256="c" * 64),
            {"kind": "prompt", "prompt": "", "embedding_sha256": "c" * 64},
        ),
    ],
)
def test_a_condition_is_in_the_recipe_where_there_is_one(
    tmp_path: Path, condition: ConditionSpec, value: Json
) -> None:
    """A condition enters the recipe only if set, so recipes without one keep their fingerprints."""
    plan = tiny_plan()
    recipe = told(condition)
    assert "condition" not in plan.recipe.to_json()["teacher"]
    assert recipe.fingerprint != plan.recipe.fingerprint
    write_manifest(tmp_path, new_manifest(recipe, plan.arrays, None, {}, ()))
    assert read_manifest(tmp_path).recipe["teacher"]["condition"] == value


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "mood"},
        {},
        [],
        {"kind": "class", "number": "1"},
        {"kind": "class"},
        {"kind": "prompt"},
    ],
)
def test_a_condition_of_another_kind_is_damage(tmp_path: Path, value: object) -> None:
    """An unknown or incomplete condition is damage."""
    plan = tiny_plan()
    manifest = new_manifest(told(ConditionSpec(kind="null")), plan.arrays, None, {}, ())
    manifest.recipe["teacher"]["condition"] = value
    write_manifest(tmp_path, manifest)
    with pytest.raises(CacheDamagedError, match="not a manifest of dtcache"):
        read_manifest(tmp_path)


def test_commit_records_round_trip(tmp_path: Path) -> None:
    """Commit records read back equal, by shard."""
    (tmp_path / "commits").mkdir()
    assert read_commits(tmp_path) == {}
    for shard in (2, 0):
        write_commit(tmp_path, tiny_record(shard))
    assert read_commits(tmp_path) == {0: tiny_record(0), 2: tiny_record(2)}
    assert commit_path(tmp_path, 2) == tmp_path / "commits" / "000002.json"
    assert read_commits(tmp_path / "nowhere") == {}


def test_every_flipped_character_of_a_commit_record_is_found(tmp_path: Path) -> None:
    """A flipped bit in a commit record raises CacheDamagedError with the advice to delete it."""
    (tmp_path / "commits").mkdir()
    write_commit(tmp_path, tiny_record())
    path = commit_path(tmp_path, 0)
    text = path.read_bytes()
    for place in range(0, len(text), 2):
        damaged = bytearray(text)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(
            CacheDamagedError,
            match=r"000000.json: not a commit record of dtcache .*; delete it and run",
        ):
            read_commits(tmp_path)


def test_a_commit_record_under_another_name_is_found(tmp_path: Path) -> None:
    """An intact record under another shard's name raises CacheDamagedError with its own shard."""
    (tmp_path / "commits").mkdir()
    write_commit(tmp_path, tiny_record(2))
    commit_path(tmp_path, 2).rename(commit_path(tmp_path, 1))
    with pytest.raises(
        CacheDamagedError,
        match=r"000001.json: not a commit record of dtcache \(it belongs to shard 2\)",
    ):
        read_commits(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"content_sha256": ["no hash"]}, "expected a SHA-256, got 'no hash'"),
        ({"content_sha256": [5]}, "expected a SHA-256, got '5'"),
        ({"failures": [{"row": 1.0, "key": "a", "reason": "b"}]}, "expected a count, got '1.0'"),
        ({"failures": [{"row": True, "key": "a", "reason": "b"}]}, "expected a count, got 'True'"),
        ({"failures": [{"row": -1, "key": "a", "reason": "b"}]}, "expected a count, got '-1'"),
        ({"failures": [{"row": 1, "key": "a", "reason": 2}]}, "expected text, got '2'"),
        ({"failures": [{"row": 1, "reason": "b"}]}, "key"),
        ({"failures": [1]}, "not subscriptable"),
        (
            {"objects": [{"path": "p", "bytes": "5", "sha256": "0" * 64}]},
            "expected a count, got '5'",
        ),
        (
            {"sums": {"t0/a": {"squared_error": "x", "energy": 1.0, "section_bytes": 3}}},
            "expected a finite number, got 'x'",
        ),
        (
            {"sums": {"t0/a": {"squared_error": 1.0, "energy": 1.0, "section_bytes": 0.5}}},
            "expected a count, got '0.5'",
        ),
    ],
)
def test_a_commit_record_of_other_types_is_found(
    tmp_path: Path, changes: dict, reason: str
) -> None:
    """A record with a valid hash of its own but ill-typed hashes or failures is damage."""
    (tmp_path / "commits").mkdir()
    body = {**tiny_record().to_json(), **changes}
    del body["sha256"]
    commit_path(tmp_path, 0).write_bytes(canonical_json({**body, "sha256": sha256_json(body)}))
    with pytest.raises(
        CacheDamagedError, match=rf"000000.json: not a commit record of dtcache .*{reason}"
    ):
        read_commits(tmp_path)


def test_sums_add_in_the_order_given() -> None:
    """Totals per array are left-to-right float64 sums, so the shard order determines every bit."""
    sums = [0.1, 0.2, 0.3, 1e16, 1.0, -1e16]
    small = {"b": CodecSums(squared_error=1.0, energy=0.0, section_bytes=2)}
    records = [
        replace(
            tiny_record(),
            sums={
                "a": CodecSums(squared_error=s, energy=1.0, section_bytes=3),
                **(small if 0 < s < 1 else {}),
            },
        )
        for s in sums
    ]
    found = total_sums(records)
    assert found["a"] == CodecSums(
        squared_error=0.1 + 0.2 + 0.3 + 1e16 + 1.0 - 1e16, energy=6.0, section_bytes=18
    )
    assert found["b"] == CodecSums(squared_error=3.0, energy=0.0, section_bytes=6)
    assert total_sums([]) == {}
