"""The architecture follows from a guided-diffusion checkpoint's shapes; others are refused."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler
from teacher.guided_diffusion import GuidedUNet, published, random_unet, small

from dtcache.errors import ConfigError, TeacherError
from dtcache.options import ADM_PRESETS
from dtcache.teacher.adm.architecture import (
    PRESETS,
    AdmArchitecture,
    AdmSettings,
    head_widths,
    infer_architecture,
    match_preset,
    scheduler_config,
    unet_config,
)

TINY = {"width": 32, "mult": (1, 2), "blocks": 1, "attention": (2,), "heads": 4}


def test_the_shapes_tell_the_architecture() -> None:
    """All fields of the architecture are inferred from the shapes of the checkpoint's tensors."""
    weights = random_unet(
        width=32,
        mult=(2, 1, 3),
        blocks=3,
        attention=(1, 4),
        heads=4,
        classes=9,
        out_channels=3,
        scale_shift=False,
        resblock_updown=False,
    ).state_dict()
    assert infer_architecture(weights) == AdmArchitecture(
        channels=(64, 32, 96),
        blocks=3,
        attention=(True, False, True),
        time_channels=32,
        classes=9,
        out_channels=3,
        scale_shift=False,
        resample="conv",
    )


@pytest.mark.parametrize("name", ADM_PRESETS)
def test_published_models_are_recognised(name: str) -> None:
    """The published shapes are recognised, with attention exactly at the published resolutions.

    The flags name resolutions of 32, 16 and 8 pixels for any image size.
    """
    with torch.device("meta"):
        found = infer_architecture(
            GuidedUNet(**published(name, 192 if name == "adm-64" else 256)).state_dict()
        )
        other = infer_architecture(GuidedUNet(**small(name)).state_dict())
    assert match_preset(found) == name
    assert match_preset(other) is None
    sides = [
        PRESETS[name][2].size >> level for level, attends in enumerate(found.attention) if attends
    ]
    assert sides == [32, 16, 8]


def test_every_preset_is_an_option() -> None:
    """The options, which load no torch, list the names of all presets."""
    assert tuple(PRESETS) == ADM_PRESETS


def test_the_published_settings() -> None:
    """Each preset has the size, schedule, attention order and heads of the published flags."""
    assert {name: settings for name, (_, _, settings) in PRESETS.items()} == {
        "adm-64": AdmSettings(size=64, schedule="cosine", order="new", head_channels=64),
        "adm-128": AdmSettings(size=128, schedule="linear", order="legacy", heads=4),
        "adm-256": AdmSettings(size=256, schedule="linear", order="legacy", head_channels=64),
        "adm-512": AdmSettings(size=512, schedule="linear", order="legacy", head_channels=64),
    }


def test_schedules_are_the_formulas() -> None:
    """Linear betas follow Ho et al. and cosine alpha-bars follow Nichol and Dhariwal.

    Linear betas go from 1e-4 to 0.02; cosine betas are at most 0.999.
    """
    found = infer_architecture(random_unet(**TINY).state_dict())
    linear, cosine = (
        DDPMScheduler(**scheduler_config(found, AdmSettings(size=16, schedule=s)))
        for s in ("linear", "cosine")
    )
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(linear.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-7)
    wave = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(wave)], dtype=torch.float64)
    torch.testing.assert_close(
        cosine.alphas_cumprod.double(), torch.cumprod(1 - betas, 0), rtol=1e-3, atol=1e-9
    )
    assert linear.config.prediction_type == "epsilon"
    assert linear.config.variance_type == "learned_range"
    assert (
        scheduler_config(replace(found, out_channels=3), AdmSettings(size=16))["variance_type"]
        == "fixed_large"
    )


def test_head_widths_are_one_number_where_they_can_be() -> None:
    """Heads of equal width on all levels are stored as one number, others as a list per level."""
    with torch.device("meta"):
        found = infer_architecture(GuidedUNet(**published("adm-128", 256)).state_dict())
    assert unet_config(found, AdmSettings(size=128, heads=4))["attention_head_dim"] == [
        256,
        256,
        128,
        192,
        256,
    ]
    assert unet_config(found, AdmSettings(size=128, head_channels=64))["attention_head_dim"] == 64
    single = infer_architecture(random_unet(**TINY).state_dict())
    assert unet_config(single, AdmSettings(size=16, heads=4))["attention_head_dim"] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdmSettings(size=16, heads=3), "`heads` 3: 64 channels cannot be split into such heads"),
        (
            AdmSettings(size=16, heads=128),
            "`heads` 128: 64 channels cannot be split into such heads",
        ),
        (
            AdmSettings(size=16, head_channels=48),
            "`head_channels` 48: 64 channels cannot be split into such heads",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(settings: AdmSettings, message: str) -> None:
    """Heads that do not divide a level's channels are refused with the field and the channels."""
    with pytest.raises(ConfigError, match=message):
        head_widths(infer_architecture(random_unet(**TINY).state_dict()), settings)


def changed(
    drop: str = "", add: dict[str, torch.Tensor] | None = None, **shape: object
) -> dict[str, torch.Tensor]:
    """Return a tiny checkpoint without the keys that start with `drop`, with the keys of `add`."""
    weights = random_unet(**{**TINY, **shape}).state_dict()
    return {k: v for k, v in weights.items() if not (drop and k.startswith(drop))} | (add or {})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"conv1.weight": torch.zeros(3)},
            r"not an ADM checkpoint: conv1\.weight is not part of OpenAI's guided-diff",
        ),
        (changed(add={"model.x": torch.zeros(1)}), r"not an ADM checkpoint: model\.x is not part"),
        (
            changed(drop="output_blocks"),
            "an encoder without output_blocks, such as OpenAI's classifiers, has no",
        ),
        (
            changed(in_channels=6),
            r"3 \(RGB\) input channels, got 6: an upsampler, which reads a small image as well",
        ),
        (
            changed(in_channels=4),
            r"3 \(RGB\) input channels, got 4: not a model of pixels; pass a different",
        ),
        (
            changed(drop="input_blocks.0.0.weight"),
            r"input_blocks\.0\.0\.weight is missing; expected 4 axes",
        ),
        (
            changed(drop="time_embed.0.weight"),
            r"not an ADM checkpoint: time_embed\.0\.weight is missing",
        ),
        (changed(drop="out."), r"not an ADM checkpoint: out\.2\.weight is missing"),
        (
            changed(drop="input_blocks.1.0.emb"),
            r"input_blocks\.1\.0\.emb_layers\.1\.weight is missing",
        ),
        (
            changed(drop="input_blocks.2"),
            "same number of residual blocks per level, .*got 3 input and 4 output blocks with 1 "
            "upsamplers",
        ),
        (
            changed(drop="output_blocks.3"),
            "same number of residual blocks per level, .*got 4 input and 3 output blocks with 1 "
            "upsamplers",
        ),
        (
            changed(add={"time_embed.0.weight": torch.zeros(())}),
            r"embed\.0\.weight has shape \[\]; expected 2 axes",
        ),
        (
            changed(add={"time_embed.0.weight": torch.zeros(3)}),
            r"embed\.0\.weight has shape \[3\]; expected 2 axes",
        ),
        (
            changed(add={"label_emb.weight": torch.zeros(())}),
            r"label_emb\.weight has shape \[\]; expected 2 axes",
        ),
        (
            changed(add={"label_emb.weight": torch.zeros(0, 128)}),
            r"\[0, 128\]; expected 2 axes, none of them empty",
        ),
        (
            changed(add={"input_blocks.1.0.out_layers.3.weight": torch.zeros(40, 40, 3, 3)}),
            r"expected levels with multiples of 32 channels, got \[40, 64\]",
        ),
    ],
)
def test_other_checkpoints_are_refused(weights: dict[str, torch.Tensor], message: str) -> None:
    """Another network, a classifier, an upsampler and half a U-Net are refused by a tensor."""
    with pytest.raises(TeacherError, match=message):
        infer_architecture(weights)


def test_a_number_in_a_key_allocates_nothing() -> None:
    """A key with block number 10^12 counts as one superfluous block and allocates nothing."""
    with pytest.raises(TeacherError, match="5 input and 4 output blocks"):
        infer_architecture(changed(add={"input_blocks.1000000000000.0.x": torch.zeros(1)}))
