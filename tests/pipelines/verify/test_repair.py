"""Repair through the command line: a damaged file is restored byte for byte, or not written."""

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from support.files import flip
from support.interrupts import interrupt

from cli import main
from dtcache.atomic_files import FolderLock
from dtcache.cache.cache import Cache
from dtcache.options import ExtractOptions
from dtcache.options.images import ImagesOptions
from dtcache.store.manifest import read_manifest
from dtcache.store.writer import ShardData
from dtcache.store.zarr_nodes import zarr_nodes
from pipelines.make_teacher import options_from_recipe
from pipelines.verify import repair as repair_module

VOLATILE = {"extraction.log.json", ".lock"}
FLAGS = [
    "--precision",
    "fp32",
    "--device",
    "cpu",
    "--batch-size",
    "8",
    "--shard-rows",
    "8",
    "--bytes-per-image",
    "512",
    "--limit",
    "20",
    "--taps",
    "4,8",
]


def tree(root: Path) -> dict[str, bytes]:
    """Return the bytes of a cache's files by path, without the volatile files."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in VOLATILE)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def shared(scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of 20 scenes, three shards, that no test changes."""
    out = tmp_path_factory.mktemp("repair") / "cache"
    result = CliRunner().invoke(
        main,
        ["extract", str(scene_folder), "--teacher", str(teacher_dir), "--out", str(out), *FLAGS],
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged."""
    return Path(shutil.copytree(shared, tmp_path / "cache"))


def repair(root: Path, images: Path, teacher: Path) -> tuple[Result, dict[str, dict[str, str]]]:
    """Run the repair and return its result and one outcome line per file."""
    command = [
        "verify",
        root,
        "--repair",
        "--images",
        images,
        "--teacher",
        teacher,
        "--json",
    ]
    result = CliRunner().invoke(main, [str(part) for part in command])
    lines = json.loads(result.stdout)["repair"] if result.stdout else []
    return result, {line["path"]: line for line in lines}


def test_damaged_files_come_back_byte_for_byte(
    root: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """Damaged and lost shards, taps and Zarr nodes are restored byte for byte.

    Other shards are not recomputed.
    """
    wanted = tree(root)
    flip(root / "data.zarr/t150/c.0.0.0")
    os.truncate(root / "data.zarr/t150/c.2.0.0", 9)
    shutil.rmtree(root / "data.zarr/images")
    for path in list((root / "data.zarr").rglob("zarr.json")):
        path.unlink()
    result, said = repair(root, scene_folder, teacher_dir)
    assert result.exit_code == 0, result.output
    assert {line["outcome"] for line in said.values()} == {"repaired"}
    assert {path for path in said if "zarr.json" not in path} == {
        "data.zarr/t150/c.0.0.0",
        "data.zarr/t150/c.2.0.0",
        *(f"data.zarr/images/c.{shard}.0" for shard in range(3)),
    }
    assert tree(root) == wanted


def test_a_link_in_the_cache_is_never_followed(
    root: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Repair replaces a link to a file, and refuses a link to a folder in one line.

    The files outside the cache keep their bytes, and none is added or deleted.
    """
    wanted = tree(root)
    folder = root / "data.zarr/t150"
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside)
    flip(outside / "c.0.0.0")
    before = tree(outside)
    (folder / "c.0.0.0").unlink()
    (folder / "c.0.0.0").symlink_to(outside / "c.0.0.0")
    result, _ = repair(root, scene_folder, teacher_dir)
    assert result.exit_code == 0, result.output
    assert not (folder / "c.0.0.0").is_symlink() and tree(root) == wanted
    assert tree(outside) == before
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    result, _ = repair(root, scene_folder, teacher_dir)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    assert f"{folder}: expected no symbolic links in a folder that is written" in result.stderr
    assert tree(outside) == before


def test_a_lost_shard_index_is_proved_by_its_own_hash(
    root: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """shards.parquet is rebuilt from intact shards by its recorded hash, or refused."""
    wanted = tree(root)
    (root / "shards.parquet").unlink()
    flip(root / "data.zarr/images/c.1.0")
    before = tree(root)
    result, said = repair(root, scene_folder, teacher_dir)
    assert result.exit_code == 3
    wanted_note = (
        "the files that it is rebuilt from are damaged too; delete this cache and extract it again"
    )
    assert said["shards.parquet"]["note"] == wanted_note
    assert "the record of its SHA-256 is damaged too" in said["data.zarr/images/c.1.0"]["note"]
    assert tree(root) == before
    flip(root / "data.zarr/images/c.1.0")
    result, said = repair(root, scene_folder, teacher_dir)
    assert (result.exit_code, said["shards.parquet"]["outcome"]) == (0, "repaired")
    assert tree(root) == wanted


def test_an_unfinished_cache_is_repaired_too(
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared: Path,
) -> None:
    """A committed shard of a killed extraction is restored, and a resume ends in equal bytes."""
    from pipelines.extract import shard_runner as runner

    out = tmp_path / "c"
    command = [
        "extract",
        str(scene_folder),
        "--teacher",
        str(teacher_dir),
        "--out",
        str(out),
        *FLAGS,
    ]
    with monkeypatch.context() as patch:
        interrupt(patch, runner, "packed_rows", call=3)
        assert CliRunner().invoke(main, command).exit_code == 130
    (out / "data.zarr/t150/c.1.0.0").unlink()
    result, said = repair(out, scene_folder, teacher_dir)
    assert result.exit_code == 4, result.output
    assert {path: line["outcome"] for path, line in said.items()} == {
        "data.zarr/t150/c.1.0.0": "repaired"
    }
    assert CliRunner().invoke(main, command).exit_code == 0
    assert tree(out) == tree(shared)


def test_other_bytes_are_refused(
    root: Path, scene_folder: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this machine computes other features, images are repaired and features are refused."""
    real = repair_module.shard_data

    def elsewhere(*arguments: object) -> ShardData:
        work = real(*arguments)
        payloads = {
            n: [p[:-1] + b"\1" if n != "images" else p for p in found]
            for n, found in work.payloads.items()
        }
        return replace(work, payloads=payloads)

    wanted = tree(root)
    flip(root / "data.zarr/images/c.0.0")
    flip(root / "data.zarr/t150/c.0.0.0")
    damaged = (root / "data.zarr/t150/c.0.0.0").read_bytes()
    monkeypatch.setattr(repair_module, "shard_data", elsewhere)
    result, said = repair(root, scene_folder, teacher_dir)
    assert result.exit_code == 3
    line = said["data.zarr/t150/c.0.0.0"]
    assert (line["outcome"], said["data.zarr/images/c.0.0"]["outcome"]) == ("refused", "repaired")
    assert (
        "the recomputed bytes do not have the recorded SHA-256, so they were not written; repair on"
        in line["note"]
    )
    assert tree(root) == {**wanted, "data.zarr/t150/c.0.0.0": damaged}


def test_other_images_or_another_teacher_are_refused(
    root: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Other images or a different teacher are refused with names, and nothing is written."""
    flip(root / "data.zarr/images/c.0.0")
    before = tree(root)
    key = json.loads(CliRunner().invoke(main, ["verify", str(root), "--json"]).stdout)["damage"][0][
        "samples"
    ][0]["key"]
    images = Path(shutil.copytree(scene_folder, tmp_path / "images"))
    other = next(p for p in sorted(images.rglob("*.png")) if p != images / key)
    shutil.copy(other, images / key)
    result, said = repair(root, images, teacher_dir)
    assert result.exit_code == 3
    assert (
        f"image {key} has changed since the extraction, so nothing was written"
        in said["data.zarr/images/c.0.0"]["note"]
    )
    (images / key).rename(images / key.replace("/", "/renamed-"))
    result, _ = repair(root, images, teacher_dir)
    assert result.exit_code == 2
    assert "holds a cache of another recipe: of other images: 1 image was removed" in result.stderr
    teacher = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    config = teacher / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    result, _ = repair(root, scene_folder, teacher)
    assert result.exit_code == 2
    assert (
        f"--teacher {teacher}: not the teacher of {root}: expected noise levels [" in result.stderr
    )
    assert tree(root) == before


def test_what_cannot_be_repaired_is_left_and_said(
    root: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """Codec, sample index and manifest are not repaired, and each is reported with a remedy."""
    flip(root / "codec.safetensors.zst")
    flip(root / "data.zarr/t150/c.0.0.0")
    flip(root / "samples.parquet")
    before = tree(root)
    result, said = repair(root, scene_folder, teacher_dir)
    assert result.exit_code == 3
    assert (
        said["samples.parquet"]["note"]
        == "restore it from a copy, or delete this cache and extract it again"
    )
    assert said["codec.safetensors.zst"]["outcome"] == "impossible"
    assert "the codec's arrays are damaged" in said["data.zarr/t150/c.0.0.0"]["note"]
    assert tree(root) == before
    flip(root / "manifest.json", 30)
    result, said = repair(root, scene_folder, teacher_dir)
    assert (result.exit_code, said["manifest.json"]["outcome"]) == (3, "impossible")


def test_a_cache_that_is_being_written_is_not_repaired(
    root: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """A repair is refused while another process holds the cache's lock."""
    with FolderLock(root):
        result, _ = repair(root, scene_folder, teacher_dir)
    assert result.exit_code == 1
    assert "is being written by another process; wait for it or stop it" in result.stderr


def test_nodes_are_the_writers_own(root: Path) -> None:
    """Each zarr.json rebuilt from the manifest equals the file on disk."""
    wanted = {name: content for name, content in tree(root).items() if name.endswith("zarr.json")}
    assert len(wanted) == 3
    assert zarr_nodes(read_manifest(root).arrays.values()) == wanted


def test_a_teacher_whose_features_are_all_zero(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A cache of zero features decodes to zeros, and its Zarr nodes are rebuilt."""
    teacher = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights
    )
    out = tmp_path / "cache"
    command = ["extract", str(scene_folder), "--teacher", str(teacher), "--out", str(out), *FLAGS]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    wanted = tree(out)
    opened = Cache(out)
    decoded = opened.decoder(opened.names)(opened.batch([0, 1], [0, 1], opened.names).coefficients)
    assert all(torch.equal(maps, torch.zeros_like(maps)) for maps in decoded.values())
    for path in [*(out / "data.zarr").rglob("zarr.json"), out / "data.zarr/t150/c.1.0.0"]:
        path.unlink()
    result, said = repair(out, scene_folder, teacher)
    assert result.exit_code == 0, said
    assert tree(out) == wanted


def test_every_option_follows_from_the_recipe(shared: Path) -> None:
    """A repair's options equal the extraction's options except for the size of the payloads.

    The repair uses the cache's own codec fit. A new option must be added to options_from_recipe.
    """
    found = options_from_recipe(read_manifest(shared).recipe, "teacher")
    told = {
        "teacher": "teacher",
        "size": "32x32",
        "taps": "stride4,stride8",
        "batch_size": 8,
        "limit": 20,
    }
    told |= {"timestep": (150,), "resize_mode": "crop", "seed": 0, "flip": True, "shard_rows": 8}
    told |= {
        "device": "cpu",
        "precision": "fp32",
        "draws": 1,
        "average": False,
        "store_images": True,
    }
    told |= {
        "prompt": None,
        "condition": None,
        "threads": 1,
        "encoding": "ddpm",
        "ddim_steps": None,
        "compile": False,
    }
    assert {name: getattr(found, name) for name in told} == told
    assert {f.name for f in fields(ExtractOptions)} == {
        *told,
        # How the images are read: a repair is passed these options again, and compares the samples.
        *(f.name for f in fields(ImagesOptions)),
        "max_failures",
        "quality",
        "bytes_per_image",
        "workers",
        "scheduler",
        "dashboard",
        "skip_disk_check",
    }
