"""Students can be built from networks of every family, from modules and from single maps."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from dtcache.errors import ConfigError, WeightsError
from dtcache.recipe import ViewSpec
from dtcache.student import Backbone, build_student, load_backbone, make_backbone, save_backbone
from dtcache.student.pyramid import SimplePyramid
from dtcache.student.regressor import FeatureRegressor

VIEW = ViewSpec(height=64, width=96)
TARGETS = {f"t150/stride{s}": (s + 1, 64 // s, 96 // s) for s in (4, 8, 16, 32)}
FAMILIES = (
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "regnetx_002",
    "mobilenetv3_small_050",
    "swin_tiny_patch4_window7_224",
    "test_vit",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_regresses_every_tap(name: str) -> None:
    """Every network family regresses taps at strides 4 to 32, and gradients reach its stem."""
    student = build_student(name, TARGETS, VIEW, size=None, width=8)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert student.input_size == (64, 96)
    assert student.regressor.resized == []
    found = student.train()(images)
    assert {key: tuple(x.shape[1:]) for key, x in found.items()} == TARGETS
    sum(x.square().mean() for x in found.values()).backward()
    stem = next(p for p in student.backbone.parameters() if p.ndim == 4)
    assert float(stem.grad.abs().sum()) > 0
    assert (student.pyramid is None) == (name != "test_vit")


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_networks_of_one_size_are_built_for_the_students(name: str, tmp_path: object) -> None:
    """A network of one input size is built for the student's size and reads back bit for bit."""
    student = build_student(name, TARGETS, VIEW, size=(32, 64), width=8)
    backbone = student.backbone.eval()
    save_backbone(backbone, tmp_path, input_size=student.input_size, view=VIEW)
    images = torch.randn(2, 3, 32, 64)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    loaded, size, _ = load_backbone(tmp_path)
    assert list(network.state_dict()) == list(
        timm.create_model(name, num_classes=0, img_size=(32, 64)).state_dict()
    )
    with torch.no_grad():
        assert torch.equal(network(images), backbone.model(images))
        assert torch.equal(loaded.eval()(images)[-1], backbone(images)[-1])
    assert size == loaded.default_size == (32, 64)
    with pytest.raises(
        ConfigError, match=rf"{name}: expected images of 32x64 pixels, the only size that it takes"
    ):
        loaded(torch.randn(1, 3, 64, 64))
    weights = tmp_path / "model.safetensors"
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("32,\n   64", "8192,\n   8192"))
    with pytest.raises(
        WeightsError, match=rf"not the weights of {name} \(its configuration needs \d+ bytes"
    ):
        load_backbone(tmp_path)
    assert weights.exists()


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "test_efficientnet", "test_vit", "test_resnet"]
)
def test_pooled_features_end_where_training_does(name: str) -> None:
    """Pooled features are the coarsest map's means and do not depend on untrained weights."""
    backbone = make_backbone(name, init=None, seed=0, size=(64, 64)).eval()
    images = torch.randn(2, 3, 64, 64)
    backbone.train()
    sum(x.mean() for x in backbone(images)).backward()
    untrained = [p for p in backbone.parameters() if p.grad is None]
    assert bool(untrained) is (name != "test_resnet")
    backbone.eval()
    with torch.no_grad():
        before = backbone.pooled(images)
        np.testing.assert_allclose(
            before, backbone(images)[-1].numpy().mean((2, 3)), rtol=1e-4, atol=1e-6
        )
        for weight in untrained:
            weight.add_(1)
        assert torch.equal(backbone.pooled(images), before)
        if name == "test_resnet":
            torch.testing.assert_close(before, backbone.model(images))


class Maps(nn.Module):
    """A custom network whose maps come from average pooling."""

    def __init__(self, strides: tuple[int, ...], kind: type = list) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self._strides = strides
        self._kind = kind

    def forward(self, images_BCHW: Tensor) -> object:
        """Return the maps."""
        x_BCHW = self.conv(images_BCHW)
        return self._kind(nn.functional.avg_pool2d(x_BCHW, s) for s in self._strides)


@pytest.mark.parametrize("strides", [(4, 8, 16), (16,), (2,)])
def test_any_module_that_returns_maps_is_a_student(strides: tuple[int, ...]) -> None:
    """A module may return a pyramid of maps, or one map from which strides 4 to 32 are made."""
    module = Maps(strides)
    student = build_student(
        module, TARGETS, VIEW, size=None, width=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    found = student(torch.full((2, 3, 64, 96), 255, dtype=torch.uint8))
    assert {key: tuple(x.shape[1:]) for key, x in found.items()} == TARGETS
    assert student.backbone.model is module
    ones = module(torch.ones(1, 3, 64, 96))[-1]
    shown: list[Tensor] = []
    student.eval()
    student.backbone.register_forward_hook(lambda *call: shown.append(call[2][-1]))
    student(torch.full((1, 3, 64, 96), 255, dtype=torch.uint8))
    torch.testing.assert_close(shown[0], ones)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Maps((8, 4)),
            r"Maps: expected a list of maps .* each coarser .*got \[\(1, 6, 8, 12\), \(1, 6, 16, "
            r"24\)\]",
        ),
        (Maps(()), r"Maps: expected a list of maps .* got list"),
        (nn.Conv2d(3, 4, 1), r"Conv2d: expected a list of maps .* got Tensor"),
        (Maps((128,)), r"does not take images of 64x96 pixels \(.*\); pass another `student_size`"),
    ],
)
def test_other_modules_are_refused(module: nn.Module, message: str) -> None:
    """A module without a rising pyramid is refused with what was expected and got."""
    with pytest.raises(ConfigError, match=message):
        build_student(module, TARGETS, VIEW, size=None, width=8)
    with pytest.raises(ConfigError, match=r"`init` pretrained: expected a timm name as `student`"):
        build_student(module, TARGETS, VIEW, size=None, width=8, init="pretrained")


@pytest.mark.parametrize("strides", [(4, 8, 16), (16,)])
def test_initial_weights_are_a_function_of_the_seed(strides: tuple[int, ...]) -> None:
    """Initial weights depend on the seed alone, and the caller's random state is unchanged."""
    module = Maps(strides)
    torch.manual_seed(7)
    channels = [6] * len(strides)
    grids = [(64 // s, 96 // s) for s in strides]
    pyramid = SimplePyramid(6, 16) if len(strides) == 1 else None
    if pyramid is not None:
        channels = pyramid.channels
        grids = [(64 // s, 96 // s) for s in (4, 8, 16, 32)]
    expected = FeatureRegressor(channels, grids, TARGETS, 8, "fpn-ppm").state_dict()
    torch.manual_seed(5)
    untouched = torch.rand(3)
    torch.manual_seed(5)
    student = build_student(module, TARGETS, VIEW, size=(64, 96), width=8, seed=7)
    assert torch.equal(torch.rand(3), untouched)
    found = student.regressor.state_dict()
    assert list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    if pyramid is not None:
        assert student.pyramid is not None
        found = student.pyramid.state_dict()
        assert found and all(
            torch.equal(found[name], value) for name, value in pyramid.state_dict().items()
        )


def test_sizes_that_a_network_cannot_take_are_refused() -> None:
    """A size of broken patches is refused, and one that timm refuses with timm's reason."""
    with pytest.raises(
        ConfigError, match=r"images of 64x90 pixels.* multiples of 16; pass `student_size` 64x80 or"
    ):
        build_student("test_vit", TARGETS, VIEW, size=(64, 90), width=8)
    with pytest.raises(
        ConfigError, match=r"cannot make nest_tiny with random weights at 64x96 pixels \(Model only"
    ):
        build_student("nest_tiny", TARGETS, VIEW, size=None, width=8)


@pytest.mark.parametrize(
    ("stride", "scales"), [(16, (4, 2, 1, 0.5)), (14, (4, 2, 1, 0.5)), (8, (2, 1, 0.5, 0.25))]
)
def test_the_simple_pyramid_is_vitdets(stride: int, scales: tuple[float, ...]) -> None:
    """The simple pyramid is ViTDet's: strides 4 to 32 by deconvolution, identity and pooling."""
    pyramid = SimplePyramid(8, stride)
    x = torch.randn(2, 8, 4, 8)
    maps = pyramid(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(4 * s, 8 * s) for s in scales]
    assert [m.shape[1] for m in maps] == pyramid.channels == [int(8 / max(1, s)) for s in scales]
    same = scales.index(1)
    assert torch.equal(maps[same], x)
    assert torch.equal(maps[same + 1], nn.functional.max_pool2d(x, 2))
    deconvolution = pyramid.levels[same - 1][0]
    torch.testing.assert_close(maps[same - 1], deconvolution(x))
    assert isinstance(make_backbone("test_vit", init=None, seed=0), Backbone)
