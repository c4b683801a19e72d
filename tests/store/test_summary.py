"""Inspect reports parts and states without reading features, also while a writer is running."""

import json
import os
import re
from pathlib import Path

import pytest
from store.builders import COARSE, FEATURES, FINE, begin, tiny_plan, tree
from support.inspecting import DOCS, documented, inspect

from dtcache.errors import CacheDamagedError, CacheFormatError
from dtcache.store import summary as report_module
from dtcache.store.layout import CODEC, FAILURES, MANIFEST, SAMPLES, SHARDS
from dtcache.store.summary import SCHEMA, inspect_cache
from pipelines.inspect.tables import interval

pytestmark = pytest.mark.usefixtures("apart")


def plan_sums(name: str) -> int:
    """Return the bytes of a tap's sections in the tiny cache."""
    return sum(shard.sums[name].section_bytes for shard in tiny_plan().shards)


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far, counted by the kernel."""
    counters = Path("/proc/self/io").read_text()
    return int(re.search(r"rchar: (\d+)", counters)[1])  # type: ignore[index]


def test_parts_add_up_to_the_files(tiny_cache: Path) -> None:
    """Bytes by part and by tap add up to the files' sizes; no byte is counted twice."""
    report = inspect_cache(tiny_cache)
    sizes = {
        p.relative_to(tiny_cache).as_posix(): p.stat().st_size
        for p in tiny_cache.rglob("*")
        if p.is_file()
    }
    parts = report["parts"]
    assert sum(parts.values()) == sum(sizes.values()) == report["bytes_on_disk"]
    shards = {
        n: sum(s for p, s in sizes.items() if p.startswith(f"data.zarr/{n}/c."))
        for n in ("images", FEATURES)
    }
    assert parts["images"] == shards["images"]
    assert parts["coefficients"] == shards[FEATURES]
    assert parts["index"] == sum(sizes[name] for name in (MANIFEST, SAMPLES, FAILURES, SHARDS))
    assert parts["codec"] == report["codec_bytes"] == sizes[CODEC]
    by_tap = [tap["bytes"] for tap in report["taps"]]
    assert sum(by_tap) == shards[FEATURES]
    sections = [plan_sums(name) for name in (FINE, COARSE)]
    for size, section in zip(by_tap, sections, strict=True):
        assert size == pytest.approx(section / sum(sections) * shards[FEATURES], abs=1)
    assert (report["state"], report["damaged"]) == ("complete", {})


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the kernel counts no bytes read here"
)
def test_only_manifest_and_index_are_read(tiny_copy: Path) -> None:
    """Inspecting a cache reads no more bytes than its manifest and indices hold."""
    inspect_cache(tiny_copy)  # loads the lazily imported modules
    index = sum((tiny_copy / name).stat().st_size for name in (MANIFEST, SAMPLES, FAILURES, SHARDS))
    for path in (tiny_copy / "data.zarr").rglob("c.*"):
        os.truncate(path, path.stat().st_size + (1 << 26))
    before = bytes_read()
    inspect_cache(tiny_copy)
    # The remainder is the counter itself and the Parquet footers, which are read twice.
    assert bytes_read() - before < 2 * index + 4096


def test_a_cache_is_inspected_while_it_is_written(tmp_path: Path) -> None:
    """Inspecting a cache between commits counts the usable rows so far and changes no file."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    writer = begin(root, plan)
    done = []
    for shard in writer.missing:
        before = tree(root)
        report = inspect_cache(root)
        assert tree(root) == before
        assert (report["state"], report["complete"]) == ("unfinished", False)
        done.append(report["num_done"])
        assert sum(report["parts"].values()) == report["bytes_on_disk"]
        writer.write_shard(plan.shards[shard])
    assert done == [0, 4, 7]  # one row of the second shard failed
    empty = inspect(tmp_path / "cache")
    assert empty.exit_code == 0


def test_a_seal_in_between_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a seal deletes the records after the manifest was read, the manifest is read again."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    writer = begin(root, plan)
    for shard in writer.missing:
        writer.write_shard(plan.shards[shard])

    def sealed_meanwhile(where: Path) -> dict[int, object]:
        writer.seal()
        raise CacheDamagedError(f"{where}: a record went away")

    monkeypatch.setattr(report_module, "read_commits", sealed_meanwhile)
    assert inspect_cache(root)["state"] == "complete"


def test_records_that_a_seal_deleted_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a seal deletes records before they are listed, the rows are still counted in full."""
    plan = tiny_plan()
    root = tmp_path / "cache"
    writer = begin(root, plan)
    for shard in writer.missing:
        writer.write_shard(plan.shards[shard])
    read_commits = report_module.read_commits

    def listed_after_the_seal(where: Path) -> dict[int, object]:
        writer.seal()
        return read_commits(where)

    monkeypatch.setattr(report_module, "read_commits", listed_after_the_seal)
    assert inspect_cache(root)["num_done"] == 9


def test_files_that_vanish_meanwhile_are_skipped(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary file that is renamed between listing and stat causes no traceback."""
    (tiny_copy / ".tmp-shard").write_bytes(b"x")
    stat = Path.stat

    def vanishing(path: Path, **more: bool) -> os.stat_result:
        if path.name == ".tmp-shard" and path.exists(follow_symlinks=False) is not None:
            raise FileNotFoundError(path)
        return stat(path, **more)

    monkeypatch.setattr(
        Path, "is_file", lambda path: True if path.name == ".tmp-shard" else os.path.isfile(path)
    )
    monkeypatch.setattr(Path, "exists", lambda path, **more: True)
    monkeypatch.setattr(Path, "stat", vanishing)
    assert inspect_cache(tiny_copy)["state"] == "complete"


def test_damaged_shards_are_named(tiny_copy: Path) -> None:
    """A short and a missing shard are each named with the reason."""
    short, gone = (tiny_copy / f"data.zarr/{FEATURES}/c.{shard}.0.0" for shard in (1, 2))
    os.truncate(short, 7)
    gone.unlink()
    report = inspect_cache(tiny_copy)
    assert report["state"] == "damaged"
    assert report["damaged"] == {
        f"data.zarr/{FEATURES}/c.1.0.0": "7 bytes",
        f"data.zarr/{FEATURES}/c.2.0.0": "no file",
    }
    output = inspect(tiny_copy, COLUMNS="200").output
    assert "2 shard files DAMAGED: run dtcache verify" in output
    assert f"{FEATURES}/c.1.0.0: 7 bytes" in output


def test_classes_are_counted_up_to_a_bound(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report counts the images of the first classes alone: a cache can have any number."""
    counts = inspect_cache(tiny_cache)["class_counts"]
    assert list(counts) == ["red", "green", "blue"]
    monkeypatch.setattr(report_module, "MAX_CLASSES", 2)
    first = {name: counts[name] for name in ("red", "green")}
    assert inspect_cache(tiny_cache)["class_counts"] == first


def test_a_newer_format_is_refused(tiny_copy: Path) -> None:
    """A newer format is refused with the supported version."""
    (tiny_copy / MANIFEST).write_text('{"format":3}')
    with pytest.raises(
        CacheFormatError, match="expected format 2, got 3; install the dtcache that wrote it"
    ):
        inspect_cache(tiny_copy)
    assert inspect(tiny_copy).output.count("\n") == 1


def test_the_terminal_is_narrow_safe(tiny_cache: Path) -> None:
    """At 60 columns every number is complete; at 40 no line is longer or cut by an ellipsis."""
    report = inspect_cache(tiny_cache)
    wide = inspect(tiny_cache, COLUMNS="60").output
    for tap in report["taps"]:
        for number in (f"{tap['bits_per_value']:.3f}", f"{tap['relative_mse']:.3f}", tap["name"]):
            assert number in wide
    narrow = inspect(tiny_cache, COLUMNS="40").output
    assert max(map(len, narrow.splitlines())) <= 40
    assert "…" not in narrow
    for part in report["parts"]:
        assert part in wide


def test_the_schema_is_documented(tiny_cache: Path) -> None:
    """docs/inspect.md lists exactly the fields that --json prints for a cache."""
    report = json.loads(inspect(tiny_cache, "--json").stdout)
    assert f"Schema {SCHEMA}" in DOCS.read_text()
    found = [name for name in report if name != "statistics"] + [
        f"taps[].{name}" for name in report["taps"][0]
    ]
    found += [f"parts.{name}" for name in report["parts"]] + [
        f"timesteps[].{n}" for n in report["timesteps"][0]
    ]
    assert documented("a cache") == sorted(found)


def fields(value: object, prefix: str = "") -> set[str]:
    """Return the dotted paths of fields and of fields of list items, down to estimates."""
    found = set()
    for name, inner in value.items() if isinstance(value, dict) else ():
        found.add(f"{prefix}{name}")
        if isinstance(inner, dict) and set(inner) != {"value", "low", "high"}:
            found |= fields(inner, f"{prefix}{name}.")
        elif isinstance(inner, list) and inner:
            found |= fields(inner[0], f"{prefix}{name}[].")
    return found


def test_the_schema_of_statistics_is_documented(tiny_cache: Path) -> None:
    """docs/inspect.md lists and explains exactly the fields of statistics without a teacher."""
    statistics = json.loads(inspect(tiny_cache, "--stats", "--json").stdout)["statistics"]
    found = {name for name in documented("statistics") if not name.startswith("afresh")}
    assert found == fields(statistics)
    assert f"Schema {statistics['schema']} of the statistics" in DOCS.read_text()
    text = DOCS.read_text().partition("\n## Statistics\n")[2].partition("\n## ")[0]
    explained = set(re.findall(r"\*\*([A-Za-z -]+)\*\*", text))
    for tap in statistics["taps"]:
        for name, value in tap.items():
            title = name.replace("_", " ").replace("knn top1", "k-NN")
            assert title in explained or not isinstance(value, dict), title
    assert {"spectrum", "water line", "flip error", "crop error", "CKA"} <= explained


def test_statistics_are_narrow_safe(tiny_cache: Path) -> None:
    """At 60 columns every number of the statistics is complete."""
    statistics = json.loads(inspect(tiny_cache, "--stats", "--num-samples", 6, "--json").stdout)[
        "statistics"
    ]
    output = inspect(tiny_cache, "--stats", "--num-samples", 6, COLUMNS="60").output
    assert "a sample of 6 of 9 samples" in output
    for tap in statistics["taps"]:
        for measure in ("mean", "std", "effective_rank", "escapes", "noise_share", "codec_error"):
            assert interval(tap[measure]) in output
        assert tap["name"] in output
    assert "…" not in output
