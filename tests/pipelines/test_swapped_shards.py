"""Every verb that reads features refuses two exchanged shard files of equal size."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.cli import run, words
from support.extraction import quick_extraction

from pipelines.extract.extract import extract

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def swapped(
    scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache of fp16 maps, whose shard files have equal sizes; the first two are exchanged."""
    options = quick_extraction(teacher_dir, taps="8", quality="fp16", shard_rows=16)
    root = tmp_path_factory.mktemp("swapped") / "cache"
    extract(scene_folder, root, options)
    first, second = sorted((root / "data.zarr" / "t150").glob("c.[01].0.0"))
    assert first.stat().st_size == second.stat().st_size
    content = first.read_bytes()
    assert content != second.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(content)
    return root


MESSAGE = re.compile(
    r"t150/c\.([01])\.0\.0: expected SHA-256 \S+, it is "
    r"data\.zarr/t150/c\.(?!\1)[01]\.0\.0"
)


@pytest.mark.parametrize(
    "command",
    [
        "train {cache} --student resnet10t --epochs 1 --batch-size 8 --warmup-epochs 0 "
        "--fpn-width 16 --student-size 32 --device cpu --out {out}",
        "evaluate {cache} --train {images} --k 3 --device cpu",
    ],
    ids=["train", "evaluate"],
)
def test_swapped_shards_are_refused(
    swapped: Path, scene_folder: Path, tmp_path: Path, command: str
) -> None:
    """The verb ends with an error that names the file and where its content belongs."""
    out = tmp_path / "out"
    result = run(*words(command.format(cache=swapped, images=scene_folder, out=out)))
    assert result.exit_code == 1
    assert MESSAGE.search(" ".join(result.stderr.split()))
    assert not out.exists()


@pytest.mark.usefixtures("apart")
def test_statistics_leave_swapped_shards_out(swapped: Path) -> None:
    """The statistics are of the third shard alone, and each sample of the others is named."""
    result = run("inspect", swapped, "--stats", "--json")
    assert result.exit_code == 0
    statistics = json.loads(result.stdout)["statistics"]
    left_out = statistics["left_out"]
    assert len(left_out) == 32 and not statistics["exact"]
    mean = statistics["taps"][0]["mean"]
    assert mean["low"] < mean["value"] < mean["high"]
    assert all(MESSAGE.search(" ".join(json.dumps(entry).split())) for entry in left_out.values())
