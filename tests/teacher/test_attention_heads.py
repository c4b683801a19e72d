"""Different attention heads per level are computed correctly, or refused if they do not fit."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from teacher.guided_diffusion import random_unet, small

from dtcache.errors import TeacherError
from dtcache.teacher.attention_heads import set_heads, stand_in
from pipelines.convert_adm import ConvertOptions, convert_adm


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the 128 px shape, with four heads per level, as a converted directory."""
    root = tmp_path_factory.mktemp("heads")
    torch.save(random_unet(**small("adm-128", classes=7)).state_dict(), root / "adm.pt")
    convert_adm(root / "adm.pt", root / "out", ConvertOptions(size=16))
    return root / "out" / "unet"


def test_the_directory_loads_and_computes_what_the_reference_does(four_heads: Path) -> None:
    """The loaded network with listed heads gives the reference's output and keeps the list."""
    config = UNet2DModel.load_config(str(four_heads))
    assert config["attention_head_dim"] == [32, 32, 16, 24, 32]
    unet = UNet2DModel.from_pretrained(str(four_heads), **stand_in(config))
    set_heads(unet, config)
    assert unet.config.attention_head_dim == [32, 32, 16, 24, 32]
    reference = random_unet(**small("adm-128", classes=7)).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([11, 400])
    label = torch.tensor([6, 2])
    with torch.inference_mode():
        expected, _ = reference(x, t, label)
        got = torch.nn.Module.to(unet.eval(), torch.float64)(x, t, class_labels=label).sample
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-12


def test_diffusers_alone_refuses_it_loudly(four_heads: Path) -> None:
    """diffusers alone fails to load the list, so it never uses wrong heads silently."""
    with pytest.raises(TypeError, match="list"):
        UNet2DModel.from_pretrained(str(four_heads))


@pytest.mark.parametrize(
    "widths", [[32, 32], [32, 32, 16, 24, 0], [32, 32, 16, 25, 32], [32, 32, 16, 24, "a"], []]
)
def test_a_list_that_does_not_fit_is_refused(four_heads: Path, widths: list[object]) -> None:
    """A list must hold one positive divisor of each level's channels."""
    config = {**UNet2DModel.load_config(str(four_heads)), "attention_head_dim": widths}
    with torch.device("meta"):
        unet = UNet2DModel.from_config({**config, **stand_in(config)})
    with pytest.raises(
        TeacherError,
        match=r"expected one divisor per level of its channels \[32, 32, 64, 96, 128\]",
    ):
        set_heads(unet, config)


def test_one_number_for_all_is_left_alone(teacher_dir: Path) -> None:
    """A configuration with one number for all levels is loaded unchanged."""
    config = UNet2DModel.load_config(str(teacher_dir / "unet"))
    unet = UNet2DModel.from_pretrained(str(teacher_dir / "unet"))
    before = [m.heads for m in unet.modules() if hasattr(m, "heads")]
    set_heads(unet, config)
    assert stand_in(config) == {}
    assert before == [m.heads for m in unet.modules() if hasattr(m, "heads")]
