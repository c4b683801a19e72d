"""Encodings through the command line and from Python: DDIM inversion, and torch modules as
teachers.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli import run, words
from support.interrupts import interrupt
from teacher.batches import batch_of
from torch import nn

from dtcache.cache.cache import Cache
from dtcache.device import resolve_compute
from dtcache.errors import CacheMismatchError
from dtcache.images import FolderSource, decode_view
from dtcache.options import ExtractOptions
from dtcache.recipe import ViewSpec
from dtcache.teacher import CallableTeacher, TeacherSettings, load_teacher, prepare_teacher
from dtcache.whitening import whiten
from pipelines.extract.extract import extract

DOCS = Path(__file__).resolve().parents[3] / "docs"
FLAGS = words("--precision fp32 --device cpu --batch-size 4 --shard-rows 4 --limit 8")
DDIM = ("--encoding", "ddim", "--ddim-steps", 4, "--timestep", 200, "--taps", "4,8")


def tree(root: Path) -> dict[str, bytes]:
    files = (
        p
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name not in {"extraction.log.json", ".lock"}
    )
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def inverted(
    scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache of 8 inverted scenes, float16."""
    out = tmp_path_factory.mktemp("ddim") / "cache"
    result = run(
        "extract",
        scene_folder,
        "--teacher",
        teacher_dir,
        "--out",
        out,
        *FLAGS,
        *DDIM,
        "--quality",
        "fp16",
    )
    assert result.exit_code == 0, result.output
    assert re.search(
        r"t200: images inverted and denoised back have a relative squared error of \d\.\de[-+]\d\d",
        result.stderr,
    )
    return out


def test_a_ddim_cache_holds_the_inverted_images_features(
    inverted: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """Each view holds the teacher's float16 features of that view's own DDIM inversion."""
    cache = Cache(inverted)
    source = FolderSource(scene_folder)
    made = prepare_teacher(
        load_teacher(str(teacher_dir)),
        TeacherSettings(
            view=ViewSpec(height=32, width=32),
            taps=("stride4", "stride8"),
            timesteps=(200,),
            batch_size=4,
            ddim_steps=4,
        ),
        resolve_compute("cpu", "fp32"),
    )
    key = cache.samples["key"][3].as_py()
    pixels = decode_view(source.read(source.keys.index(key)), cache.view)[0]
    for view, flip in enumerate((False, True)):
        (raw,) = made.features(batch_of(made, [pixels], ["any"], [flip], seed=5, draws=[0]))
        coefficients, _ = cache.coefficients([3], [view], cache.names)
        for name, found in cache.decoder(cache.names)(coefficients).items():
            np.testing.assert_allclose(found[0].numpy(), whiten(raw[name])[0][0].numpy(), atol=4e-3)


def test_a_ddim_cache_says_what_it_is(inverted: Path) -> None:
    """Manifest and inspect show steps, alpha-bar, SNR and round-trip error, and a noise of zero."""
    report = json.loads(run("inspect", inverted, "--json").stdout)
    recipe = report["recipe"]
    alpha_bar = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[200])
    (noise,) = report["timesteps"]
    assert noise["timestep"] == 200
    assert (noise["alpha_bar"], noise["snr"]) == pytest.approx(
        (alpha_bar, alpha_bar / (1 - alpha_bar)), rel=1e-4
    )
    assert recipe["teacher"]["snrs"] == [noise["snr"]]
    assert recipe["teacher"]["ddim_steps"] == 4
    assert 0 < noise["round_trip"] == recipe["round_trip"]["t200"] < 0.5
    assert (
        set(recipe["codec"]["noise_share"].values())
        == set(recipe["codec"]["noise_floor"].values())
        == {0.0}
    )
    for tap in report["taps"]:
        assert tap["flip_error"] == recipe["equivariance"]["flip"][f"t200/{tap['name']}"] > 0
        assert tap["crop_error"] == recipe["equivariance"]["crop"][f"t200/{tap['name']}"] > 0
    shown = run("inspect", inverted).output
    assert "DDIM: inverted in 4 steps" in shown
    assert (
        f"alpha-bar {alpha_bar:.4f}, SNR {noise['snr']:.3g}, round trip {noise['round_trip']:.1e}"
        in shown
    )
    assert "equivariance: relative squared error" in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--ddim-steps", 5), r"teacher\.ddim_steps is 4 in the cache, 5 in this run"),
        (("--encoding", "ddpm"), r"teacher\.ddim_steps is 4 in the cache, null in this run"),
    ],
)
def test_another_encoding_is_another_recipe(
    inverted: Path, scene_folder: Path, teacher_dir: Path, flags: tuple[object, ...], field: str
) -> None:
    """A resume with another number of steps, or with noise in place of inversion, is refused."""
    more = (
        (*DDIM, *flags) if "--ddim-steps" in flags else ("--timestep", 200, "--taps", "4,8", *flags)
    )
    result = run(
        "extract",
        scene_folder,
        "--teacher",
        teacher_dir,
        "--out",
        inverted,
        *FLAGS,
        *more,
        "--quality",
        "fp16",
    )
    assert result.exit_code == 2
    assert re.search(field, result.output)


def test_a_noised_cache_is_not_inverted_into(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A noised cache, whose recipe has no encoding field, is refused by an inverted extraction."""
    flags = (*FLAGS, "--timestep", 200, "--taps", "4,8")
    out = ("--teacher", teacher_dir, "--out", tmp_path / "c")
    assert run("extract", scene_folder, *out, *flags).exit_code == 0
    result = run("extract", scene_folder, *out, *FLAGS, *DDIM)
    assert result.exit_code == 2
    assert "teacher.ddim_steps is null in the cache, 4 in this run" in result.output


def test_a_resumed_inversion_ends_in_the_same_bytes(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed extraction reuses its measurements and ends in the same bytes."""
    from pipelines.extract import open_writer as stage
    from pipelines.extract import shard_runner as runner

    real = stage.measure
    measured = []
    monkeypatch.setattr(stage, "measure", lambda *a: measured.append(1) or real(*a))
    flags = (*FLAGS, *DDIM, "--bytes-per-image", 600)

    for out, stops in (("whole", False), ("halved", True)):
        with monkeypatch.context() as patch:
            if stops:
                interrupt(patch, runner, "packed_rows", call=1)
            result = run(
                "extract", scene_folder, "--teacher", teacher_dir, "--out", tmp_path / out, *flags
            )
            assert result.exit_code == (130 if stops else 0), result.output
    assert (
        run(
            "extract", scene_folder, "--teacher", teacher_dir, "--out", tmp_path / "halved", *flags
        ).exit_code
        == 0
    )
    assert len(measured) == 2
    assert tree(tmp_path / "whole") == tree(tmp_path / "halved")


def test_a_lost_shard_of_an_inverted_cache_is_made_anew(
    inverted: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """verify --repair recomputes an inverted shard to the recorded bytes by the recipe's steps."""
    victim = inverted / "data.zarr/t200/c.1.0.0"
    before = victim.read_bytes()
    victim.unlink()
    result = run("verify", inverted, "--repair", "--images", scene_folder, "--teacher", teacher_dir)
    assert result.exit_code == 0, result.output
    assert victim.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--draws", 2),
            "--encoding ddim draws no noise: expected --draws 1 and no --average, got --draws 2",
        ),
        (("--timestep", 10), "--ddim-steps 20: expected at most 10, the steps up to --timestep 10"),
    ],
)
def test_contradicting_encodings_are_refused(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    """Contradicting encoding options are refused in one line and leave nothing on disk."""
    result = run(
        "extract",
        scene_folder,
        "--teacher",
        teacher_dir,
        "--out",
        tmp_path / "c",
        *FLAGS,
        "--encoding",
        "ddim",
        *flags,
    )
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "c" / "manifest.json").exists()


class Edges(nn.Module):
    """A module with one map of stride 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.map = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


def test_a_module_is_extracted_and_its_cache_resumed_only_by_its_like(
    scene_folder: Path, tmp_path: Path
) -> None:
    """A cache holds the module's own maps, and another version of the module is refused."""
    options = ExtractOptions(
        timestep=(0,),
        size="32",
        device="cpu",
        precision="fp32",
        batch_size=4,
        limit=6,
        quality="fp16",
    )
    edges = Edges()
    done = extract(
        scene_folder,
        tmp_path,
        options,
        CallableTeacher(edges, taps={"stride4": "map"}, version="1"),
    )
    cache = Cache(done.root)
    pixels = torch.from_numpy(np.stack(cache.images([2]))).float() / 127.5 - 1
    with torch.inference_mode():
        wanted = edges(pixels)[0]
    [raw] = cache.raw(["t0/stride4"], [2]).values()
    torch.testing.assert_close(raw[0, 0], wanted, atol=4e-3, rtol=0)
    assert "clean images" in run("inspect", tmp_path).output
    assert extract(
        scene_folder,
        tmp_path,
        options,
        CallableTeacher(Edges(), taps={"stride4": "map"}, version="1"),
    )
    with pytest.raises(CacheMismatchError, match=r"teacher\.config_sha256"):
        extract(
            scene_folder,
            tmp_path,
            options,
            CallableTeacher(Edges(), taps={"stride4": "map"}, version="2"),
        )


@pytest.mark.slow
def test_the_documented_example_runs(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/teachers.md extracts from a module and trains a student on the cache."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "teachers.md").read_text(), re.S)[:1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(scene_folder)
    changes = {
        'weights="DEFAULT"': "weights=None",
        'size="128"': 'size="32"',
        'student="resnet50"': 'student="resnet10t"',
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "teachers.md", "exec"), {"__name__": "example"})
    assert (tmp_path / "runs/resnet50/backbone/config.json").is_file()
    assert Cache(tmp_path / "resnet18.cache").names == ["t0/stride4", "t0/stride8", "t0/stride16"]
