"""Converting ADM checkpoints: complete teachers, settings that shapes do not determine, errors."""

import hashlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from teacher.guided_diffusion import GuidedUNet, published, random_unet, small

from cli import main
from dtcache.atomic_files import FolderLock
from dtcache.errors import (
    CacheBusyError,
    ConfigError,
    DiskError,
    TeacherError,
    TeacherNotFoundError,
)
from dtcache.options import ConvertOptions
from dtcache.teacher import load_teacher
from dtcache.teacher.adm.architecture import PRESETS, AdmSettings, infer_architecture
from pipelines.convert_adm import convert_adm, resolve_settings

TINY = {"width": 32, "mult": (1, 2, 2), "blocks": 1, "attention": (2, 4), "head_channels": 16}
OPTIONS = ConvertOptions(size=16, head_channels=16)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def save(path: Path, **changes: object) -> Path:
    """Write a tiny reference's state dict as a checkpoint."""
    torch.save(random_unet(**{**TINY, **changes}).state_dict(), path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "adm.pt")


def tree(root: Path) -> dict[str, bytes]:
    """Return every file of a folder with its bytes."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_the_teacher_loads_and_its_taps_are_the_references(
    checkpoint: Path, tmp_path: Path
) -> None:
    """load_teacher reads the converted directory, and its taps equal the reference's features."""
    done = convert_adm(checkpoint, tmp_path / "out", OPTIONS)
    loaded = load_teacher(str(tmp_path / "out"))
    taps = loaded.denoiser.find_taps(16, 16)
    assert done.strides == tuple(tap.stride for tap in taps) == (1, 2, 4)
    assert loaded.denoiser.native_size == (16, 16)
    reference = random_unet(**TINY)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([50, 999])
    with torch.inference_mode():
        _, expected = reference(x, t)
        found = loaded.denoiser.tapped(taps)(x, t)
    for tap in taps:
        torch.testing.assert_close(found[tap.name], expected[tap.block], rtol=1e-4, atol=1e-4)


def test_a_class_conditional_model_reads_back(tmp_path: Path) -> None:
    """diffusers loads the class-conditional model and gives the reference's output per label."""
    convert_adm(save(tmp_path / "adm.pt", classes=5), tmp_path / "out", OPTIONS)
    unet, info = UNet2DModel.from_pretrained(
        str(tmp_path / "out" / "unet"), use_safetensors=True, output_loading_info=True
    )
    assert not any(info.values())
    assert unet.config.num_class_embeds == 5
    reference = random_unet(**TINY, classes=5)
    x = torch.randn(5, 3, 16, 16)
    t = torch.full((5,), 150)
    label = torch.arange(5)
    with torch.inference_mode():
        torch.testing.assert_close(
            unet.eval()(x, t, class_labels=label).sample,
            reference(x, t, label)[0],
            rtol=1e-4,
            atol=1e-4,
        )


def test_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    """A conversion writes unet/, scheduler/ and its provenance, with the same bytes each time."""
    for name in ("one", "two"):
        convert_adm(checkpoint, tmp_path / name, OPTIONS)
    files = tree(tmp_path / "one")
    assert files == tree(tmp_path / "two")
    assert set(files) == {
        "conversion.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS,
    }
    record = json.loads(files["conversion.json"])
    data = checkpoint.read_bytes()
    assert record["source"] == {
        "name": "adm.pt",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert record["architecture"]["channels"] == [32, 64, 64]
    assert record["settings"] == {
        "size": 16,
        "schedule": "linear",
        "order": "legacy",
        "heads": None,
        "head_channels": 16,
    }
    assert (
        DDPMScheduler.from_pretrained(str(tmp_path / "one" / "scheduler")).config.variance_type
        == "learned_range"
    )
    assert (
        str(tmp_path) not in files["conversion.json"].decode() + files["unet/config.json"].decode()
    )


def test_half_rounds_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    """--weights fp16 stores each weight's nearest fp16 in half the bytes, and the teacher loads."""
    for name, weights in (("full", "fp32"), ("half", "fp16")):
        convert_adm(
            checkpoint, tmp_path / name, ConvertOptions(size=16, head_channels=16, weights=weights)
        )
    full, half = (load_file(tmp_path / name / WEIGHTS) for name in ("full", "half"))
    assert all(torch.equal(half[key], full[key].half()) for key in full)
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.55 * (
        tmp_path / "full" / WEIGHTS
    ).stat().st_size
    load_teacher(str(tmp_path / "half"))


def test_a_half_precision_checkpoint_is_stored_in_fp32(tmp_path: Path) -> None:
    """A half-precision checkpoint is stored in fp32 with its values unchanged."""
    weights = {k: v.half() for k, v in random_unet(**TINY).state_dict().items()}
    torch.save(weights, tmp_path / "adm.pt")
    convert_adm(tmp_path / "adm.pt", tmp_path / "out", OPTIONS)
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert stored["conv_in.weight"].dtype == torch.float32
    assert torch.equal(stored["conv_in.weight"], weights["input_blocks.0.0.weight"].float())


@pytest.mark.parametrize(
    ("dtype", "value", "advice"),
    [("fp32", float("nan"), "download"), ("fp16", 1e5, "pass `weights='fp32'`")],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, dtype: str, value: float, advice: str
) -> None:
    """A NaN, or a weight that overflows fp16, is named and never stored."""
    weights = random_unet(**TINY).state_dict()
    weights["out.2.bias"][3] = value
    torch.save(weights, tmp_path / "adm.pt")
    message = rf"adm\.pt: conv_out\.bias has values that are not finite in fp(16|32); .*{advice}"
    with pytest.raises(TeacherError, match=message):
        convert_adm(
            tmp_path / "adm.pt",
            tmp_path / "out",
            ConvertOptions(size=16, head_channels=16, weights=dtype),
        )
    assert not (tmp_path / "out").exists()


def test_the_same_conversion_again_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A repeated conversion changes nothing; other options or another checkpoint are refused."""
    out = tmp_path / "out"
    out.mkdir()
    first = convert_adm(checkpoint, out, OPTIONS)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert convert_adm(checkpoint, out, OPTIONS) == first
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(
        ConfigError, match=r"`out` .*out holds another conversion; remove it or pass another `out`"
    ):
        convert_adm(checkpoint, out, ConvertOptions(size=32, head_channels=16))
    with pytest.raises(ConfigError, match="holds another conversion"):
        convert_adm(save(tmp_path / "b.pt", classes=3), out, OPTIONS)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_at_out_is_never_touched(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    """A file or a folder that is not empty is refused as output before any work."""
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    (out / "mine" if kind == "folder" else out).write_text("mine")
    with pytest.raises(
        ConfigError, match=r"`out` .*out: expected a new or empty folder, got other files"
    ):
        convert_adm(checkpoint, out, OPTIONS)
    assert (out / "mine" if kind == "folder" else out).read_text() == "mine"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Limit each file to 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, small_disk: None) -> None:
    """A full disk raises one DiskError and leaves neither the folder nor temporary files."""
    with pytest.raises(
        DiskError, match=r"cannot write .*safetensors: .*; free disk space and run the same command"
    ):
        convert_adm(checkpoint, tmp_path / "out", OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["adm.pt"]


def test_what_a_kill_left_is_cleared_and_a_live_writer_is_not(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A killed run's temporary folder is replaced, unless a live process holds its lock."""
    left = tmp_path / ".tmp-out"
    (left / "unet").mkdir(parents=True)
    (left / "unet" / "junk").write_text("x")
    with (
        FolderLock(left),
        pytest.raises(CacheBusyError, match="is being written by another process"),
    ):
        convert_adm(checkpoint, tmp_path / "out", OPTIONS)
    assert (left / "unet" / "junk").exists()
    convert_adm(checkpoint, tmp_path / "out", OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adm.pt", "out"]
    assert not any("junk" in name or "lock" in name for name in tree(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PRESETS["adm-64"][2]),
        ({"preset": "adm-64"}, PRESETS["adm-64"][2]),
        (
            {"schedule": "linear"},
            AdmSettings(size=64, schedule="linear", order="new", head_channels=64),
        ),
        (
            {"heads": 6, "size": 32, "attention_order": "legacy"},
            AdmSettings(size=32, schedule="cosine", order="legacy", heads=6),
        ),
        (
            {"head_channels": 96},
            AdmSettings(size=64, schedule="cosine", order="new", head_channels=96),
        ),
    ],
)
def test_options_come_before_the_preset(options: dict[str, object], expected: AdmSettings) -> None:
    """A published model's preset applies, and an option overrides only its own setting."""
    with torch.device("meta"):
        found = infer_architecture(GuidedUNet(**published("adm-64", 192)).state_dict())
    assert resolve_settings(found, ConvertOptions(**options)) == ("adm-64", expected)


def test_an_own_model_has_guided_diffusions_defaults() -> None:
    """Without a preset the defaults are those of guided-diffusion's training script."""
    found = infer_architecture(random_unet(**TINY).state_dict())
    assert resolve_settings(found, ConvertOptions(size=16)) == (None, AdmSettings(size=16, heads=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"`size`: levels of \[32, 64, 64\] channels and 1 blocks are none of OpenAI's "
            r"published models; pass the",
        ),
        (
            {"preset": "adm-256"},
            r"`preset='adm-256'`: expected levels of \[256, 256, 512, 512, 1024, 1024\] channels "
            r"and "
            r"2 blocks, the checkpoint has \[32, 64, 64\] and 1; leave `preset` out",
        ),
        ({"size": 18}, "`size` 18: expected a multiple of 4, the coarsest level's stride"),
        (
            {"size": 16, "heads": 4, "head_channels": 16},
            "`heads` and `head_channels`: expected one of them",
        ),
        ({"size": 16, "heads": 5}, "`heads` 5: 64 channels cannot be split into such heads"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    checkpoint: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    """An option that contradicts the checkpoint is refused with both values."""
    with pytest.raises(ConfigError, match=message):
        convert_adm(checkpoint, tmp_path / "out", ConvertOptions(**options))


def test_the_command_prints_one_line(checkpoint: Path, tmp_path: Path) -> None:
    """The command prints the model, the assumed settings and the strides of the taps."""
    arguments = [
        "teacher",
        "convert",
        str(checkpoint),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "16",
        "--heads",
        "4",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    count = sum(p.numel() for p in random_unet(**TINY).parameters())
    assert result.output == (
        f"{tmp_path / 'out'}: a custom architecture at 16 px, {count / 1e6:.1f}M parameters, "
        f"unconditional; linear "
        "schedule, 4 heads in legacy order; channels 32, 64, 64; taps at strides 1, 2, 4\n"
    )


def test_a_bad_checkpoint_is_one_line(tmp_path: Path) -> None:
    """A bad checkpoint gives the file and the reason in one line, and no folder."""
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "resnet.pt")
    result = CliRunner().invoke(
        main, ["teacher", "convert", str(tmp_path / "resnet.pt"), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {tmp_path / 'resnet.pt'}: not an ADM checkpoint: fc.weight is not part of "
        f"OpenAI's guided-diffusion "
        "U-Net\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["resnet.pt"]
    with pytest.raises(TeacherNotFoundError, match="no such file"):
        convert_adm(tmp_path / "missing.pt", tmp_path / "out", OPTIONS)


def test_the_512_px_shape_goes_the_whole_way(tmp_path: Path) -> None:
    """diffusers loads the stored timestep table and gives the reference's outputs at both ends."""
    torch.save(
        random_unet(**small("adm-512", blocks=1, classes=3)).state_dict(), tmp_path / "adm.pt"
    )
    convert_adm(tmp_path / "adm.pt", tmp_path / "out", ConvertOptions(size=64, head_channels=16))
    unet = UNet2DModel.from_pretrained(str(tmp_path / "out" / "unet")).eval()
    reference = random_unet(**small("adm-512", blocks=1, classes=3))
    x = torch.randn(2, 3, 64, 64)
    t = torch.tensor([0, 999])
    label = torch.tensor([2, 0])
    with torch.inference_mode():
        expected, _ = reference(x, t, label)
        got = unet(x, t, class_labels=label).sample
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
