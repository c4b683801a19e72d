"""Commands that read a cache, on a cache in an object store."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli import run, words
from support.s3 import Bucket

import dtcache

pytestmark = pytest.mark.usefixtures("apart")
SHARD = "data.zarr/t150/c.1.0.0"


def described(*arguments: object) -> dict[str, Any]:
    """Return the JSON of a command that succeeds."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_inspect_describes_the_same_cache(bucket: Bucket, scene_cache: Path) -> None:
    """Report and statistics equal those of the local cache, from the command and from Python."""
    report = described("inspect", bucket.address, "--stats", "--num-samples", 8)
    expected = described("inspect", scene_cache, "--stats", "--num-samples", 8)
    expected["bytes_on_disk"] = report["bytes_on_disk"]  # the folder has the file of a lock too
    expected["parts"]["other"] = report["parts"]["other"]
    assert report == expected
    assert dtcache.inspect(bucket.address).reports[0]["complete"]
    both = described("inspect", bucket.address, scene_cache)
    assert both["paths"] == [bucket.address, str(scene_cache)]


def test_inspect_writes_a_page(bucket: Bucket, tmp_path: Path) -> None:
    """The page of a remote cache is headed by its name."""
    page = tmp_path / "page.html"
    flags = words("--gallery 1")
    result = run("inspect", bucket.address, "--report", page, *flags)
    assert result.exit_code == 0, result.output
    assert "<title>scenes.cache" in page.read_text()


def test_verify_reads_the_objects_themselves(bucket: Bucket) -> None:
    """A damaged object is found with its samples, also if an intact local copy exists."""
    assert described("verify", bucket.address)["bytes_checked"] > 0
    assert dtcache.open(bucket.address)[20].features  # now there is a local copy
    content = bucket.read(SHARD, 1 << 24)
    bucket.put(SHARD, content[:9] + bytes([content[9] ^ 1]) + content[10:])
    result = run("verify", bucket.address, "--json")
    assert result.exit_code == 3, result.output
    [damage] = json.loads(result.stdout)["damage"]
    assert damage["path"] == SHARD
    assert len(damage["samples"]) == 1
    bucket.put(SHARD, content[:-1])
    bucket.put("strange", b"")
    damaged = json.loads(run("verify", bucket.address, "--json").stdout)
    assert "bytes, got" in damaged["damage"][0]["reason"]
    assert damaged["unnamed"] == {"strange": "not part of the cache"}
    bucket.delete([SHARD, "samples.parquet"])
    damaged = json.loads(run("verify", bucket.address, "--json").stdout)
    assert {d["path"] for d in damaged["damage"]} == {SHARD, "samples.parquet"}


def test_a_remote_cache_is_not_repaired(bucket: Bucket) -> None:
    """A repair is refused in one line, before anything is read."""
    refused = run("verify", bucket.address, "--repair", "--dry-run")
    assert refused.exit_code == 2
    assert "--repair: expected a cache on this machine, got s3://" in refused.output


def test_evaluate_classifies_with_a_remote_cache(
    bucket: Bucket, scene_cache: Path, scene_folder: Path
) -> None:
    """The accuracy of a remote cache's taps is that of the local one."""
    flags = ("--train", scene_folder, "--test", scene_folder, *words("--device cpu --k 3"))
    remote = described("evaluate", bucket.address, *flags)
    assert remote | {"model": ""} == described("evaluate", scene_cache, *flags) | {"model": ""}


def test_an_interpreter_is_fitted_to_a_remote_cache(
    bucket: Bucket, scene_cache: Path, tmp_path: Path
) -> None:
    """The interpreter's weights are those of a fit to the local cache."""
    flags = words("--level image --epochs 1 --warmup-epochs 0 --width 32 --device cpu")
    for where, name in ((bucket.address, "remote"), (scene_cache, "local")):
        fitted = run("label", "fit", where, "--out", tmp_path / name, *flags)
        assert fitted.exit_code == 0, fitted.output
    weights = "model.safetensors"
    assert (tmp_path / "remote" / weights).read_bytes() == (
        tmp_path / "local" / weights
    ).read_bytes()


@pytest.mark.slow
def test_a_sweep_trains_on_a_remote_cache(bucket: Bucket, tmp_path: Path) -> None:
    """A sweep file names a cache by its address."""
    (tmp_path / "sweep.toml").write_text(
        f"""
        seeds = [0]
        [train]
        student = "resnet10t"
        epochs = 1
        batch_size = 8
        warmup_epochs = 0
        fpn_width = 16
        device = "cpu"
        log_with = "none"
        [[cache]]
        name = "remote"
        path = "{bucket.address}"
        [[arm]]
        name = "mse"
        cache = "remote"
        """
    )
    done = run("sweep", tmp_path / "sweep.toml", "--out", tmp_path / "sweep")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "sweep" / "runs" / "mse" / "seed-0" / "backbone" / "config.json").is_file()


@pytest.mark.parametrize("verb", [("inspect",), ("verify",), ("label", "fit"), ("evaluate",)])
def test_a_missing_bucket_is_one_line(
    bucket: Bucket, verb: tuple[str, ...], tmp_path: Path, scene_folder: Path
) -> None:
    """A bucket that does not exist is named by every command."""
    more = {
        "label": ("--level", "image", "--out", tmp_path / "i"),
        "evaluate": ("--train", scene_folder, "--test", scene_folder, "--device", "cpu"),
    }
    result = run(*verb, "s3://no-such-bucket/x", *more.get(verb[0], ()))
    assert result.exit_code == 1
    assert "the bucket does not exist" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "i").exists()
