"""timm networks as teachers: equal to timm's own pass, checked sizes, and no pickles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.timm_folders import MEAN, STD, VIT, save_network
from torch import Tensor, nn

from dtcache.device import resolve_compute
from dtcache.errors import (
    ConfigError,
    DtcacheError,
    TeacherError,
    TeacherNotFoundError,
    WeightsError,
)
from dtcache.recipe import ViewSpec
from dtcache.teacher import LoadedTeacher, TeacherSettings, load_teacher, prepare_teacher
from dtcache.teacher.denoiser import choose_taps

EVA: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}


def load(folder: Path) -> LoadedTeacher:
    """Load the network in a folder as a teacher."""
    return load_teacher(f"timm:local-dir:{folder}")


def hooked(network: nn.Module, paths: list[str], x_BCHW: Tensor) -> list[Tensor]:
    """Return the outputs of modules of timm's own forward pass."""
    outputs: list[Tensor] = []
    for path in paths:
        network.get_submodule(path).register_forward_hook(
            lambda module, args, output: outputs.append(output.clone())
        )
    with torch.inference_mode():
        network(x_BCHW)
    return outputs


def grids(tokens_BND: Tensor, prefix: int, side: int) -> Tensor:
    """Return the patch tokens of a ViT as a square map (B, D, side, side)."""
    map_BCHW: Tensor = tokens_BND[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return map_BCHW


@pytest.mark.parametrize(
    ("name", "args", "prefix"),
    [
        ("vit_tiny_patch16_224", VIT, 1),
        ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}, 0),
        ("vit_small_patch16_dinov3", EVA, 5),
    ],
)
def test_blocks_of_a_vit_equal_hooks_on_timms_own_pass(
    name: str, args: dict[str, Any], prefix: int, tmp_path: Path
) -> None:
    """Every block's tokens, folded to maps without prefix tokens, equal timm's with difference 0.

    timm's network is built for its own size alone; the teacher takes several sizes.
    """
    network = save_network(tmp_path, name, **args)
    loaded = load(tmp_path)
    taps = loaded.denoiser.find_taps(32, 32)
    side = 32 // taps[0].stride
    x_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        maps = loaded.denoiser.tapped(taps)(x_BCHW)
    assert [tap.name for tap in taps] == [f"block{i}" for i in range(args["depth"])]
    expected = hooked(network, [f"blocks.{i}" for i in range(args["depth"])], x_BCHW)
    for tap, tokens in zip(taps, expected, strict=True):
        assert torch.equal(maps[tap.name], grids(tokens, prefix, side))
        assert maps[tap.name].shape[1:] == (tap.channels, tap.height, tap.width)
    notes = [f"{prefix} prefix tokens (class token, registers) per image are in no map"]
    assert list(loaded.notes) == (notes if prefix else [])


def test_stages_of_a_cnn_equal_hooks_on_timms_own_pass(tmp_path: Path) -> None:
    """The stages of a ResNet, named by stride, equal timm's with difference 0."""
    network = save_network(tmp_path, "test_resnet", classes=7)
    loaded = load(tmp_path)
    taps = loaded.denoiser.find_taps(64, 96)
    x_BCHW = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        maps = loaded.denoiser.tapped(taps)(x_BCHW)
    expected = hooked(network, ["layer1", "layer2", "layer3", "layer4"], x_BCHW)
    assert [tap.name for tap in taps] == [f"stride{2**level}" for level in range(1, 6)]
    assert [tap.name for tap in choose_taps(taps, None)] == [t.name for t in taps[1:]]
    for tap, stage in zip(taps[1:], expected, strict=True):
        assert torch.equal(maps[tap.name], stage)


def test_a_tap_needs_no_later_block(tmp_path: Path) -> None:
    """The pass ends after the last tap: a broken later block does not change it."""
    save_network(tmp_path, **VIT)
    loaded = load(tmp_path)
    (tap,) = choose_taps(loaded.denoiser.find_taps(32, 32), ("block2",))
    loaded.denoiser.network.blocks[3] = nn.Identity()  # type: ignore[attr-defined]
    loaded.denoiser.network.blocks[3].forward = None  # type: ignore[attr-defined]
    assert loaded.denoiser.tapped([tap])(torch.zeros(1, 3, 32, 32))["block2"].shape == (1, 24, 4, 4)


def test_pixels_are_normalised_as_the_networks_configuration_says(tmp_path: Path) -> None:
    """Features of uint8 images are those of (x / 255 - mean) / std, without any noise."""
    network = save_network(tmp_path, **VIT)
    teacher = prepare_teacher(
        load(tmp_path),
        TeacherSettings(view=ViewSpec(height=32, width=32), timesteps=(0,), batch_size=2),
        resolve_compute("cpu", "fp32"),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    inputs = [
        teacher.input(image, key, False, seed=0, draws=[0])
        for image, key in zip(pixels, "ab", strict=True)
    ]
    (features,) = teacher.features(teacher.batch(inputs))
    assert not teacher.is_random
    x_BCHW = (pixels / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    expected = hooked(
        network, [f"blocks.{i}" for i in (0, 1, 3, 4)], torch.from_numpy(x_BCHW).float()
    )
    assert list(features) == ["t0/block0", "t0/block1", "t0/block3", "t0/block4"]
    for maps, tokens in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(maps, grids(tokens, 1, 4), rtol=1e-4, atol=1e-4)


def test_other_sizes_resample_the_position_embedding_as_timm_does(tmp_path: Path) -> None:
    """At another size, blocks equal those of timm's network with dynamic_img_size."""
    save_network(tmp_path, **VIT)
    import timm

    own = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dynamic_img_size=True).eval()
    denoiser = load(tmp_path).denoiser
    x_BCHW = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        maps = denoiser.tapped(denoiser.find_taps(48, 64))(x_BCHW)
    (tokens,) = hooked(own, ["blocks.4"], x_BCHW)
    assert torch.equal(maps["block4"], tokens[:, 1:].transpose(1, 2).unflatten(2, (6, 8)))


def test_default_taps_are_the_quarters_of_a_vits_depth(tmp_path: Path) -> None:
    """The default of a teacher without noise ends with its last block."""
    save_network(tmp_path, **{**VIT, "depth": 12, "embed_dim": 8})
    taps = choose_taps(load(tmp_path).denoiser.find_taps(32, 32), None, is_noised=False)
    assert [tap.name for tap in taps] == ["block2", "block5", "block8", "block11"]


def test_hashes_tell_weights_and_normalisation_apart(tmp_path: Path) -> None:
    """The recipe's hashes change with the weights and with the pixels' mean, else they stay."""
    hashes = []
    for number, change in enumerate(("", "", "weights", "mean")):
        folder = tmp_path / str(number)
        args = {**VIT, "depth": 4} if change == "weights" else VIT
        save_network(folder, **args)
        if change == "mean":
            config = folder / "config.json"
            config.write_text(config.read_text().replace("0.4,", "0.45,"))
        loaded = load(folder)
        hashes.append((loaded.weights_sha256, loaded.config_sha256))
    assert hashes[0] == hashes[1]
    assert hashes[2][0] != hashes[0][0]
    assert hashes[3][0] == hashes[0][0] and hashes[3][1] != hashes[0][1]


def test_a_name_is_downloaded_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm name loads config.json and model.safetensors of its repository, and nothing else."""
    save_network(tmp_path, "test_resnet", classes=7)
    calls = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = load_teacher("timm:test_resnet.r160_in1k")
    assert calls == [("timm/test_resnet.r160_in1k", ["config.json", "model.safetensors"])]
    assert loaded.architecture == "timm:test_resnet"
    assert loaded.weights_sha256 == load(tmp_path).weights_sha256


def pickled(folder: Path) -> None:
    """Leave the weights of a folder as a pickle alone."""
    save_network(folder, **VIT)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    """Leave half of the weights' bytes."""
    save_network(folder, **VIT)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (pickled, WeightsError, r"pytorch_model.bin: expected model.safetensors, got a pickle"),
        (truncated, WeightsError, "not the weights of vit_tiny_patch16_224"),
        (lambda folder: folder.mkdir(), ConfigError, "config.json: missing; expected a folder"),
        (lambda folder: None, TeacherNotFoundError, "no such folder"),
    ],
)
def test_a_folder_that_is_no_teacher_is_refused(
    write: Callable[[Path], Any], error: type[DtcacheError], message: str, tmp_path: Path
) -> None:
    """Pickles, damaged and missing weights and networks without maps are named in one line."""
    write(tmp_path / "teacher")
    with pytest.raises(error, match=message) as caught:
        load(tmp_path / "teacher")
    assert "\n" not in str(caught.value)


def test_a_network_without_maps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of timm that returns no maps is no teacher."""
    save_network(tmp_path, "test_resnet")
    monkeypatch.delattr("timm.models.resnet.ResNet.forward_intermediates")
    message = "test_resnet: expected a timm network with forward_intermediates"
    with pytest.raises(TeacherError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_2244", "timm .* has no network of this name; did you mean vit_tiny"),
        (
            "resnet18.nothing",
            "resnet18.nothing: expected weights in a repository.*resnet18.a1_in1k",
        ),
        ("", "timm .* has no network of this name"),
    ],
)
def test_an_unknown_name_is_refused(name: str, message: str) -> None:
    """A network or tag that timm does not have is refused with the closest ones."""
    with pytest.raises(ConfigError, match=message):
        load_teacher(f"timm:{name}")


def test_a_side_that_the_patch_does_not_divide_names_the_nearest(tmp_path: Path) -> None:
    """The nearest sizes stand in the message."""
    save_network(tmp_path, **VIT)
    message = r"`size` 30x32: vit_tiny_patch16_224 reads patches of 8 pixels.*`size` 24x32 or 32x32"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path).denoiser.find_taps(30, 32)


def test_a_network_of_one_size_refuses_others(tmp_path: Path) -> None:
    """A network that takes one size names it."""
    save_network(tmp_path, "beit_base_patch16_224", **{**VIT, "depth": 2})
    denoiser = load(tmp_path).denoiser
    assert [tap.name for tap in denoiser.find_taps(32, 32)] == ["block0", "block1"]
    with pytest.raises(
        ConfigError, match=r"beit_base_patch16_224 does not take this size .*`size` 32x32"
    ):
        denoiser.find_taps(48, 48)


def test_a_prompt_and_a_timestep_are_refused(tmp_path: Path) -> None:
    """A timm teacher reads no text, and has no timestep but 0."""
    save_network(tmp_path, **VIT)
    with pytest.raises(ConfigError, match="`prompt`: a timm teacher reads no text"):
        load_teacher(f"timm:local-dir:{tmp_path}", prompt="a cat")
    settings = TeacherSettings(view=ViewSpec(height=32, width=32), timesteps=(50,), batch_size=2)
    with pytest.raises(ConfigError, match="`timestep` 50: this teacher has one timestep, 0"):
        prepare_teacher(load(tmp_path), settings, resolve_compute("cpu", "fp32"))
