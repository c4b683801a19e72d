"""Latent teachers noise the latents of an image, and their taps equal those of diffusers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from teacher.batches import batch_of
from teacher.kinds import TEXT_CHANNELS, TOKENS, edit, hooked_unet, save_ldm, save_stable_diffusion

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import ViewSpec
from dtcache.rng import sample_noise
from dtcache.teacher import (
    LoadedTeacher,
    Prompt,
    Teacher,
    TeacherSettings,
    load_teacher,
    prepare_teacher,
)
from dtcache.teacher.diffusers_files import WEIGHTS
from dtcache.teacher.unet import UNetDenoiser

CPU = resolve_compute("cpu", "fp32")
STORED = Prompt(
    text="",
    embedding_LD=np.random.default_rng(0).normal(size=(TOKENS, TEXT_CHANNELS)).astype(np.float32),
)
PIXELS = np.random.default_rng(1).integers(0, 256, (2, 3, 32, 32), np.uint8)


def prepared(loaded: LoadedTeacher, *timesteps: int, batch_size: int = 2) -> Teacher:
    """Return a teacher of 32 px views with its default taps."""
    view = ViewSpec(height=32, width=32)
    return prepare_teacher(
        loaded, TeacherSettings(view=view, timesteps=timesteps, batch_size=batch_size), CPU
    )


def features(teacher: Teacher) -> dict[str, torch.Tensor]:
    """Return the features of the two images, the second one mirrored."""
    (found,) = teacher.features(
        batch_of(teacher, list(PIXELS), ["a", "b"], [False, True], seed=3, draws=[0])
    )
    return found


def noisy(latents_BCHW: torch.Tensor, betas: torch.Tensor, t: int) -> torch.Tensor:
    """Noise the two images' latents by the paper's formula."""
    alpha_bar = torch.cumprod(1 - betas.double(), 0)[t]
    shape = tuple(latents_BCHW.shape[1:])
    noise = [
        sample_noise(shape, seed=3, key=k, timestep=t, draw=0, flip=f)
        for k, f in (("a", False), ("b", True))
    ]
    return (
        alpha_bar.sqrt() * latents_BCHW + (1 - alpha_bar).sqrt() * torch.from_numpy(np.stack(noise))
    ).float()


def pixels() -> torch.Tensor:
    """Return the two images in [-1, 1], the second one mirrored."""
    x_BCHW = torch.from_numpy(PIXELS.copy()).float() / 127.5 - 1
    return torch.stack([x_BCHW[0], x_BCHW[1].flip(-1)])


def test_stable_diffusion_taps_are_those_of_diffusers(tmp_path: Path) -> None:
    """Stable Diffusion's taps, loaded from disk, equal hooks on the full model in memory."""
    unet, vae = save_stable_diffusion(tmp_path)
    teacher = prepared(load_teacher(str(tmp_path), stored=STORED), 150)
    assert [(t.name, t.stride, t.channels, t.height) for t in teacher.spec.taps] == [
        ("stride4", 4, 16, 8),
        ("stride8", 8, 16, 4),
        ("stride16", 16, 32, 2),
    ]
    with torch.inference_mode():
        latents_BCHW = vae.encode(pixels()).latent_dist.mode() * 0.18215
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    told = torch.from_numpy(STORED.embedding_LD).expand(2, -1, -1)
    wanted = hooked_unet(
        unet,
        (16, 8, 4),
        noisy(latents_BCHW, betas, 150),
        torch.tensor([150, 150]),
        encoder_hidden_states=told,
    )
    found = features(teacher)
    assert {name: tuple(maps.shape[1:]) for name, maps in found.items()} == {
        f"t150/{t.name}": (t.channels, t.height, t.width) for t in teacher.spec.taps
    }
    assert set(found) == {f"t150/{name}" for name in wanted}
    for name, maps in wanted.items():
        torch.testing.assert_close(found[f"t150/{name}"], maps, rtol=1e-4, atol=1e-4)
    condition = teacher.spec.condition
    assert condition is not None
    assert (condition.kind, condition.prompt, condition.embedding_sha256) == (
        "prompt",
        "",
        STORED.sha256,
    )


def test_taps_are_found_without_arithmetic() -> None:
    """Stable Diffusion 1.x at full size, without weights, has its known strides and channels."""
    with torch.device("meta"):
        denoiser = UNetDenoiser(
            UNet2DConditionModel(sample_size=64, cross_attention_dim=768), torch.zeros(77, 768)
        )
    found = [(t.name, t.channels, t.height, t.width) for t in denoiser.find_taps(512, 768, 8)]
    assert found == [
        ("stride8", 320, 64, 96),
        ("stride16", 640, 32, 48),
        ("stride32", 1280, 16, 24),
        ("stride64", 1280, 8, 12),
    ]


def test_unconditional_latent_taps_are_those_of_diffusers(tmp_path: Path) -> None:
    """An LDM noises the VQ encoder's output before the codebook, times the configured scale."""
    unet, vae = save_ldm(tmp_path)
    edit(tmp_path / "vqvae" / "config.json", lambda c: c.update(scaling_factor=0.5))
    teacher = prepared(load_teacher(str(tmp_path)), 50)
    with torch.inference_mode():
        latents_BCHW = vae.encode(pixels()).latents * 0.5
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    wanted = hooked_unet(unet, (8, 4, 2), noisy(latents_BCHW, betas, 50), torch.tensor([50, 50]))
    assert teacher.spec.condition is None
    for name, maps in features(teacher).items():
        torch.testing.assert_close(maps, wanted[name.removeprefix("t50/")], rtol=1e-4, atol=1e-4)


def test_a_vq_model_that_states_no_scale_has_none(tmp_path: Path) -> None:
    """Without a configured scale, a VQ model has 1 and an AutoencoderKL has 0.18215.

    The hash of the configuration distinguishes scales.
    """
    save_ldm(tmp_path / "ldm")
    config = tmp_path / "ldm" / "vqvae" / "config.json"
    hashes = set()
    for scale, wanted in ((0.18215, 0.18215), (1.0, 1.0), (None, 1.0)):
        edit(
            config, lambda c, s=scale: c.update(scaling_factor=s) if s else c.pop("scaling_factor")
        )
        loaded = load_teacher(str(tmp_path / "ldm"))
        assert loaded.latents is not None
        assert loaded.latents.scale == wanted
        hashes.add(loaded.config_sha256)
    assert len(hashes) == 3
    save_stable_diffusion(tmp_path / "sd")
    edit(
        tmp_path / "sd" / "vae" / "config.json",
        lambda c: (c.pop("scaling_factor"), c.update(shift_factor=0.25)),
    )
    latents = load_teacher(str(tmp_path / "sd"), stored=STORED).latents
    assert latents is not None
    assert (latents.scale, latents.shift) == (0.18215, 0.25)


def test_the_shift_comes_before_the_scale(tmp_path: Path) -> None:
    """As in diffusers' pipelines, latents become (latents - shift_factor) * scaling_factor."""
    _, vae = save_stable_diffusion(tmp_path)
    edit(
        tmp_path / "vae" / "config.json", lambda c: c.update(shift_factor=0.25, scaling_factor=2.0)
    )
    latents = load_teacher(str(tmp_path), stored=STORED).latents
    assert latents is not None
    with torch.inference_mode():
        wanted = (vae.encode(pixels()).latent_dist.mean - 0.25) * 2.0
        torch.testing.assert_close(latents(pixels()), wanted)


def test_latents_are_made_once_for_all_timesteps_and_draws(tmp_path: Path) -> None:
    """Two draws at two timesteps run the autoencoder once; noise has the latent's shape."""
    save_stable_diffusion(tmp_path)
    teacher = prepared(load_teacher(str(tmp_path), stored=STORED), 50, 250)
    calls = []
    assert teacher._latents is not None
    teacher._latents.autoencoder.encoder.register_forward_pre_hook(
        lambda m, args: calls.append(args[0].shape)
    )
    batch = batch_of(teacher, list(PIXELS), ["a", "b"], [False, False], seed=0, draws=[0, 1])
    assert {noise.shape for draw in batch.noise for noise in draw.values()} == {(2, 4, 8, 8)}
    draws = list(teacher.features(batch))
    assert [set(d) for d in draws] == [
        {f"t{t}/stride{s}" for t in (50, 250) for s in (4, 8, 16)}
    ] * 2
    assert calls == [(2, 3, 32, 32)]


def test_a_short_batch_is_padded_for_the_autoencoder_too(tmp_path: Path) -> None:
    """The autoencoder's batch is padded, so features do not depend on the rest of the batch."""
    save_ldm(tmp_path)
    teacher = prepared(load_teacher(str(tmp_path)), 150, batch_size=4)
    shapes = []
    assert teacher._latents is not None
    teacher._latents.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    together = features(teacher)
    (alone,) = teacher.features(batch_of(teacher, [PIXELS[0]], ["a"], [False], seed=3, draws=[0]))
    assert shapes == [(4, 3, 32, 32)] * 2
    for name, maps in alone.items():
        assert maps.shape[0] == 1
        torch.testing.assert_close(maps, together[name][:1], rtol=1e-5, atol=1e-5)


def test_a_size_that_latents_cannot_halve_is_refused(tmp_path: Path) -> None:
    """A size that cannot be halved is refused with the multiple in pixels of the view."""
    save_stable_diffusion(tmp_path)
    loaded = load_teacher(str(tmp_path), stored=STORED)
    with pytest.raises(
        ConfigError,
        match=r"`size` 40x32: this U-Net halves the latent \(4 pixels per row\) 2 times.*of 16",
    ):
        loaded.denoiser.find_taps(40, 32, 4)
    assert [t.width for t in loaded.denoiser.find_taps(16, 48, 4)] == [12, 6, 3]


def test_the_weights_hash_covers_every_part(tmp_path: Path) -> None:
    """One changed number in the autoencoder changes the teacher's hash."""
    save_ldm(tmp_path)
    before = load_teacher(str(tmp_path))
    path = tmp_path / "vqvae" / WEIGHTS
    tensors = load_file(path)
    tensors["quant_conv.bias"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    after = load_teacher(str(tmp_path))
    assert before.weights_sha256 != after.weights_sha256
    assert before.config_sha256 == after.config_sha256


def test_sharded_weights_are_the_same_network(tmp_path: Path) -> None:
    """Weights in several files give the same features, and each file counts in the hash."""
    unet, _ = save_ldm(tmp_path / "one")
    whole = load_teacher(str(tmp_path / "one"))
    save_ldm(tmp_path / "many")
    (tmp_path / "many" / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(tmp_path / "many" / "unet", max_shard_size="100KB")
    shards = sorted((tmp_path / "many" / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    parts = load_teacher(str(tmp_path / "many"))
    assert parts.weights_sha256 != whole.weights_sha256
    wanted = features(prepared(whole, 150))
    for name, maps in features(prepared(parts, 150)).items():
        assert torch.equal(maps, wanted[name])
    shards[-1].unlink()
    with pytest.raises(
        TeacherError,
        match=rf"{shards[-1].name}: the weights are missing, but .*index\.json names them",
    ):
        load_teacher(str(tmp_path / "many"))
    edit(
        tmp_path / "many" / "unet" / f"{WEIGHTS}.index.json",
        lambda c: c["weight_map"].update(x="../x.safetensors"),
    )
    with pytest.raises(
        TeacherError,
        match=r"expected 1 to 1024 safetensors files beside it, got \.\./x\.safetensors",
    ):
        load_teacher(str(tmp_path / "many"))


def vae_without_weights(root: Path) -> None:
    (root / "vae" / WEIGHTS).unlink()


def vae_without_a_tensor(root: Path) -> None:
    tensors = load_file(root / "vae" / WEIGHTS)
    del tensors["quant_conv.bias"]
    save_file(tensors, root / "vae" / WEIGHTS)


def other_autoencoder(root: Path) -> None:
    AutoencoderTiny().save_config(root / "vae")


def normalised_latents(root: Path) -> None:
    edit(root / "vae" / "config.json", lambda c: c.update(latents_mean=[0.0] * 4))


def grey_autoencoder(root: Path) -> None:
    edit(root / "vae" / "config.json", lambda c: c.update(in_channels=1))


def worded_scale(root: Path) -> None:
    edit(root / "vae" / "config.json", lambda c: c.update(scaling_factor="big"))


def inpainting(root: Path) -> None:
    save_stable_diffusion(root, in_channels=9)


def no_autoencoder(root: Path) -> None:
    (root / "vae").rename(root / "elsewhere")


def extra_large(root: Path) -> None:
    edit(root / "unet" / "config.json", lambda c: c.update(addition_embed_type="text_time"))


def upscaler(root: Path) -> None:
    edit(root / "unet" / "config.json", lambda c: c.update(num_class_embeds=1000))


def other_text_width(root: Path) -> None:
    save_stable_diffusion(root)
    edit(root / "unet" / "config.json", lambda c: c.update(cross_attention_dim=24))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (vae_without_weights, r"vae/diffusion_pytorch_model\.safetensors: the weights are missing"),
        (vae_without_a_tensor, r"vae/config\.json: 1 missing_keys, such as quant_conv\.bias"),
        (
            other_autoencoder,
            r"expected _class_name AutoencoderKL or VQModel, got 'AutoencoderTiny'",
        ),
        (normalised_latents, "expected latents with a scale and a shift only, got latents_mean"),
        (grey_autoencoder, "expected an autoencoder of RGB pixels, got in_channels=1; use a diff"),
        (worded_scale, "expected scaling_factor to be a number, got 'big'"),
        (
            inpainting,
            "expected in_channels=4, the channels of the autoencoder's latents, got 9; use a "
            "model that reads no masks",
        ),
        (
            no_autoencoder,
            r"expected a model of RGB pixels, or an autoencoder in .*got in_channels=4 and neither",
        ),
        (
            extra_large,
            r"expected Stable Diffusion 1\.x or 2\.x, got Stable Diffusion XL",
        ),
        (
            upscaler,
            "expected no num_class_embeds, got 1000, a condition that dtcache does not support",
        ),
        (other_text_width, r"unet: cannot be loaded as UNet2DConditionModel \(.*attn2"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bad_latent_teacher_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """A part that is missing or belongs to another class or model is refused by name."""
    save_stable_diffusion(tmp_path)
    damage(tmp_path)
    with pytest.raises(TeacherError, match=message):
        load_teacher(str(tmp_path), stored=STORED)


def test_an_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    """A text embedding of another width than the U-Net's is refused with both widths."""
    save_stable_diffusion(tmp_path)
    stored = Prompt(text="", embedding_LD=np.zeros((TOKENS, 24), np.float32))
    with pytest.raises(
        TeacherError, match=r"expected a text embedding with 16 channels, the U-Net's, got 24"
    ):
        load_teacher(str(tmp_path), stored=stored)


def test_a_prompt_for_a_teacher_that_reads_none_is_refused(tmp_path: Path) -> None:
    """An unconditional teacher takes no prompt."""
    save_ldm(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"`prompt`: this teacher \(UNet2DModel\) reads no text; leave `prompt` out",
    ):
        load_teacher(str(tmp_path), prompt="a cat")


def test_what_it_predicts_is_read(tmp_path: Path) -> None:
    """The prediction type comes from the scheduler's file."""
    save_ldm(tmp_path)
    assert load_teacher(str(tmp_path)).prediction == "epsilon"
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    assert load_teacher(str(tmp_path)).prediction == "v_prediction"


def test_bfloat16_latents_lie_close(tmp_path: Path) -> None:
    """In bfloat16 the latents' error is far below the noise at the paper's timesteps."""
    save_stable_diffusion(tmp_path)
    loaded = load_teacher(str(tmp_path), stored=STORED)
    assert loaded.latents is not None
    with torch.inference_mode():
        exact = loaded.latents(pixels())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = loaded.latents(pixels()).float()
    error = float((rough - exact).square().mean() / exact.var())
    assert 0 < error < 1e-3
