"""Converted ADM weights give the outputs and taps of an independent guided-diffusion U-Net."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from teacher.guided_diffusion import GuidedUNet, published, random_unet, sinusoids, small

from dtcache.errors import TeacherError
from dtcache.teacher.adm.architecture import PRESETS, AdmSettings, infer_architecture, unet_config
from dtcache.teacher.adm.weights import blank_unet, convert_weights, split_qkv
from dtcache.teacher.attention_heads import set_heads, stand_in
from dtcache.teacher.unet import UNetDenoiser

SIDES = {"adm-64": 16, "adm-128": 16, "adm-256": 32, "adm-512": 64}
T = torch.tensor([3, 951])


def small_settings(name: str) -> AdmSettings:
    """Return a preset's settings for its small shape."""
    settings = replace(PRESETS[name][2], size=SIDES[name])
    return settings if settings.heads else replace(settings, head_channels=16)


def converted(reference: GuidedUNet, settings: AdmSettings) -> UNet2DModel:
    """Return the UNet2DModel that a reference's state dict converts to, with allocated memory."""
    weights = reference.state_dict()
    found = infer_architecture(weights)
    config = unet_config(found, settings)
    shapes = {key: value.shape for key, value in blank_unet(config).state_dict().items()}
    unet = UNet2DModel(**{**config, **stand_in(config)})
    unet.load_state_dict(convert_weights(weights, found, settings, shapes), strict=True)
    set_heads(unet, config)
    return unet.eval()


def double(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network in fp64, without the warnings of diffusers' `to`."""
    return torch.nn.Module.to(network, torch.float64)


def images(side: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5)).to(dtype)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("name", ["adm-64", "adm-128", "adm-256"])
def test_outputs_are_the_references(name: str, classes: int | None) -> None:
    """In fp64 every published shape, with and without classes, agrees within rounding."""
    reference = random_unet(**small(name, classes=classes))
    unet = converted(reference, small_settings(name))
    label = None if classes is None else torch.tensor([0, 5])
    x = images(SIDES[name])
    with torch.inference_mode():
        expected, _ = double(reference)(x, T, label)
        got = double(unet)(x, T, class_labels=label).sample
    assert expected.shape[1] == 6
    assert error(got[:, :3], expected[:, :3]) < 1e-12
    assert error(got[:, 3:], expected[:, 3:]) < 1e-12


@pytest.mark.parametrize("name", ["adm-64", "adm-128", "adm-256"])
def test_taps_are_the_features_before_the_upsamplers(name: str) -> None:
    """At every decoder level the tapped network gives the reference's feature in fp64."""
    reference = random_unet(**small(name))
    unet = converted(reference, small_settings(name))
    levels = len(unet.config.block_out_channels)
    x = images(SIDES[name])
    with torch.inference_mode():
        _, expected = double(reference)(x, T)
        taps = UNetDenoiser(unet).find_taps(SIDES[name], SIDES[name])
        found = double(UNetDenoiser(unet).tapped(taps))(x, T)
    assert len(expected) == len(found) == levels
    for level in range(levels):
        stride = 1 << (levels - 1 - level)
        assert found[f"stride{stride}"].shape[2] == SIDES[name] // stride
        assert error(found[f"stride{stride}"], expected[level]) < 1e-12


def test_a_half_width_first_level_is_exact_too() -> None:
    """At 512 px, with a timestep table for the sinusoids, outputs and taps agree within fp32."""
    reference = random_unet(**small("adm-512", blocks=1, classes=7))
    unet = converted(reference, small_settings("adm-512"))
    x = images(64)
    label = torch.tensor([0, 5])
    seen = []
    for block in unet.up_blocks:
        last = block.upsamplers[0] if block.upsamplers else unet.conv_norm_out
        last.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.inference_mode():
        expected, taps = double(reference)(x, T, label)
        got = double(unet)(x, T, class_labels=label).sample
    assert error(got, expected) < 2e-6
    assert len(seen) == len(taps) == 7
    assert all(error(a, b) < 2e-6 for a, b in zip(seen, taps, strict=True))


def test_the_timestep_table_holds_at_every_step() -> None:
    """The embedding of each of the 1000 steps equals the reference's within fp32 rounding."""
    reference = random_unet(**small("adm-512", classes=7))
    unet = double(converted(reference, small_settings("adm-512")))
    steps = torch.arange(1000)
    with torch.inference_mode():
        expected = double(reference).time_embed(sinusoids(steps, 256).double())
        assert unet.time_proj.weight.shape == (1000, 128)
        assert error(unet.time_embedding(unet.time_proj(steps)), expected) < 1e-6


def test_a_table_that_would_lose_is_refused() -> None:
    """A timestep table too narrow for its sinusoids is refused, not approximated."""
    reference = random_unet(width=64, mult=(0.5, 1), blocks=1, attention=(2,), heads=4)
    message = (
        r"fit into the 32 channels of the first level, got an embedding of 64 channels: "
        r".* would lose"
    )
    with pytest.raises(TeacherError, match=message):
        converted(reference, AdmSettings(size=16, heads=4))


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resblock_updown", [True, False])
def test_guided_diffusions_other_flags(scale_shift: bool, resblock_updown: bool) -> None:
    """Convolution joints, shift-only time embeddings and fixed variances convert exactly."""
    reference = random_unet(
        width=32,
        mult=(1, 2, 2),
        blocks=1,
        attention=(1, 4),
        heads=4,
        scale_shift=scale_shift,
        resblock_updown=resblock_updown,
        out_channels=3,
    )
    unet = converted(reference, AdmSettings(size=16, heads=4))
    with torch.inference_mode():
        expected, _ = double(reference)(images(16), T)
        got = double(unet)(images(16), T).sample
    assert expected.shape[1] == 3
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("new_order", [True, False])
def test_the_other_attention_order_loads_and_is_wrong(new_order: bool) -> None:
    """The wrong order of qkv rows fits every shape but gives different features."""
    reference = random_unet(**small("adm-256", new_order=new_order))
    right, wrong = ("new", "legacy") if new_order else ("legacy", "new")
    settings = small_settings("adm-256")
    networks = {
        order: converted(reference, replace(settings, order=order)) for order in (right, wrong)
    }
    with torch.inference_mode():
        expected, _ = double(reference)(images(32), T)
        errors = {
            order: error(double(u)(images(32), T).sample, expected) for order, u in networks.items()
        }
    assert errors[right] < 1e-12
    assert errors[wrong] > 1e-2


def test_other_heads_load_and_are_wrong() -> None:
    """A wrong number of heads fits every shape but gives different features."""
    reference = random_unet(**small("adm-256"))
    unet = converted(reference, AdmSettings(size=32, head_channels=32))
    with torch.inference_mode():
        expected, _ = double(reference)(images(32), T)
        assert error(double(unet)(images(32), T).sample, expected) > 1e-2


def test_qkv_rows_by_hand() -> None:
    """Legacy rows are q0 k0 v0 q1 k1 v1 and new rows q0 q1 k0 k1 v0 v1, two rows each."""
    rows = torch.arange(12.0)
    legacy = [part.tolist() for part in split_qkv(rows, 2, "legacy")]
    new = [part.tolist() for part in split_qkv(rows, 2, "new")]
    assert legacy == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert new == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("adm-64", 1000, 296),
        ("adm-128", 1000, 422),
        ("adm-256", 1000, 554),
        ("adm-512", 1000, 559),
        ("adm-256", None, 553),
    ],
)
def test_the_published_models_convert_at_full_size(
    name: str, classes: int | None, millions: int
) -> None:
    """Every tensor of the published shapes converts, with the parameter count of the paper.

    The shapes have no memory behind them. The paper's counts of 296, 422, 554 and 559 million
    parameters show that the reference has the published shapes.
    """
    width = 192 if name == "adm-64" else 256
    with torch.device("meta"):
        weights = GuidedUNet(**published(name, width, classes=classes)).state_dict()
    assert round(sum(w.numel() for w in weights.values()) / 1e6) == millions
    found = infer_architecture(weights)
    unet = blank_unet(unet_config(found, PRESETS[name][2]))
    shapes = {key: value.shape for key, value in unet.state_dict().items()}
    tensors = convert_weights(weights, found, PRESETS[name][2], shapes)
    assert {key: value.shape for key, value in tensors.items()} == shapes


def spoil(weights: dict[str, torch.Tensor], key: str, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        del weights[key]
    else:
        weights[key] = tensor


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (
            "input_blocks.3.0.in_layers.0.bias",
            None,
            r"input_blocks\.3\.0\.in_layers\.0\.bias is missing",
        ),
        ("middle_block.1.proj_out.weight", None, r"middle_block\.1\.proj_out\.weight is missing"),
        (
            "output_blocks.2.0.emb_layers.1.bias",
            torch.zeros(5),
            r"output_blocks\.2\.0\.emb_layers\.1\.bias: expected shape \[64\], which fits the "
            r"other tensors, got \[5\]",
        ),
        (
            "middle_block.1.qkv.weight",
            torch.zeros(64, 64, 1),
            r"qkv\.weight: expected shape \[192, .*got \[64, 64, 1\]",
        ),
        (
            "middle_block.1.qkv.weight",
            torch.zeros(192, 64, 3),
            r"qkv\.weight: expected shape \[192, .*got \[192, 64, 3\]",
        ),
        (
            "middle_block.0.in_layers.0.bias",
            torch.zeros(64, 1),
            r"0\.bias: expected shape \[64\], .*got \[64, 1\]",
        ),
        (
            "time_embed.0.weight",
            torch.zeros(128, 31),
            "fit into the 32 channels of the first level, got an embedding of 31 channels: .* "
            "would lose",
        ),
        (
            "out.7.weight",
            torch.zeros(3),
            r"out\.7\.weight is not part of one \(1 superfluous tensors\)",
        ),
        (
            "input_blocks.1.1.norm.weight",
            torch.zeros(3),
            r"input_blocks\.1\.1\.norm\.weight is not part of one",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    key: str, tensor: torch.Tensor | None, message: str
) -> None:
    """Missing tensors, superfluous tensors and other shapes are refused by name."""
    reference = random_unet(width=32, mult=(1, 2), blocks=1, attention=(2,), heads=4)
    weights = reference.state_dict()
    spoil(weights, key, tensor)
    settings = AdmSettings(size=16, heads=4)
    found = infer_architecture(weights)
    shapes = {
        name: value.shape
        for name, value in blank_unet(unet_config(found, settings)).state_dict().items()
    }
    with pytest.raises(TeacherError, match=message):
        convert_weights(weights, found, settings, shapes)
