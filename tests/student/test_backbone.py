"""The backbone is timm's own network with a pyramid, and timm reads its folder back exactly."""

import json
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn

from dtcache.errors import ConfigError, DiskError, WeightsError
from dtcache.recipe import ViewSpec
from dtcache.student import (
    Backbone,
    MapsModule,
    load_backbone,
    make_backbone,
    save_backbone,
    student_input,
)

NAMES = (
    "resnet18",
    "resnet50",
    "convnext_atto",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "regnetx_002",
)
VIEW = ViewSpec(height=24, width=48, resize_mode="stretch")
SMALL = "resnet10t"


@cache
def backbone_of(name: str) -> Backbone:
    """Return one random network per name, shared by the tests; no test may change it."""
    return make_backbone(name, init=None, seed=3).eval()


def images(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    """Return normalised random images."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a backbone's folder."""
    save_backbone(backbone_of(SMALL), tmp_path / "backbone", input_size=(48, 96), view=VIEW)
    return tmp_path / "backbone"


@pytest.mark.parametrize("name", NAMES)
def test_pyramid_has_the_channels_and_strides_that_it_announces(name: str) -> None:
    """Maps come finest first from stride 4, with the declared channels and grids."""
    backbone = backbone_of(name)
    with torch.no_grad():
        maps = backbone(images())
    assert backbone.reductions == [4, 8, 16, 32]
    assert [x.shape[1] for x in maps] == backbone.channels
    assert [x.shape[2:] for x in maps] == [(64 // r, 96 // r) for r in backbone.reductions]


@pytest.mark.parametrize("name", NAMES)
def test_timm_reads_the_folder_back_exactly(name: str, tmp_path: Path) -> None:
    """timm's local-dir loads the same weights and outputs, as a network and as a pyramid."""
    backbone = backbone_of(name)
    save_backbone(backbone, tmp_path, input_size=(64, 96), view=VIEW)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    ours = backbone.model.state_dict()
    theirs = plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    pyramid = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(images()), backbone.model(images()))
        coarse = [
            x
            for x, r in zip(pyramid(images()), pyramid.feature_info.reduction(), strict=True)
            if r >= 4
        ]
        assert all(torch.equal(a, b) for a, b in zip(coarse, backbone(images()), strict=True))


def test_timm_learns_how_to_normalise_and_resize(saved: Path) -> None:
    """The folder's pretrained_cfg has the input size, mean and std of the training."""
    model = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=0)
    data = timm.data.resolve_model_data_config(model)
    assert (tuple(data["input_size"]), data["crop_mode"]) == ((3, 48, 96), "squash")
    assert (tuple(data["mean"]), tuple(data["std"])) == (
        backbone_of(SMALL).mean,
        backbone_of(SMALL).std,
    )
    assert "dtcache" not in model.pretrained_cfg


def test_channels_last_and_training_weights_are_saved_too(tmp_path: Path) -> None:
    """A backbone in channels-last format and training mode saves the same bytes."""
    backbone = make_backbone(SMALL, init=None, seed=3)
    save_backbone(backbone, tmp_path / "a", input_size=(32, 32), view=VIEW)
    save_backbone(
        backbone.to(memory_format=torch.channels_last),
        tmp_path / "b",
        input_size=(32, 32),
        view=VIEW,
    )
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


def test_random_weights_are_a_function_of_the_seed() -> None:
    """Random weights depend on the seed alone, and the caller's random state is unchanged."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (make_backbone(SMALL, init=None, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weights = [net.model.state_dict()["layer1.0.conv1.weight"] for net in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_saved_folder_starts_another_backbone(saved: Path) -> None:
    """load_backbone restores size, view, normalisation and weights; init accepts only its own name.

    The caller's random state is unchanged.
    """
    loaded, size, view = load_backbone(saved)
    assert (size, view, loaded.name) == ((48, 96), VIEW, SMALL)
    assert (loaded.mean, loaded.std) == (backbone_of(SMALL).mean, backbone_of(SMALL).std)
    torch.manual_seed(5)
    untouched = torch.rand(3)
    torch.manual_seed(5)
    again = make_backbone(SMALL, init=str(saved), seed=99)
    assert torch.equal(torch.rand(3), untouched)
    for net in (loaded, again):
        expected = backbone_of(SMALL).model.state_dict()
        assert all(
            torch.equal(value, expected[key]) for key, value in net.model.state_dict().items()
        )
    with pytest.raises(
        ConfigError,
        match=r"`init` .*backbone: expected a backbone of resnet18, got one of resnet10t",
    ):
        make_backbone("resnet18", init=str(saved), seed=0)


def test_names_that_cannot_serve_are_refused_with_advice() -> None:
    """A misspelt name, a wrong tag and a network without a pyramid are each refused with advice."""
    with pytest.raises(
        ConfigError, match=r"resnet5O: timm .* has no network of this name; did you mean resnet5"
    ):
        make_backbone("resnet5O", init=None, seed=0)
    with pytest.raises(ConfigError, match=r"\?{9}: .*resnet50 is one"):
        make_backbone("?????????", init=None, seed=0)
    with pytest.raises(
        ConfigError,
        match=r"timm cannot make resnet18\.nope with pretrained weights .*nope.*check the name's "
        r"tag and the connection to the hub, or use resnet18",
    ):
        make_backbone("resnet18.nope", init="pretrained", seed=0)
    with pytest.raises(
        ConfigError, match=r"a feature pyramid .* or a plain ViT, got strides 12, 17; .*resnet50"
    ):
        make_backbone("crossvit_tiny_240", init=None, seed=0)


def test_a_network_of_one_input_size_says_so() -> None:
    """A network with a fixed input size (Swin, 224 pixels) is refused at another size."""
    backbone = make_backbone("swin_tiny_patch4_window7_224", init=None, seed=0)
    with pytest.raises(
        ConfigError,
        match=r"swin_tiny.*expected images of 224x224 pixels.*got 64x96; pass that size",
    ):
        backbone(images())


@pytest.mark.parametrize("init", [None, "some/folder"])
def test_a_tag_without_pretrained_weights_is_refused(init: str | None) -> None:
    """In timm a tag names pretrained weights: another start of the network is refused."""
    with pytest.raises(
        ConfigError,
        match=r"`student` resnet18\.a1_in1k: expected `init='pretrained'`, as the tag a1_in1k "
        r"names pretrained weights, got .*; pass `init='pretrained'`, or `student` resnet18$",
    ):
        make_backbone("resnet18.a1_in1k", init=init, seed=0)


class Patches(nn.Module):
    """A user's network: one map, of patches of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the map (B, 4, H / 8, W / 8)."""
        return [self.embed(images_BCHW)]


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("vit_tiny_patch16_224", (40, 64), "32x64 or 48x64"),
        ("vit_tiny_patch16_224", (8, 8), "16x16"),
        ("convnext_atto", (72, 72), "64x64 or 96x96"),
        ("densenet121", (72, 72), "64x64 or 96x96"),
        ("patches", (20, 24), "16x24 or 24x24"),
    ],
)
def test_patches_that_do_not_divide_the_image_are_refused(
    name: str, size: tuple[int, int], nearest: str
) -> None:
    """A size whose last pixels no patch contains is refused, and the nearest sizes are named.

    At a size that is accepted, the coarsest map depends on the last rows and columns.
    """
    sized = (64, 64) if name != "patches" else (24, 24)
    network = (
        MapsModule(Patches(), mean=(0, 0, 0), std=(1, 1, 1))
        if name == "patches"
        else make_backbone(name, init=None, seed=0, size=sized)
    ).eval()
    network.require_size(sized)
    x_BCHW = torch.randn(1, 3, *sized, generator=torch.Generator().manual_seed(0))
    for edge in ((..., slice(-1, None), slice(None)), (..., slice(None), slice(-1, None))):
        changed = x_BCHW.clone()
        changed[edge] += 1
        with torch.no_grad():
            assert not torch.equal(network(x_BCHW)[-1], network(changed)[-1])
    if name == "vit_tiny_patch16_224":
        network = make_backbone(name, init=None, seed=0, size=size)
    with pytest.raises(ConfigError, match=rf"its patches do not divide .*; pass `size` {nearest}$"):
        network.require_size(size, "size")
    with pytest.raises(ConfigError, match=rf"pass `student_size` {nearest}$"):
        network(torch.zeros(1, 3, *size))


def _timm_network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    return timm.create_model(name, **options).eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {"num_classes": 1000}),
        ("resnet10t", {"num_classes": 2}),
        ("vit_tiny_patch16_224", {"num_classes": 5, "img_size": 32, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"num_classes": 0, "img_size": 32, "depth": 2}),
        ("convnext_atto", {"num_classes": 3}),
        ("mobilenetv3_small_050", {"num_classes": 3}),
    ],
)
def test_a_folder_saved_by_timm_is_read_as_timm_reads_it(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The classifier is left out; all other weights and the outputs are timm's, saved again too."""
    save_for_hf(_timm_network(name, **options), tmp_path / "timm", safe_serialization=True)
    loaded, size, view = load_backbone(tmp_path / "timm")
    expected = timm.create_model(
        f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0
    ).eval()
    assert view is None
    state = loaded.model.state_dict()
    assert list(state) == list(expected.state_dict())
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert loaded.model.pretrained_cfg.get("state_dict") is None
    x_BCHW = images(1, *size) if "img_size" in options else images(1, 64, 64)
    save_backbone(loaded, tmp_path / "again", input_size=size, view=VIEW)
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True, num_classes=0)
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(x_BCHW), expected(x_BCHW))
        assert torch.equal(again.eval()(x_BCHW), expected(x_BCHW))
        loaded.eval()(x_BCHW)


def test_a_vit_is_resampled_to_another_size_as_timm_does(tmp_path: Path) -> None:
    """At another input size the position embedding is timm's resampled one, for init too."""
    network = _timm_network("vit_tiny_patch16_224", num_classes=4, img_size=32, depth=2)
    save_for_hf(network, tmp_path, safe_serialization=True)
    expected = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, num_classes=0, img_size=(48, 64)
    )
    loaded, trained, _ = load_backbone(tmp_path, (48, 64))
    started = make_backbone("vit_tiny_patch16_224", init=str(tmp_path), seed=0, size=(48, 64))
    assert trained == (32, 32)
    for backbone in (loaded, started):
        torch.testing.assert_close(backbone.model.pos_embed, expected.pos_embed, rtol=0, atol=0)
        assert backbone(images(1, 48, 64))[0].shape[2:] == (3, 4)


def test_half_precision_weights_of_timm_are_read(tmp_path: Path) -> None:
    """Weights saved in 16 bits load as fp32."""
    network = _timm_network(SMALL, num_classes=2)
    save_for_hf(network.half(), tmp_path, safe_serialization=True)
    weight = load_backbone(tmp_path)[0].model.state_dict()["layer1.0.conv1.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, network.state_dict()["layer1.0.conv1.weight"].float())


def test_a_pickle_is_refused_with_the_line_that_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with pytorch_model.bin alone names a command, and the command makes it readable."""
    network = _timm_network(SMALL, num_classes=2)
    folder = tmp_path / "it's here"
    save_for_hf(network, folder)
    with pytest.raises(
        WeightsError,
        match=r"pytorch_model\.bin: expected model\.safetensors, got a pickle, which is never "
        r"opened",
    ) as caught:
        load_backbone(folder)
    command = str(caught.value).partition("convert it: ")[2]
    python, flag, code, *files = shlex.split(command)
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *files])
    exec(code, {})
    state = load_backbone(folder)[0].model.state_dict()
    expected = network.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def _edited(**changes: object) -> bytes:
    config = {
        "architecture": SMALL,
        "pretrained_cfg": {"input_size": [3, 48, 96], "mean": [0.5] * 3, "std": [0.5] * 3},
        "dtcache": {"view": {"height": 24, "width": 48, "resize_mode": "crop"}},
        "model_args": {},
        "num_classes": 0,
    }
    config["pretrained_cfg"].update(
        {k: v for k, v in changes.items() if k in config["pretrained_cfg"]}
    )  # type: ignore[attr-defined]
    config.update({k: v for k, v in changes.items() if k in config})
    return json.dumps(config).encode()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_edited(architecture="os.system"), "architecture 'os.system' is not a network of timm"),
        (_edited(architecture=["resnet18"]), "is not a network of timm"),
        (_edited(input_size=[1, 48, 96]), r"not \(3, height, width\)"),
        (_edited(input_size=[3, 10**9, 96]), "a size of 1000000000 is not a number from 1 to"),
        (_edited(input_size=[3, 48.0, 96]), r"a size of 48\.0"),
        (_edited(mean=[0.5, 0.5]), "not enough values"),
        (_edited(mean=[0.5, 0.5, float("nan")]), "not three finite numbers"),
        (_edited(mean=[10**400, 0.5, 0.5]), "int too large to convert to float"),
        (_edited(std=[0.5, 0.5, 0.0]), "is not positive"),
        (
            _edited(dtcache={"view": {"height": 24, "width": 48, "resize_mode": "zoom"}}),
            "'zoom' is neither crop nor stretch",
        ),
        (_edited(model_args={"checkpoint_path": "x.pth"}), "may not set checkpoint_path"),
        (_edited(model_args={"depth": 10**9}), "depth of 1000000000 is not at most"),
        (_edited(model_args={"in_chans": 4}), r"not \(3, height, width\)"),
        (_edited(num_classes=-1), "a size of -1 is not a number"),
        (_edited(dtcache=[]), "not the configuration of a backbone"),
        (b"[1]", "expected a JSON object, got list"),
        (b"{", "not JSON"),
        (b"[" * 500_000, "not JSON"),
        (b" " * ((1 << 20) + 1), "expected at most 1048576 bytes"),
    ],
)
def test_a_doctored_configuration_is_refused(saved: Path, config: bytes, message: str) -> None:
    """The values of config.json are bounded and whitelisted before anything is built from them."""
    (saved / "config.json").write_bytes(config)
    with pytest.raises(WeightsError, match=message):
        load_backbone(saved)


def test_weights_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    """Truncated, foreign and missing weights are refused, and a pickle is never opened."""
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not the weights of resnet10t"):
        load_backbone(saved)
    save_backbone(backbone_of("resnet18"), tmp_path / "other", input_size=(32, 32), view=VIEW)
    weights.write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(
        WeightsError, match=r"not the weights of resnet10t \(Error.*(Missing|Unexpected) key"
    ):
        load_backbone(saved)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors: the weights are missing"):
        load_backbone(saved)
    with pytest.raises(
        ConfigError, match=r"nowhere/config\.json: missing; expected a folder of a backbone"
    ):
        load_backbone(tmp_path / "nowhere")


def test_weights_that_are_not_finite_are_refused(saved: Path) -> None:
    """A backbone with non-finite weights is refused."""
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    weights["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(weights, saved / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"not the weights of resnet10t \(some of them are not finite\); export"
    ):
        load_backbone(saved)


def test_a_larger_network_than_its_file_takes_no_memory(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture larger than its weights file is refused before it takes memory."""
    (saved / "config.json").write_bytes(_edited(architecture="resnet101"))
    create = timm.create_model
    devices = set()

    def watched(*args: Any, **kwargs: Any) -> nn.Module:
        network = create(*args, **kwargs)
        devices.update(x.device.type for x in network.parameters())
        return network

    monkeypatch.setattr(timm, "create_model", watched)
    with pytest.raises(
        WeightsError,
        match=r"not the weights of resnet101 \(its configuration needs \d+ bytes, the",
    ):
        load_backbone(saved)
    assert devices == {"meta"}


def test_a_network_that_computes_while_it_is_built_loads(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that computes while it is built loads, although its size is not known beforehand.

    Networks of older timm versions do so.
    """
    create = timm.create_model
    numbers = []

    def computing(*args: Any, **kwargs: Any) -> nn.Module:
        numbers.append(torch.linspace(0, 1, 2)[1].item())
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", computing)
    loaded, _, _ = load_backbone(saved)
    assert numbers == [1]
    expected = backbone_of(SMALL).model.state_dict()
    assert all(
        torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items()
    )


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file at the folder's path raises DiskError, not a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(
        DiskError, match=r"cannot write .*/file: File exists; check the disk and its permissions"
    ):
        save_backbone(
            backbone_of(SMALL), tmp_path / "file/backbone", input_size=(48, 96), view=VIEW
        )


@pytest.mark.parametrize("size", [(16, 24), (32, 48), (40, 33), (8, 10)])
def test_student_input_resizes_as_pillow_does(size: tuple[int, int]) -> None:
    """The student's input is enlarged or shrunk as by Pillow, then normalised by mean and std."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 24), np.uint8)
    mean = (0.4, 0.5, 0.6)
    std = (0.2, 0.25, 0.5)
    got = student_input(torch.from_numpy(pixels), size, mean, std).numpy()
    for b, c in np.ndindex(2, 3):
        plane = Image.fromarray(pixels[b, c].astype(np.float32) / 255)
        expected = np.asarray(plane.resize(size[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_allclose(got[b, c], (expected - mean[c]) / std[c], atol=2e-5)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"layers": [4096] * 4}, "its configuration has more than"),
        ({"stem_width": 4096, "base_width": 4096}, "its configuration needs"),
    ],
)
def test_a_network_of_many_layers_is_refused_from_its_configuration(
    args: dict[str, object], reason: str, saved: Path
) -> None:
    """A configuration of thousands of layers, or of wide ones, ends before memory is taken."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_args": args}))
    with pytest.raises(WeightsError, match=rf"not the weights of resnet10t \({reason}"):
        load_backbone(saved)
