"""Stage 0 on the command line: a directory that diffusers and extract load, and exact resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from support.cli import words
from support.interrupts import interrupt

from cli import main
from dtcache.errors import ConfigError
from dtcache.teacher import load_teacher
from dtcache.teacher.ddpm import build_unet, ddpm_loss, ddpm_scheduler, sample_images

FLAGS = words(
    "--size 16 --channels 8,16 --steps 6 --batch-size 4 --warmup 2 --samples 4 "
    "--save-every 2 --device cpu --precision fp32 --attention 1"
)


def teach(images: Path, out: Path, *more: object) -> Result:
    """Fit a tiny DDPM."""
    return CliRunner().invoke(
        main, [str(a) for a in ("teacher", "train", images, "--out", out, *FLAGS, *more)]
    )


@pytest.fixture(scope="module")
def taught(scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run."""
    out = tmp_path_factory.mktemp("teach") / "teacher"
    result = teach(scene_folder, out)
    assert result.exit_code == 0, result.output
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the saved weights."""
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_directory_is_standard_and_holds_no_pickle_but_the_checkpoint(taught: Path) -> None:
    """diffusers and our loader read equal weights; only the checkpoint is a pickle."""
    unet = UNet2DModel.from_pretrained(taught / "unet", use_safetensors=True)
    ours = load_teacher(str(taught)).denoiser.unet.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in unet.state_dict().items())
    assert not list(taught.rglob("*.bin"))
    assert len(json.loads((taught / "losses.json").read_text())) == 6
    for name in ("samples.png", "loss.png"):
        with Image.open(taught / name) as picture:
            assert min(picture.size) > 16
            assert np.asarray(picture.convert("L")).std() > 1


def test_a_taught_teacher_can_be_extracted_from(
    taught: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """extract accepts a trained teacher at the teacher's own size."""
    flags = ("--limit", "4", "--device", "cpu", "--batch-size", "4", "--out", str(tmp_path / "c"))
    result = CliRunner().invoke(
        main, ["extract", str(scene_folder), "--teacher", str(taught), *flags]
    )
    assert result.exit_code == 0, result.output


def test_a_teacher_of_no_steps_has_the_seeds_untrained_weights(
    scene_folder: Path, tmp_path: Path
) -> None:
    """--steps 0 writes the initial weights, which resume, `teacher show` and extract accept."""
    out = tmp_path / "untrained"
    for _ in range(2):
        result = teach(scene_folder, out, "--steps", 0, "--seed", 5)
        assert result.exit_code == 0, result.output
        assert f"{out}: a teacher with the untrained weights of --seed 5" in result.output
    torch.manual_seed(5)
    initial = build_unet(16, 16, (8, 16), layers=1, attention=1).state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in weights(out).items())
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        "losses.json",
        "model_index.json",
        "run.json",
        "scheduler",
        "unet",
    ]
    refused = teach(scene_folder, out, "--seed", 5)
    assert refused.exit_code == 2
    assert "holds a run with another --steps: expected 0, got 6" in refused.output
    shown = CliRunner().invoke(main, ["teacher", "show", str(out)])
    assert shown.exit_code == 0 and "16x16" in shown.output, shown.output
    flags = ("--limit", "4", "--device", "cpu", "--batch-size", "4", "--out", str(tmp_path / "c"))
    extracted = CliRunner().invoke(
        main, ["extract", str(scene_folder), "--teacher", str(out), *flags]
    )
    assert extracted.exit_code == 0, extracted.output


@pytest.mark.slow
def test_a_compiled_network_takes_the_same_steps(
    taught: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """--compile changes the losses only by rounding and writes the same kind of directory."""
    assert teach(scene_folder, tmp_path / "t", "--compile").exit_code == 0
    plain, compiled = (
        json.loads((out / "losses.json").read_text()) for out in (taught, tmp_path / "t")
    )
    np.testing.assert_allclose(compiled, plain, rtol=1e-3)
    assert weights(tmp_path / "t").keys() == weights(taught).keys()


def test_a_machine_without_a_compiler_is_told_so(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If compilation fails, the command ends with one clear line."""

    def refuse(module: torch.nn.Module, *, dynamic: bool) -> object:
        def call(*arguments: object) -> object:
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler was found")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    result = teach(scene_folder, tmp_path / "t", "--compile")
    assert result.exit_code == 2
    assert "--compile: no C++ compiler was found; run without it" in result.output


def test_an_interrupted_run_resumes_to_the_bit(
    taught: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run interrupted in step 6 resumes to the losses and weights of an uninterrupted run."""
    from pipelines.teach import TeacherTrainer

    calls = interrupt(monkeypatch, TeacherTrainer, "step", call=6)
    out = tmp_path / "teacher"
    result = teach(scene_folder, out)
    assert result.exit_code == 130
    assert "run the same command again to resume" in result.output
    assert teach(scene_folder, out).exit_code == 0
    assert len(calls) == 6 + 2
    assert (out / "losses.json").read_text() == (taught / "losses.json").read_text()
    theirs = weights(taught)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(out).items())


def test_a_run_of_other_options_is_refused(taught: Path, scene_folder: Path) -> None:
    """A resume with another option is refused with the option's name."""
    result = teach(scene_folder, taught, "--lr", "1")
    assert result.exit_code == 2
    assert "holds a run with another --lr: expected 0.0004, got 1.0" in result.output


def test_half_precision_weights_are_half_the_size(
    taught: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """--weights fp16 stores fp16 tensors, which load as fp32."""
    assert teach(scene_folder, tmp_path / "t", "--weights", "fp16", "--samples", 0).exit_code == 0
    assert {value.dtype for value in weights(tmp_path / "t").values()} == {torch.float16}
    assert next(load_teacher(str(tmp_path / "t")).denoiser.unet.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--size", "17"),
            "--size 17x17: 2 levels halve the image 1 times; expected both sides to be multiples "
            "of 2",
        ),
        (("--channels", "6,10"), "expected multiples of 4"),
        (("--channels", "8,x"), "--channels 8,x: expected positive integers separated by commas"),
        (("--attention", "3"), "--attention 3: expected 0 to 2, the number of levels"),
        (("--keep-steps", "3,x"), "--keep-steps 3,x: expected steps separated by commas"),
        (("--keep-steps", "0,7"), "--keep-steps 7: expected at most the 6 --steps of the run"),
        (("--snr-gamma", "0"), "--snr-gamma 0.0: expected at least 1e-12"),
        (("--max-timestep", "1001"), "--max-timestep 1001: expected at most 1000"),
        (("--ema-decay", "1"), "--ema-decay 1: expected a decay under 1, such as 0.999"),
    ],
)
def test_bad_options_are_one_clear_line(
    scene_folder: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    """Invalid options are refused in one line with their names."""
    result = teach(scene_folder, tmp_path / "t", *flags)
    assert result.exit_code == 2
    assert message in result.output


def test_a_loss_that_is_not_finite_stops_the_run(scene_folder: Path, tmp_path: Path) -> None:
    """A loss that is not finite stops the run with its step."""
    result = teach(scene_folder, tmp_path / "t", "--lr", "1e30", "--steps", "30")
    assert result.exit_code == 1
    assert "the loss is nan at step" in result.output


def test_the_loss_is_the_simple_objective() -> None:
    """The loss is the MSE of the predicted noise at x_t = sqrt(a) x + sqrt(1 - a) e.

    Source: Ho et al. 2020, eq. 14.
    """
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    noise = torch.randn(2, 3, 8, 8)
    t = torch.tensor([10, 900])
    seen = {}

    class Predictor(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> object:
            seen["x"] = x
            return type("Output", (), {"sample": x * 0.5})

    loss = ddpm_loss(Predictor(), ddpm_scheduler(), pixels, noise, t)
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t][
        :, None, None, None
    ]
    x = a.sqrt() * (pixels.double() / 127.5 - 1) + (1 - a).sqrt() * noise.double()
    torch.testing.assert_close(seen["x"].double(), x, rtol=1e-4, atol=1e-4)
    assert float(loss) == pytest.approx(float((0.5 * x - noise.double()).square().mean()), rel=1e-4)


def test_samples_are_images_of_the_seed() -> None:
    """Samples have the network's size, square or not, and are a function of the seed."""
    unet = build_unet(8, 16, (8, 8), layers=1, attention=0).eval()
    first, again, other = (sample_images(unet, 2, seed, steps=3) for seed in (0, 0, 1))
    assert first.shape == (2, 3, 8, 16)
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_level_needs_channels_in_groups() -> None:
    """Channels without a common group size are refused before any training."""
    with pytest.raises(ConfigError, match="expected multiples of 4"):
        build_unet(16, 16, (8, 9), layers=1, attention=0)


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """Min-SNR weights of a predicted noise are min(SNR, gamma) / SNR with SNR = a / (1 - a).

    Source: Hang et al. 2023.
    """
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    noise = torch.randn(3, 3, 8, 8)
    t = torch.tensor([5, 300, 900])

    class Predictor(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> object:
            return type("Output", (), {"sample": x * 0.5})

    loss = ddpm_loss(Predictor(), ddpm_scheduler(), pixels, noise, t, snr_gamma=5.0)
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.cumprod(1 - betas)[t.numpy()][:, None, None, None]
    x = np.sqrt(a) * (pixels.numpy() / 127.5 - 1) + np.sqrt(1 - a) * noise.numpy()
    errors = np.square(0.5 * x - noise.numpy()).mean((1, 2, 3))
    snr = (a / (1 - a)).ravel()
    weights = np.minimum(snr, 5) / snr
    assert weights[0] < 0.01 and weights[2] == 1
    assert float(loss) == pytest.approx(np.mean(weights * errors), rel=1e-4)
    unweighted = ddpm_loss(Predictor(), ddpm_scheduler(), pixels, noise, t, snr_gamma=1e9)
    simple = ddpm_loss(Predictor(), ddpm_scheduler(), pixels, noise, t)
    assert float(unweighted) == pytest.approx(float(simple), rel=1e-5)


def test_only_early_timesteps_are_trained_on(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--max-timestep bounds every drawn timestep, and --snr-gamma changes the loss."""
    from pipelines import teach as stage

    seen: list[int] = []
    real = stage.ddpm_loss

    def spy(*arguments: object, snr_gamma: float | None) -> torch.Tensor:
        assert snr_gamma == 5.0
        seen.extend(arguments[4].tolist())
        return real(*arguments, snr_gamma=snr_gamma)

    monkeypatch.setattr(stage, "ddpm_loss", spy)
    flags = ("--max-timestep", "3", "--snr-gamma", "5", "--samples", "0")
    result = teach(scene_folder, tmp_path / "t", *flags)
    assert result.exit_code == 0, result.output
    assert set(seen) == {0, 1, 2} and len(seen) == 6 * 4


def test_teachers_of_single_steps_are_kept(
    taught: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--keep-steps saves loadable teachers of the given steps, and a resume saves the same ones."""
    from pipelines.teach import TeacherTrainer

    flags = ("--keep-steps", "0,3,6", "--samples", "0")
    result = teach(scene_folder, tmp_path / "a", *flags)
    assert result.exit_code == 0, result.output
    kept = tmp_path / "a" / "kept"
    assert sorted(path.name for path in kept.iterdir()) == ["0", "3", "6"]
    theirs = weights(taught)
    last = weights(kept / "6")
    assert all(torch.equal(value, last[name]) for name, value in theirs.items())
    torch.manual_seed(0)
    initial = build_unet(16, 16, (8, 16), layers=1, attention=1).state_dict()
    first = load_teacher(str(kept / "0")).denoiser.unet.state_dict()
    assert all(torch.equal(value, first[name]) for name, value in initial.items())
    assert not torch.equal(first["conv_in.weight"], weights(kept / "3")["conv_in.weight"])
    interrupt(monkeypatch, TeacherTrainer, "step", call=4)
    assert teach(scene_folder, tmp_path / "b", *flags).exit_code == 130
    assert teach(scene_folder, tmp_path / "b", *flags).exit_code == 0
    for step in ("0", "3", "6"):
        again = weights(tmp_path / "b" / "kept" / step)
        assert all(torch.equal(value, again[n]) for n, value in weights(kept / step).items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a list, got dict"),
        ('[0.5, "much"]', "a loss is 'much', not a number from 0"),
        ("[" * 150, "not the losses of a run"),
        ("[0.5" + " " * 300 + "]", "expected at most 224 bytes, got 305"),
    ],
)
def test_losses_of_another_size_or_type_are_one_line(
    content: str, message: str, taught: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """A finished run whose losses.json is no list of its losses is refused in one line."""
    out = Path(shutil.copytree(taught, tmp_path / "teacher"))
    (out / "losses.json").write_text(content)
    result = teach(scene_folder, out)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"Error: {out}/losses.json: not the losses of a run")
    assert message in last
