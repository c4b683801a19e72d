"""A teacher loads safely from both layouts, and never with weights that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from teacher.kinds import TEXT_CHANNELS, TOKENS, save_stable_diffusion

from dtcache.errors import TeacherError, TeacherNotFoundError
from dtcache.teacher import Prompt, load_teacher
from dtcache.teacher.diffusers_files import WEIGHTS


@pytest.fixture
def teacher_copy(teacher_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the teacher that a test may damage."""
    return Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_both_layouts_load_the_same_network(teacher_dir: Path, tmp_path: Path) -> None:
    """The flat google/ddpm-* layout and the sub-folder layout load with equal hashes."""
    shutil.copy(teacher_dir / "unet" / "config.json", tmp_path)
    shutil.copy(teacher_dir / "unet" / WEIGHTS, tmp_path)
    shutil.copy(teacher_dir / "scheduler" / "scheduler_config.json", tmp_path)
    nested = load_teacher(str(teacher_dir))
    flat = load_teacher(str(tmp_path))
    assert (nested.weights_sha256, nested.config_sha256) == (
        flat.weights_sha256,
        flat.config_sha256,
    )
    assert torch.equal(nested.alpha_bars, flat.alpha_bars)
    for a, b in zip(
        nested.denoiser.unet.parameters(), flat.denoiser.unet.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_the_weights_are_the_files(teacher_dir: Path) -> None:
    """Every tensor of the file is in the frozen network bit for bit."""
    loaded = load_teacher(str(teacher_dir))
    state = loaded.denoiser.unet.state_dict()
    for name, tensor in load_file(teacher_dir / "unet" / WEIGHTS).items():
        assert torch.equal(state[name], tensor)
    assert not loaded.denoiser.unet.training
    assert not any(p.requires_grad for p in loaded.denoiser.unet.parameters())


def test_the_schedule_is_the_ddpm_formula(teacher_dir: Path) -> None:
    """alpha_bar_t is the product of 1 - beta over Ho et al.'s betas for any sampler file."""
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(
        load_teacher(str(teacher_dir)).alpha_bars.double(), expected, rtol=1e-4, atol=1e-6
    )


def test_other_samplers_give_the_same_schedule(teacher_dir: Path, teacher_copy: Path) -> None:
    """An Euler scheduler's file with the same betas gives DDPM's noise levels."""
    edit(
        teacher_copy / "scheduler" / "scheduler_config.json",
        lambda c: c.update(_class_name="EulerDiscreteScheduler"),
    )
    assert torch.equal(
        load_teacher(str(teacher_copy)).alpha_bars, load_teacher(str(teacher_dir)).alpha_bars
    )


def test_what_the_network_predicts_is_the_schedulers(teacher_dir: Path, teacher_copy: Path) -> None:
    """The kinds of betas and prediction come from the scheduler's file or diffusers' defaults."""
    path = teacher_copy / "scheduler" / "scheduler_config.json"
    plain = load_teacher(str(teacher_dir))
    assert (plain.schedule, plain.prediction) == ("linear", "epsilon")
    edit(path, lambda c: c.update(prediction_type="v_prediction", beta_schedule="scaled_linear"))
    changed = load_teacher(str(teacher_copy))
    assert (changed.schedule, changed.prediction) == ("scaled_linear", "v_prediction")
    edit(path, lambda c: c.update(trained_betas=[1e-3] * 10, num_train_timesteps=10))
    assert load_teacher(str(teacher_copy)).schedule == "given"
    edit(
        path,
        lambda c: [c.pop(name) for name in ("prediction_type", "trained_betas", "beta_schedule")],
    )
    assert (
        load_teacher(str(teacher_copy)).schedule,
        load_teacher(str(teacher_copy)).prediction,
    ) == (
        "linear",
        "epsilon",
    )


def remove_weights(root: Path) -> None:
    (root / "unet" / WEIGHTS).unlink()


def misname_weights(root: Path) -> None:
    (root / "unet" / WEIGHTS).rename(root / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def shard_a_variant(root: Path) -> None:
    remove_weights(root)
    for shard in range(1, 5):
        name = f"diffusion_pytorch_model.fp16-0000{shard}-of-00004.safetensors"
        (root / "unet" / name).touch()


def lora_beside_nothing(root: Path) -> None:
    remove_weights(root)
    (root / "unet" / "pytorch_lora_weights.safetensors").touch()


def lfs_pointer(root: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (root / "unet" / WEIGHTS).write_text(pointer)


def dangling_link(root: Path) -> None:
    remove_weights(root)
    (root / "unet" / WEIGHTS).symlink_to("../../blobs/0")


def quantised(root: Path) -> None:
    change = {"quantization_config": {"quant_method": "bitsandbytes"}}
    edit(root / "unet" / "config.json", lambda c: c.update(change))


def endless_config(root: Path) -> None:
    edit(root / "unet" / "config.json", lambda c: c.update(norm_eps=float("nan")))


def pickle_weights(root: Path) -> None:
    remove_weights(root)
    torch.save({}, root / "unet" / "diffusion_pytorch_model.bin")


def drop_a_tensor(root: Path) -> None:
    path = root / "unet" / WEIGHTS
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)


def add_a_tensor(root: Path) -> None:
    path = root / "unet" / WEIGHTS
    save_file({**load_file(path), "extra.weight": torch.zeros(1)}, path)


def other_class(root: Path) -> None:
    edit(root / "unet" / "config.json", lambda c: c.update(_class_name="UNet1DModel"))


def other_condition(root: Path) -> None:
    edit(root / "unet" / "config.json", lambda c: c.update(class_embed_type="timestep"))


def latent_without_autoencoder(root: Path) -> None:
    edit(root / "unet" / "config.json", lambda c: c.update(in_channels=4))


def other_schedule(root: Path) -> None:
    edit(
        root / "scheduler" / "scheduler_config.json",
        lambda c: c.update(_class_name="ScoreSdeVeScheduler"),
    )


def no_schedule(root: Path) -> None:
    (root / "scheduler" / "scheduler_config.json").unlink()


def no_config(root: Path) -> None:
    (root / "unet" / "config.json").unlink()


def broken_config(root: Path) -> None:
    (root / "unet" / "config.json").write_text("{")


def list_config(root: Path) -> None:
    (root / "unet" / "config.json").write_text("[]")


def huge_config(root: Path) -> None:
    (root / "unet" / "config.json").write_text(" " * (1 << 20) + "{}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove_weights,
            r"the weights are missing; if the repository has only pickles or another variant, load",
        ),
        (
            misname_weights,
            r"the weights are missing; got diffusion_pytorch_model\.fp16\.safetensors; rename the "
            r"file to diffusion_pytorch_model\.safetensors",
        ),
        (
            shard_a_variant,
            r"got diffusion_pytorch_model\.fp16-00001-of-00004\.safetensors, .*, \.\.\.; load them "
            r"with from_pretrained\(variant=\"fp16\"\) and save them with save_pretrained",
        ),
        (lora_beside_nothing, r"the weights are missing; if the repository has only pickles"),
        (
            pickle_weights,
            r"only pickled weights \(diffusion_pytorch_model\.bin\), which dtcache never loads",
        ),
        (drop_a_tensor, "1 missing_keys, such as conv_in.weight"),
        (add_a_tensor, "1 unexpected_keys, such as extra.weight"),
        (
            other_class,
            "expected _class_name UNet2DModel or .*, got 'UNet1DModel'; dtcache does not support "
            "this kind of",
        ),
        (
            other_condition,
            "expected no class_embed_type, got 'timestep', a condition that dtcache does not "
            "support",
        ),
        (
            latent_without_autoencoder,
            r"expected a model of RGB pixels, or an autoencoder in .*in_channels=4",
        ),
        (
            other_schedule,
            "expected the scheduler of a variance-preserving model, got 'ScoreSdeVeScheduler'",
        ),
        (no_schedule, r"scheduler_config\.json: the noise schedule is missing"),
        (no_config, r"config\.json: the network's configuration is missing"),
        (
            lfs_pointer,
            r"got a pointer of Git LFS to them; run git lfs pull in the repository, or pass",
        ),
        (
            dangling_link,
            r"the weights are a link to \.\./\.\./blobs/0, which does not exist; download",
        ),
        (
            quantised,
            r"expected fp32, fp16 or bf16 weights, got quantised ones \('bitsandbytes'\); use",
        ),
        (endless_config, r"config\.json: expected finite numbers, got norm_eps nan"),
        (broken_config, r"config\.json: not JSON"),
        (list_config, r"config\.json: expected a JSON object, got list"),
        (huge_config, "expected at most 1048576 bytes"),
    ],
)
def test_a_bad_directory_is_refused(
    teacher_copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    """A part that is missing, misnamed, pickled or of another model is refused by name."""
    damage(teacher_copy)
    with pytest.raises(TeacherError, match=message):
        load_teacher(str(teacher_copy))


def test_a_missing_directory_is_refused() -> None:
    """A path that is neither a directory nor a hub id is refused with what was expected."""
    with pytest.raises(
        TeacherNotFoundError,
        match=r"teacher \./nowhere: no such directory; expected a diffusers dir",
    ):
        load_teacher("./nowhere")


class Hub:
    """A stand-in for the Hugging Face hub: one repository, and every request for it."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files = files
        self.snapshot = cache / ("0" * 40)
        self.snapshot.mkdir(parents=True)
        self.requests: list[list[str]] = []

    def download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        """Copy the files that match, as `snapshot_download` does."""
        assert revision == (self.snapshot.name if self.requests else None)
        names = [p.relative_to(self.files).as_posix() for p in self.files.rglob("*") if p.is_file()]
        fetched = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))
        self.requests.append(fetched)
        for name in fetched:
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.files / name, self.snapshot / name)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Return a hub whose repository is in `tmp_path / "files"`."""
    (tmp_path / "files").mkdir()
    stand_in = Hub(tmp_path / "files", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in.download)
    return stand_in


UNUSED = (
    "evil.py",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "prior/diffusion_pytorch_model.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "v1-5-pruned.safetensors",
)


def test_the_address_of_a_hub_page_names_the_id() -> None:
    """An address is refused with the id to pass."""
    with pytest.raises(TeacherNotFoundError, match=r"got an address; pass google/ddpm-cat-256$"):
        load_teacher("https://huggingface.co/google/ddpm-cat-256/tree/main")


def test_a_hub_id_fetches_json_and_then_the_weights_of_used_parts(
    hub: Hub, teacher_dir: Path
) -> None:
    """JSON comes first, then exactly one weight file; the result loads like a directory."""
    shutil.copytree(teacher_dir, hub.files, dirs_exist_ok=True)
    for name in UNUSED:
        (hub.files / name).parent.mkdir(exist_ok=True)
        (hub.files / name).touch()
    loaded = load_teacher("google/ddpm-cat-256")
    assert loaded.weights_sha256 == load_teacher(str(teacher_dir)).weights_sha256
    first, second = hub.requests
    assert first == ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    assert second == [f"unet/{WEIGHTS}"]


def test_a_text_conditioned_hub_id_fetches_all_its_parts(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All used parts are fetched, shards by their index; a stored prompt needs no encoder."""
    unet, _ = save_stable_diffusion(hub.files)
    (hub.files / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(hub.files / "unet", max_shard_size="100KB")
    for name in ("text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json"):
        (hub.files / name).parent.mkdir(exist_ok=True)
        (hub.files / name).touch()
    monkeypatch.setattr("dtcache.teacher.load.require_text_encoder", lambda root: None)
    prompt = Prompt(text="", embedding_LD=np.zeros((TOKENS, TEXT_CHANNELS), np.float32))
    monkeypatch.setattr("dtcache.teacher.load.embed_prompt", lambda root, text: prompt)
    load_teacher("runwayml/stable-diffusion")
    _, parts, shards = hub.requests
    encoder = ["text_encoder/model.safetensors", "tokenizer/merges.txt"]
    assert parts == [*encoder, f"vae/{WEIGHTS}"]
    assert len(shards) > 1
    assert all("-of-" in shard for shard in shards)
    hub.requests.clear()
    load_teacher("runwayml/stable-diffusion", stored=prompt)
    assert not {*encoder} & {*hub.requests[1]}


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, "got 'FluxTransformer2DM"),
        ("unet/config.json", {"in_channels": 9}, "expected in_channels=4, .*, got 9"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "expected no time_cond_proj_dim, got 8"),
        ("vae/config.json", {"latents_mean": [0.0]}, "with a scale and a shift only"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "flow matching"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "got .'T5EncoderMod"),
    ],
)
def test_an_unsupported_hub_id_is_refused_before_its_weights(
    hub: Hub, path: str, change: dict, message: str
) -> None:
    """No weights are fetched for a model whose JSON shows that dtcache cannot use it."""
    save_stable_diffusion(hub.files)
    (hub.files / "text_encoder").mkdir()
    (hub.files / "text_encoder" / "config.json").write_text("{}")
    edit(hub.files / path, lambda c: c.update(change))
    with pytest.raises(TeacherError, match=message):
        load_teacher("black-forest-labs/FLUX.1-dev")
    (only,) = hub.requests
    assert only
    assert all(name.endswith(".json") for name in only)


def test_a_hub_id_loads_offline_from_the_hubs_own_cache(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that was downloaded before loads without a network, by huggingface_hub."""
    repository = tmp_path / "models--google--ddpm-cat-256"
    shutil.copytree(teacher_dir, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = load_teacher("google/ddpm-cat-256")
    assert loaded.weights_sha256 == load_teacher(str(teacher_dir)).weights_sha256


def test_a_hub_failure_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, a hub id fails with its name in one message."""

    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(TeacherError, match=r"teacher google/x: not a directory, and .*\(offline\)"):
        load_teacher("google/x")


def test_unused_parts_are_warnings_of_the_teacher(teacher_copy: Path) -> None:
    """LoRA weights beside the network are named, and the network loads without them."""
    assert load_teacher(str(teacher_copy)).warnings == ()
    (teacher_copy / "pytorch_lora_weights.safetensors").touch()
    (warning,) = load_teacher(str(teacher_copy)).warnings
    assert "pytorch_lora_weights.safetensors is not applied" in warning


def test_code_in_the_directory_is_never_run(teacher_copy: Path) -> None:
    """Python code in the directory, named by model_index.json, is never run."""
    mark = teacher_copy / "ran"
    (teacher_copy / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    edit(
        teacher_copy / "model_index.json",
        lambda c: c.update(_class_name=["evil", "Evil"], unet=["evil", "Evil"]),
    )
    load_teacher(str(teacher_copy))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layers_per_block": 10_000_000}, "its configuration has more than"),
        ({"block_out_channels": [1 << 14] * 4}, "its configuration needs"),
    ],
)
def test_a_larger_network_than_its_weights_is_refused(
    changed: dict[str, object], reason: str, teacher_copy: Path
) -> None:
    """Millions of layers, or a billion channels, are refused before they take memory."""
    edit(teacher_copy / "unet" / "config.json", lambda config: config.update(changed))
    with pytest.raises(TeacherError, match=rf"cannot be loaded as UNet2DModel \({reason}"):
        load_teacher(str(teacher_copy))


def test_weights_in_one_file_and_in_shards_are_refused(teacher_copy: Path) -> None:
    """A part with both a single file and an index is refused: they may hold different weights."""
    index = teacher_copy / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": WEIGHTS}}))
    with pytest.raises(TeacherError, match="with its shards, got both, which may hold different"):
        load_teacher(str(teacher_copy))
