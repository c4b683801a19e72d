"""A worker's shards in this process: equal bytes, one loaded teacher, and refused assignments."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import run
from support.files import flip

from dtcache.errors import CacheMismatchError, ClusterError, ConfigError, ImagesNotFoundError
from dtcache.options import ExtractOptions
from dtcache.process_settings import cpu_threads
from dtcache.store.manifest import read_manifest
from pipelines.extract.extract import extract
from pipelines.extract.plan import resolve_threads
from pipelines.extract.workers import worker
from pipelines.extract.workers.dispatch import make_assignment, worker_environments

OPTIONS = ExtractOptions(
    teacher="",
    device="cpu",
    precision="fp32",
    batch_size=8,
    shard_rows=8,
    bytes_per_image=4608,
    limit=24,
    threads=1,
)


@pytest.fixture(scope="module")
def cache(scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of three shards, made by one process."""
    out = tmp_path_factory.mktemp("worker") / "cache"
    extract(scene_folder, out, replace(OPTIONS, teacher=str(teacher_dir)))
    return out


@pytest.fixture
def assignment(cache: Path, scene_folder: Path, teacher_dir: Path) -> str:
    """The coordinator's assignment for that cache."""
    options = replace(OPTIONS, teacher=str(teacher_dir), workers=2)
    return make_assignment(cache, read_manifest(cache), scene_folder, options)


def changed(assignment: str, **fields: Any) -> str:
    """Return an assignment with changed fields."""
    return json.dumps({**json.loads(assignment), **fields})


def with_options(assignment: str, **fields: Any) -> str:
    """Return an assignment with changed options."""
    return changed(assignment, options={**json.loads(assignment)["options"], **fields})


def test_a_worker_writes_the_bytes_of_one_process(
    cache: Path, assignment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards in any order have the committed bytes; the teacher is loaded only if it changes."""
    real = worker.make_plan
    state = worker.ShardWorker()
    loads = []
    rows = []

    def make_plan(*arguments: Any, **named: Any) -> Any:
        loads.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(worker, "make_plan", make_plan)
    for shard in (2, 0):
        made = state.compute(assignment, shard, rows.append)
        places = made.temporaries(cache)
        assert len(places) == 2
        for temporary, place in places.items():
            assert temporary.read_bytes() == place.read_bytes()
            temporary.unlink()
    assert (len(loads), sum(rows)) == (1, 16)
    again = changed(assignment, threads=2)
    for temporary in state.compute(again, 1, rows.append).temporaries(cache):
        temporary.unlink()
    assert (len(loads), state.assignment) == (2, again)


def test_a_worker_that_is_not_fit_says_why(
    cache: Path, assignment: str, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Different versions, storage, images or teacher are refused in one line before any work."""

    state = worker.ShardWorker()

    def refused(told: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            state.compute(told, 0, lambda count: None)

    refused(
        changed(assignment, torch="1.0"),
        ClusterError,
        r"^it has torch \S+, the coordinator 1\.0: other versions give",
    )
    refused(
        changed(assignment, dtcache="9"),
        ClusterError,
        r"^it has dtcache \S+, the coordinator 9: .*install the same",
    )
    elsewhere = str(tmp_path / "gone")
    refused(
        changed(assignment, root=elsewhere),
        ClusterError,
        rf"^it does not see the cache {elsewhere} \(.*\); pass an `out` on storage that the "
        rf"coordinator and all wor",
    )
    refused(
        changed(assignment, fingerprint="0"),
        ClusterError,
        rf"^it sees another cache at {cache} than the coord",
    )
    refused(
        changed(assignment, images=elsewhere), ImagesNotFoundError, rf"{elsewhere} does not exist"
    )
    fewer = Path(shutil.copytree(scene_folder, tmp_path / "fewer"))
    next(iter(sorted(fewer.rglob("*.png")))).unlink()
    refused(changed(assignment, images=str(fewer)), CacheMismatchError, "samples_sha256 is ")
    other = Path(shutil.copytree(teacher_dir, tmp_path / "other"))
    weights = next(other.rglob("*.safetensors"))
    flip(weights, -1)
    refused(
        with_options(assignment, teacher=str(other)),
        CacheMismatchError,
        r"teacher\.weights_sha256 is ",
    )
    refused(
        with_options(assignment, precision="bf16"),
        CacheMismatchError,
        r'teacher\.precision is "fp32" in the cache',
    )
    if not torch.cuda.is_available():
        refused(
            with_options(assignment, device="cuda"),
            ConfigError,
            "`device` cuda: this machine has 0 CUDA devices",
        )
    assert state.assignment is None


def test_an_assignment_is_resolved(cache: Path, assignment: str) -> None:
    """An assignment has absolute paths and the recipe's constants, and no machine's defaults."""
    told = json.loads(assignment)
    assert all(
        Path(path).is_absolute()
        for path in (told["root"], told["images"], told["options"]["teacher"])
    )
    wanted = {
        "device": "cpu",
        "precision": "fp32",
        "size": "32x32",
        "threads": 1,
        "workers": None,
        "scheduler": None,
    }
    assert {name: told["options"][name] for name in wanted} == wanted
    assert (told["threads"], told["fingerprint"]) == (1, read_manifest(cache).fingerprint)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--workers", 2, "--scheduler", "tcp://a:1"),
            "--workers 2 starts a cluster, --scheduler tcp://a:1 uses one",
        ),
        (("--workers", 0), "--workers 0: expected at least 1"),
        (("--threads", 0), "--threads 0: expected at least 1"),
    ],
)
def test_options_that_contradict_each_other(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    """Contradicting cluster options are refused before anything is loaded or created."""
    result = run("extract", scene_folder, "--teacher", teacher_dir, "--out", tmp_path / "c", *flags)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "c").exists()


def test_threads_are_a_constant_of_the_recipe(
    cache: Path,
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first run records the threads per worker, and a resume uses and never changes them."""
    assert read_manifest(cache).recipe["threads"] == 1
    with cpu_threads(8):
        assert torch.get_num_threads() == 8

        def chosen(**more: Any) -> int | None:
            return resolve_threads(replace(OPTIONS, threads=None, **more), "cpu", None)

        assert [chosen(), chosen(workers=3), chosen(workers=20), chosen(scheduler="tcp://a:1")] == [
            8,
            2,
            1,
            1,
        ]
        assert resolve_threads(replace(OPTIONS, threads=None), "cpu", {"threads": 5}) == 5
        assert resolve_threads(replace(OPTIONS, threads=3), "cpu", {"threads": 5}) == 3
        assert resolve_threads(replace(OPTIONS, threads=3), "cuda", None) is None
    assert torch.get_num_threads() == 1
    flags = (
        "--limit",
        24,
        "--shard-rows",
        8,
        "--batch-size",
        8,
        "--bytes-per-image",
        4608,
        "--device",
        "cpu",
    )
    flags = (*flags, "--precision", "fp32")
    result = run(
        "extract", scene_folder, "--teacher", teacher_dir, "--out", cache, *flags, "--threads", 2
    )
    assert "threads is 1 in the cache, 2 in this run" in result.output
    assert (
        run("extract", scene_folder, "--teacher", teacher_dir, "--out", cache, *flags).exit_code
        == 0
    )


def test_local_workers_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each local worker gets one of CUDA_VISIBLE_DEVICES; more workers than GPUs are refused."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert worker_environments(2, "cuda") == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,4,5")
    assert worker_environments(2, "cuda") == [
        {"CUDA_VISIBLE_DEVICES": "6"},
        {"CUDA_VISIBLE_DEVICES": "4"},
    ]
    with pytest.raises(
        ConfigError, match="`workers` 4: expected at most one per GPU, and this machine has 3"
    ):
        worker_environments(4, "cuda")
    assert worker_environments(4, "cpu") == [{}] * 4
