"""`dtcache teacher show`: taps, FLOPs and sizes against independent counts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.cli import run
from torch import Tensor, nn

from dtcache.teacher import load_teacher
from dtcache.teacher.flops import count_flops


def test_json_describes_taps_and_noise(teacher_dir: Path) -> None:
    """The JSON has extract's taps, sizes that follow from the values, and the schedule's SNRs."""
    report = json.loads(run("teacher", "show", teacher_dir, "--json").stdout)
    loaded = load_teacher(str(teacher_dir))
    assert report["parameters"] == sum(p.numel() for p in loaded.denoiser.unet.parameters())
    assert (report["architecture"], report["native_size"], report["steps"]) == (
        "UNet2DModel",
        [32, 32],
        1000,
    )
    assert (report["schedule"], report["prediction"]) == ("linear", "epsilon")
    assert [t["name"] for t in report["taps"]] == ["stride1", "stride2", "stride4", "stride8"]
    names = ["mid", "up0layer0", "up1layer0", "up2layer0", "up3layer0"]
    assert [t["name"] for t in report["blocks"]] == names
    for tap, spec in zip(report["taps"], loaded.denoiser.find_taps(32, 32), strict=True):
        assert tap["values"] == spec.channels * spec.height * spec.width
        assert tap["fp16_bytes_per_image"] == 2 * 2 * tap["values"]
        assert tap["bytes_per_image"] == {
            f"{n}x": tap["fp16_bytes_per_image"] / n for n in (10, 50, 100)
        }
        assert tap["default"]
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for noise in report["timesteps"]:
        a = float(alpha_bars[noise["timestep"]])
        assert (noise["alpha_bar"], noise["snr"]) == pytest.approx((a, a / (1 - a)), rel=1e-4)
    assert [noise["timestep"] for noise in report["timesteps"]] == [50, 150, 250]


def test_parts_that_are_not_used_are_shown(teacher_dir: Path, tmp_path: Path) -> None:
    """LoRA weights beside the network are named in the table and in the JSON."""
    root = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    (root / "pytorch_lora_weights.safetensors").touch()
    (warning,) = json.loads(run("teacher", "show", root, "--json").stdout)["warnings"]
    assert "pytorch_lora_weights.safetensors is not applied" in warning
    shown = " ".join(run("teacher", "show", root).stdout.split())
    assert "warning: " in shown
    assert "is not applied" in shown


def test_flops_are_those_of_the_layers_that_run(teacher_dir: Path) -> None:
    """FLOPs per tap equal a hand count over the layers that run before the tap.

    The count has convolutions and linear layers; the attention products are a small remainder.
    """
    report = json.loads(run("teacher", "show", teacher_dir, "--json").stdout)
    unet = load_teacher(str(teacher_dir)).denoiser.unet
    spent = [0]
    at = {}

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inner = module.weight[0].numel()
        spent[0] += 2 * output.numel() * inner

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    for index, block in enumerate(unet.up_blocks):
        last = (
            block.attentions[-1]
            if hasattr(block, "attentions") and block.attentions
            else block.resnets[-1]
        )
        last.register_forward_hook(lambda m, a, o, index=index: at.update({index: spent[0]}))
    with torch.inference_mode():
        unet(torch.zeros(1, 3, 32, 32), 0)
    assert report["flops"] == pytest.approx(spent[0], rel=0.02)
    for tap, index in zip(report["taps"], (3, 2, 1, 0), strict=True):
        assert tap["flops"] == pytest.approx(at[index], rel=0.02)
    shares = [tap["flops_share"] for tap in report["taps"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.6 < shares[0] < 1


def test_attention_is_counted() -> None:
    """The two products of L x L attention over D channels are 4 L^2 D operations."""

    class Attention(nn.Module):
        def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            tokens = x_BCHW.flatten(2).transpose(1, 2)[:, None]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert count_flops(Attention(), (16, 4, 8)) == 4 * 32**2 * 16


def test_the_table_is_narrow_and_gives_a_command(teacher_dir: Path) -> None:
    """The table has every tap in at most 80 columns and an extract command for the same size."""
    result = run("teacher", "show", teacher_dir, "--size", "16x32")
    assert result.exit_code == 0, result.output
    assert "stride8*" in result.output
    assert "mid, up0layer0, up1layer0" in result.output
    assert "--size 16x32 --timestep 50 --out CACHE" in " ".join(result.output.split())
    assert (
        max(len(line) for line in result.output.splitlines() if str(teacher_dir)[:20] not in line)
        <= 80
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./nowhere",), "teacher ./nowhere: no such directory"),
        (("TEACHER", "--size", "36"), "--size 36x36: this U-Net halves the image 3 times"),
        (("TEACHER", "--size", "big"), "--size big: expected H or HxW in pixels"),
    ],
)
def test_bad_teachers_and_sizes_are_one_line(
    teacher_dir: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Teachers and sizes that extract refuses are refused in one line."""
    result = run("teacher", "show", *(teacher_dir if a == "TEACHER" else a for a in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
