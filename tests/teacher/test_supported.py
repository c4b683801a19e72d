"""A network's configuration is refused if it needs an input or has blocks that dtcache lacks."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel, UNet2DModel

from dtcache.errors import TeacherError
from dtcache.recipe import Json
from dtcache.teacher.supported import input_warnings, require_supported

PATH = Path("unet/config.json")


def plain(name: str) -> Json:
    """Return diffusers' default configuration of a class, as the signature gives it."""
    cls: Any = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}[name]
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_a_default_network_is_supported(name: str) -> None:
    """A network of diffusers' defaults has no condition, block or warning."""
    require_supported(PATH, name, plain(name), has_latents=True)
    assert input_warnings(PATH, plain(name)) == []


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("UNet2DModel", {"class_embed_type": "identity"}, "expected no class_embed_type, got 'id"),
        ("UNet2DModel", {"num_class_embeds": 0}, "num_class_embeds of at least 1, or none, got 0"),
        ("UNet2DModel", {"num_class_embeds": "9"}, "num_class_embeds of at least 1, .*got '9'"),
        (
            "UNet2DConditionModel",
            {"time_cond_proj_dim": 256},
            r"got 256, .* not support \(the guidance scale of a latent consistency model\); use",
        ),
        (
            "UNet2DConditionModel",
            {"addition_embed_type": "text_time"},
            r"expected Stable Diffusion 1\.x or 2\.x, got Stable Diffusion XL",
        ),
        ("UNet2DConditionModel", {"addition_embed_type": "image"}, "no addition_embed_type, got"),
        ("UNet2DConditionModel", {"class_embed_type": "projection"}, "no class_embed_type, got"),
        ("UNet2DConditionModel", {"num_class_embeds": 1000}, "expected no num_class_embeds, got"),
        ("UNet2DConditionModel", {"encoder_hid_dim": 16}, "expected no encoder_hid_dim, got 16"),
        (
            "UNet2DConditionModel",
            {"encoder_hid_dim_type": "image_proj"},
            r"expected no encoder_hid_dim_type, got 'image_proj', .*\(another text or image encod",
        ),
        ("UNet2DConditionModel", {"dual_cross_attention": True}, r"got True, .*\(a second prompt"),
        ("UNet2DModel", {"up_block_types": ["SkipUpBlock2D"]}, "can tap, got 'SkipUpBlock2D'; use"),
        ("UNet2DModel", {"down_block_types": ["KDownBlock2D"]}, "can tap, got 'KDownBlock2D'; use"),
        ("UNet2DModel", {"up_block_types": ["UpDecoderBlock2D"]}, "got 'UpDecoderBlock2D'; use"),
        ("UNet2DModel", {"down_block_types": [7]}, "expected blocks that dtcache can tap, got 7"),
        ("UNet2DConditionModel", {"mid_block_type": "Mine"}, "dtcache can tap, got 'Mine'; use a"),
        ("DiTTransformer2DModel", {"num_embeds_ada_norm": -1}, "num_embeds_ada_norm of at least 1"),
    ],
)
def test_what_dtcache_cannot_give_or_tap_is_refused_by_name(
    name: str, changes: Json, message: str
) -> None:
    """The message names the setting, its value and the condition or block."""
    config = plain(name) if name.startswith("UNet") else {}
    with pytest.raises(TeacherError, match=message):
        require_supported(PATH, name, {**config, **changes}, has_latents=True)


def test_a_text_conditioned_network_of_pixels_is_named() -> None:
    """A U-Net that reads text but has no autoencoder is not called one of the wrong channels."""
    config = {**plain("UNet2DConditionModel"), "in_channels": 3}
    with pytest.raises(TeacherError, match=r"got a text-conditioned U-Net of pixels, which dtcach"):
        require_supported(PATH, "UNet2DConditionModel", config, has_latents=False)


def test_block_names_of_early_diffusers_are_known() -> None:
    """diffusers drops the prefix UNetRes of its first versions, and so does dtcache."""
    config = {**plain("UNet2DModel"), "down_block_types": ["UNetResDownBlock2D", "UNetResNewBlock"]}
    with pytest.raises(TeacherError, match="got 'UNetResNewBlock'"):
        require_supported(PATH, "UNet2DModel", config, has_latents=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "gated"}, "attention_type is 'gated', but dtcache gives no boxes"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier', as in variance-ex"),
    ],
)
def test_inputs_that_a_network_can_do_without_give_a_warning(changes: Json, message: str) -> None:
    """The warning names the file and the setting."""
    (warning,) = input_warnings(PATH, changes)
    assert warning.startswith(f"{PATH}: {message}")
