"""timm networks as teachers on the command line: extract, repair, show, probe, train."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli import run, words
from support.timm_folders import MEAN, STD, VIT, save_network

import dtcache
from dtcache.images import FolderSource, decode_view
from pipelines.runs.metrics import read_metrics

FAST = words("--device cpu --precision fp32 --size 32 --batch-size 4 --limit 16 --shard-rows 8")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small ViT."""
    folder = tmp_path_factory.mktemp("vit")
    save_network(folder, **VIT)
    return folder


def test_extract_caches_the_blocks_of_a_timm_teacher(
    vit: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """A float16 cache holds timm's own features of each image, and is repaired from the teacher."""
    teacher = f"timm:local-dir:{vit}"
    flags = ("--teacher", teacher, "--taps", "block1,block4", "--quality", "fp16", *FAST)
    result = run("extract", scene_folder, "--out", tmp_path / "c", *flags)
    assert result.exit_code == 0, result.output
    assert "1 prefix tokens (class token, registers) per image are in no map" in result.output
    network = save_network(tmp_path / "again", **VIT)
    with dtcache.open(tmp_path / "c") as cache:
        assert cache.timesteps == (0,)
        assert cache.names == ["t0/block1", "t0/block4"]
        assert cache.num_views == 2
        sample = cache[3]
        source = FolderSource(scene_folder)
        pixels, _ = decode_view(source.read(source.keys.index(sample.key)), cache.view)
    twice = np.stack([pixels, pixels[:, :, ::-1]])
    x_BCHW = (twice / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.inference_mode():
        expected = network.forward_intermediates(
            torch.from_numpy(x_BCHW).float(), indices=[1, 4], intermediates_only=True
        )
    for maps, own in zip(sample.features.values(), expected, strict=True):
        assert (maps - own).norm() < 2e-3 * own.norm()  # float16 has 11 bits

    shard = tmp_path / "c" / "data.zarr" / "t0" / "c.1.0.0"
    whole = shard.read_bytes()
    shard.unlink()
    repair = ("--repair", "--images", scene_folder, "--teacher", teacher)
    assert run("verify", tmp_path / "c", *repair).exit_code == 0
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--timestep 0", "--timestep 0: a timm teacher takes no noise; leave --timestep out"),
        ("--draws 2", "a timm teacher draws no noise: expected --draws 1 and no --average"),
        ("--encoding ddim", "--encoding ddim: a timm teacher takes no noise"),
        ("--prompt cat", "--prompt: a timm teacher reads no text"),
        ("--size 36x32", "--size 36x32: vit_tiny_patch16_224 reads patches of 8 pixels"),
        ("--taps block9", "--taps block9: the teacher has no such map at this size"),
    ],
)
def test_extract_refuses_what_a_timm_teacher_does_not_have(
    flags: str, message: str, vit: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """Noise, text, sizes and taps that the teacher lacks give one line, and nothing is begun."""
    teacher = ("--teacher", f"timm:local-dir:{vit}")
    out = tmp_path / "c"
    result = run("extract", scene_folder, "--out", out, *teacher, *FAST, *words(flags))
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output and not out.exists()


def test_show_describes_and_probes_a_timm_teacher(
    vit: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """`teacher show` lists the blocks with shapes and FLOPs, and probes them without a timestep."""
    teacher = f"timm:local-dir:{vit}"
    shown = run("teacher", "show", teacher, "--json")
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert report["architecture"] == "timm:vit_tiny_patch16_224"
    assert [tap["name"] for tap in report["taps"]] == [f"block{i}" for i in range(5)]
    assert [tap["default"] for tap in report["taps"]] == [True, True, False, True, True]
    assert report["taps"][4]["flops"] == report["flops"]  # no head follows the last block
    assert report["timesteps"] == []
    text = run("teacher", "show", teacher).output
    assert "it reads images as they are" in text and "1 prefix tokens" in text
    assert "--timestep" not in text
    probe = ("--probe", scene_folder, "--device", "cpu", "--limit", 24)
    probed = run("teacher", "show", teacher, *probe, "--json")
    assert probed.exit_code == 0, probed.output
    scores = json.loads(probed.stdout)["probe"]["scores"]
    assert [(s["name"], s["timestep"]) for s in scores] == [(f"block{i}", 0) for i in range(5)]


def test_a_timm_teacher_runs_in_the_loop(vit: Path, scene_folder: Path, tmp_path: Path) -> None:
    """`train --teacher timm:...` needs no timestep; its first loss is that of a float16 cache."""
    teacher = ("--teacher", f"timm:local-dir:{vit}")
    taps = ("--taps", "block1,block4")
    training = words(
        "--student test_resnet --epochs 1 --batch-size 4 --fpn-width 8 --device cpu --log-every 1"
        " --precision fp32 --log-with none --limit 16"
    )
    flags = (*training, *teacher, *taps, "--size", "32")
    taught = run("train", scene_folder, "--out", tmp_path / "online", *flags)
    assert taught.exit_code == 0, taught.output
    extraction = (*FAST, *teacher, *taps, "--quality", "fp16")
    assert run("extract", scene_folder, "--out", tmp_path / "c", *extraction).exit_code == 0
    assert run("train", tmp_path / "c", "--out", tmp_path / "cached", *training).exit_code == 0
    first = [
        next(line["loss"] for line in read_metrics(tmp_path / run_name) if "loss" in line)
        for run_name in ("online", "cached")
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-3)
    refused = run("train", scene_folder, "--out", tmp_path / "r", *flags, "--timestep", "50")
    assert "--timestep 50: a timm teacher takes no noise" in refused.output
