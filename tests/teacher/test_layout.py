"""Directories that are no teacher are named for what they are; unused parts are named too."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dtcache.errors import TeacherNotFoundError
from dtcache.teacher import load_teacher
from dtcache.teacher.layout import MAX_SEARCHED, find_network, layout_warnings


def touch(root: Path, *names: str) -> None:
    """Write files that hold an empty JSON object, with their folders."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def ema_only(root: Path) -> None:
    touch(root, "unet_ema/config.json", "scheduler.bin")


def hub_cache(root: Path) -> None:
    touch(root, "models--x--y/refs/main", "models--x--y/snapshots/abc/unet/config.json")


def flat_inside(root: Path) -> None:
    touch(root, "ddpm/config.json", "ddpm/scheduler_config.json")


def web_checkpoint(root: Path) -> None:
    touch(root, "v1-5-pruned.ckpt", "README.md")


def lora_alone(root: Path) -> None:
    touch(root, "pytorch_lora_weights.safetensors")


def peft_alone(root: Path) -> None:
    touch(root, "adapter_config.json", "adapter_model.safetensors")


def feature_cache(root: Path) -> None:
    touch(root, "manifest.json", "data.zarr/zarr.json")


def student_run(root: Path) -> None:
    touch(root, "run.json", "backbone/config.json", "checkpoint.pt")


def kept_teachers(root: Path) -> None:
    touch(root, "run.json", "kept/0/unet/config.json")


def other_pipeline(root: Path) -> None:
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableCascadePipeline"}))
    touch(root, "decoder/config.json")


def unprintable_pipeline(root: Path) -> None:
    (root / "model_index.json").write_text(json.dumps({"_class_name": "\x1b[2J"}))


def nothing(root: Path) -> None:
    touch(root, "README.md")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            ema_only,
            r"expected unet/, got only unet_ema/, .*; copy unet_ema/ to unet/ and add sched",
        ),
        (hub_cache, r"a model is in .*/models--x--y/snapshots/abc; pass that directory"),
        (flat_inside, r"a model is in .*/ddpm; pass that directory"),
        (
            web_checkpoint,
            r"got 'v1-5-pruned\.ckpt', a checkpoint in a single file; convert it with",
        ),
        (
            lora_alone,
            r"got only parts added to one \(LoRA, .*call fuse_lora\(\) and save_pretrained",
        ),
        (peft_alone, r"expected a whole model, got only parts added to one"),
        (feature_cache, "this is a feature cache; pass the teacher that it was extracted with"),
        (student_run, "this is a run of dtcache without a teacher: a student's run, or .*; pass a"),
        (kept_teachers, r"a model is in .*/kept/0; pass that directory"),
        (
            other_pipeline,
            "expected unet/ or transformer/, got the parts of a StableCascadePipeline",
        ),
        (unprintable_pipeline, "got the parts of a pipeline; dtcache does not support"),
        (nothing, "expected a directory saved by save_pretrained, with unet/ or transformer/"),
    ],
)
def test_a_directory_without_a_network_is_named(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    """The message says what the directory holds and what to pass instead."""
    write(tmp_path)
    with pytest.raises(TeacherNotFoundError, match=f"configuration is missing; .*{message}"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "sd.ckpt", "256x256_diffusion.pt"])
def test_a_single_file_says_how_to_convert_it(tmp_path: Path, name: str) -> None:
    """A checkpoint in a single file is refused with the two ways to convert it."""
    touch(tmp_path, name)
    message = f"got '{name}', a checkpoint in a single file; .*from_single_file.* teacher convert"
    with pytest.raises(TeacherNotFoundError, match=message):
        load_teacher(str(tmp_path / name))


def test_a_students_backbone_is_no_teacher(tmp_path: Path) -> None:
    """A folder with the configuration of another library is refused as such."""
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ValueError, match=r"got None; this is no model of diffusers, such as a st"):
        load_teacher(str(tmp_path))


def test_the_search_for_a_model_is_limited(tmp_path: Path) -> None:
    """A large directory, such as a folder of images, is not searched to its end."""
    for number in range(MAX_SEARCHED // 100):
        folder = tmp_path / f"{number:03d}"
        folder.mkdir()
        for file in range(110):
            (folder / f"{file}.png").touch()
    touch(tmp_path, "zzz/deep/unet/config.json")
    with pytest.raises(TeacherNotFoundError, match="expected a directory saved by save_pretrained"):
        find_network(tmp_path)


def test_parts_that_are_not_used_are_named(tmp_path: Path) -> None:
    """LoRA weights, an EMA copy and a ControlNet beside the network each give a warning."""
    weights = "unet/diffusion_pytorch_model.safetensors"
    touch(tmp_path, "unet/config.json", weights, "model_index.json", "vae/config.json")
    assert layout_warnings(tmp_path, tmp_path / "unet") == []
    touch(tmp_path, "unet_ema/config.json", "controlnet/config.json")
    touch(tmp_path, "pytorch_lora_weights.safetensors", "unet/learned_embeds.bin")
    ema, controlnet, lora, embeds = layout_warnings(tmp_path, find_network(tmp_path))
    assert ema == f"{tmp_path / 'unet_ema'} is not used: the features are those of {tmp_path}/unet"
    assert controlnet.startswith(f"{tmp_path / 'controlnet'} is not used")
    assert lora.startswith(f"{tmp_path}/pytorch_lora_weights.safetensors is not applied: the feat")
    assert embeds.startswith(f"{tmp_path}/unet/learned_embeds.bin is not applied")
