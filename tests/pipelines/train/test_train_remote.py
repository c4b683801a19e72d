"""Training on a cache in an object store."""

import json
from pathlib import Path

import pytest
from support.cli import run, words
from support.s3 import Bucket

import dtcache
from dtcache.errors import ConfigError

FLAGS = words(
    "--student resnet10t --epochs 1 --batch-size 8 --warmup-epochs 0 --fpn-width 16 "
    "--device cpu --precision fp32 --log-with none"
)
pytestmark = pytest.mark.usefixtures("apart")


@pytest.fixture
def address(bucket: Bucket) -> str:
    """The address of the cache of 40 scenes."""
    return bucket.address


def losses(run_folder: Path) -> list[float]:
    """Return the loss of every step."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_remote_cache_trains_the_same_student(
    address: str, scene_cache: Path, tmp_path: Path
) -> None:
    """Losses and weights equal those of the local cache under the block shuffle, the default."""
    local = run("train", scene_cache, "--out", tmp_path / "l", *FLAGS, "--shuffle", "block")
    remote = run("train", address, "--out", tmp_path / "r", *FLAGS)
    assert (local.exit_code, remote.exit_code) == (0, 0), remote.output
    assert losses(tmp_path / "r") == losses(tmp_path / "l") != []
    weights = "backbone/model.safetensors"
    assert (tmp_path / "r" / weights).read_bytes() == (tmp_path / "l" / weights).read_bytes()
    resumed = run("train", scene_cache, "--out", tmp_path / "r", *FLAGS)
    assert resumed.exit_code == 2
    assert "--shuffle" in resumed.output


def test_the_flags_choose_folder_and_size(address: str, tmp_path: Path) -> None:
    """--local-cache is where copies go; a limit below the size of a shard is refused."""
    out = ("--out", tmp_path / "r")
    flags = ("--local-cache", tmp_path / "here", "--local-cache-size", 0.000001)
    refused = run("train", address, *out, *FLAGS, *flags)
    assert refused.exit_code == 1
    assert "pass a larger --local-cache-size" in refused.output
    assert list((tmp_path / "here").iterdir())
    assert not (tmp_path / "copies").exists()
    refused = run("train", address, *out, *FLAGS, "--local-cache-size", -1)
    assert refused.exit_code == 2
    assert "--local-cache-size -1.0: expected a number of gigabytes over 0" in refused.output


def test_flags_of_copies_need_an_address(scene_cache: Path, tmp_path: Path) -> None:
    """With a cache on this machine, flags of local copies have no effect, so they are refused."""
    out = ("--out", tmp_path / "r")
    refused = run("train", scene_cache, *out, *FLAGS, "--local-cache-size", 5)
    assert refused.exit_code == 2
    assert "--local-cache-size: expected a cache in an object store, which is copied" in (
        refused.output
    )
    assert not (tmp_path / "r").exists()


def test_python_takes_addresses_of_caches_alone(
    address: str, scene_cache: Path, tmp_path: Path
) -> None:
    """`dtcache.open` and `dtcache.train` read a remote cache; other paths are no addresses."""
    [done] = dtcache.train(
        address,
        tmp_path / "t",
        student="resnet10t",
        epochs=1,
        batch_size=8,
        fpn_width=16,
        warmup_epochs=0,
        device="cpu",
        log_with="none",
    )
    assert done.steps > 0
    for call in (
        lambda: dtcache.train(scene_cache, "s3://bucket/run"),
        lambda: dtcache.train(scene_cache, tmp_path / "x", images="s3://bucket/images"),
    ):
        with pytest.raises(ConfigError, match=r"expected a path on this machine, got an address"):
            call()
    with dtcache.open(address) as remote, dtcache.open(scene_cache) as local:
        assert remote[3].key == local[3].key
        for name, feature in local[3].features.items():
            assert remote[3].features[name].equal(feature)
        assert repr(remote).startswith(f"dtcache.open({address!r})")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("train", "s3://no-such-bucket/x"), "the bucket does not exist"),
        (("train", "s3:///x"), "expected an address such as s3://bucket/folder"),
        (("train", "ftp://host/x"), "expected an address such as s3://bucket/folder"),
        (("export", "s3://bucket/x"), "s3://bucket/x: expected a path on this machine"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    address: str, tmp_path: Path, arguments: tuple[str, str], problem: str
) -> None:
    """A missing bucket and addresses of another form end in one line; nothing is begun."""
    out = ("--out", tmp_path / "r")
    result = run(*arguments, *out)
    assert result.exit_code in (1, 2)
    assert problem in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "r").exists()
