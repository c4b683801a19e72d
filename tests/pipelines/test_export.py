"""Exports: a folder that another library loads strictly with equal outputs, or no folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from support.cli import run

from dtcache.errors import ConfigError, ExportError
from dtcache.options import ExportOptions
from dtcache.recipe import ViewSpec
from dtcache.student import Backbone, make_backbone, save_backbone
from dtcache.student.torchvision import HEADS, torchvision_network
from pipelines import export as stage
from pipelines.export import compare, export

VIEW = ViewSpec(height=32, width=32)


def folder_of(name: str, folder: Path) -> Path:
    """Write a backbone of random weights and changed batch statistics, as a run does."""
    backbone = make_backbone(name, init=None, seed=1, size=(32, 32))
    generator = torch.Generator().manual_seed(2)
    for key, value in backbone.model.state_dict().items():
        if key.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        elif key.endswith(("running_var", "bn2.weight")):
            value.copy_(1 + torch.rand(value.shape, generator=generator))
    save_backbone(backbone, folder, input_size=(32, 32), view=VIEW)
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a ResNet-18."""
    root = tmp_path_factory.mktemp("run")
    folder_of("resnet18", root / "backbone")
    return root


def test_torchvision_loads_the_state_dict_strictly(resnet: Path, tmp_path: Path) -> None:
    """torchvision loads the export strictly by the printed lines and gives timm's features."""
    out = tmp_path / "deep" / "tv"
    result = run("export", resnet, "--to", "torchvision", "--out", out)
    assert result.exit_code == 0, result.output
    assert (
        f"{out}: resnet18 for torchvision; on random images its outputs differ from the original's "
        f"by at most" in (result.output)
    )
    scope = {"torchvision": torchvision, "torch": torch, "safetensors": safetensors}
    exec(result.output.splitlines()[1].strip(), scope)
    ours = timm.create_model(
        f"local-dir:{resnet / 'backbone'}", pretrained=True, num_classes=0
    ).eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        wanted = ours(images)
        torch.testing.assert_close(scope["net"].eval()(images), wanted)
    assert float(wanted.std()) > 0.01
    config = json.loads((out / "config.json").read_text())
    assert config["mean"] == list(ours.pretrained_cfg["mean"]) and config["std"] == list(
        ours.pretrained_cfg["std"]
    )
    assert (config["architecture"], config["input_size"], config["removed_head"]) == (
        "resnet18",
        [3, 32, 32],
        "fc",
    )
    whole = torchvision.models.resnet18()
    missing, unexpected = whole.load_state_dict(
        safetensors.torch.load_file(out / "model.safetensors"), strict=False
    )
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


@pytest.mark.parametrize(
    "name", ["resnet18", "test_convnext", "test_efficientnet", "test_vit", "regnetx_002"]
)
def test_timm_gets_the_very_folder(name: str, tmp_path: Path) -> None:
    """For timm the folder is copied byte by byte after timm's network gave equal outputs."""
    folder = folder_of(name, tmp_path / "backbone")
    done = export(folder, tmp_path / "out", ExportOptions(to="timm"))
    assert done.difference == 0 and done.largest > 0
    assert sorted(p.name for p in done.out.iterdir()) == ["config.json", "model.safetensors"]
    assert all((done.out / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())
    assert eval(done.usage, {"timm": timm}).state_dict().keys()


def test_an_export_that_differs_is_none(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export with one changed weight fails the comparison of outputs and leaves no folder."""
    real = stage.torchvision_network

    def changed(backbone: Backbone) -> tuple[torch.nn.Module, str]:
        network, head = real(backbone)
        network.register_forward_hook(lambda module, inputs, output: output * 1.001)
        return network, head

    monkeypatch.setattr(stage, "torchvision_network", changed)
    with pytest.raises(
        ExportError,
        match=r"torchvision's resnet18 gives other outputs than the original: they differ",
    ):
        export(resnet, tmp_path / "out", ExportOptions(to="torchvision"))
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_comparable_differ_by_infinity() -> None:
    """Outputs of other shapes, or that are not finite, differ by infinity."""
    plain = torch.nn.Flatten()
    nan = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Threshold(1e9, float("nan")))
    assert compare(plain, torch.nn.Identity(), (4, 4))[0] == float("inf")
    assert compare(nan, nan, (4, 4))[0] == float("inf")
    assert compare(plain, plain, (4, 4))[0] == 0


def test_what_cannot_be_exported_says_why(resnet: Path, tmp_path: Path) -> None:
    """An export that cannot be made is refused in one line with the reason."""
    other = folder_of("test_resnet", tmp_path / "backbone")
    result = run("export", other, "--to", "torchvision", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert (
        "no network with the weights' names of test_resnet; expected one of resnet18, resnet34, "
        "resnet50" in (result.output.replace("\n", " "))
    )
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    with pytest.raises(
        ConfigError,
        match=r"run: expected a run of dtcache train, or a backbone folder with config",
    ):
        export(unfinished, tmp_path / "out", ExportOptions())
    (unfinished / "run.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"run: the run has no backbone yet; run its dtcache train command again"
    ):
        export(unfinished, tmp_path / "out", ExportOptions())
    with pytest.raises(
        ConfigError, match=r"`out` .*run: expected a new folder, got one that exists"
    ):
        export(resnet, unfinished, ExportOptions())
    with pytest.raises(ConfigError, match=r"`to` onnx: expected one of timm, torchvision"):
        ExportOptions(to="onnx")


def test_other_weights_under_a_known_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose keys or shapes differ from torchvision's is refused, even if listed."""
    monkeypatch.setitem(HEADS, "mobilenet_v2", "classifier")
    backbone = make_backbone("test_resnet", init=None, seed=0)
    backbone.name = "mobilenet_v2"
    with pytest.raises(
        ConfigError,
        match=r"the weights of mobilenet_v2 differ from those of torchvision .*; use `to=",
    ):
        torchvision_network(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(HEADS) - {"resnet18"}))
def test_every_listed_network_is_torchvisions(name: str, tmp_path: Path) -> None:
    """Every architecture listed for --to torchvision gives the original's outputs there."""
    done = export(
        folder_of(name, tmp_path / "b"), tmp_path / "out", ExportOptions(to="torchvision")
    )
    assert done.difference <= 1e-5 * done.largest
    assert done.largest > 0


def test_a_configuration_that_timm_cannot_open_is_one_line(resnet: Path, tmp_path: Path) -> None:
    """A field that timm does not know is refused with the file's name, and nothing is written."""
    folder = shutil.copytree(resnet / "backbone", tmp_path / "backbone")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["nosuch"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    result = run("export", folder, "--to", "timm", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert f"Error: {folder}/config.json: timm cannot open the backbone (" in result.output
    assert "nosuch" in result.output and len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def _hostile_weights(folder: Path) -> None:
    """Make the file of weights one of another network, with a name that controls a terminal."""
    weights = {"\x1b]0;title\x07": torch.zeros(3)}
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def _edit(**changed: object) -> Callable[[Path], None]:
    """Return a function that changes fields of a backbone's configuration."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"] |= {k: v for k, v in changed.items() if k == "mean"}
        config |= {k: v for k, v in changed.items() if k != "mean"}
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    "change",
    [
        _hostile_weights,
        _edit(architecture="\x1b]0;title\x07"),
        _edit(model_args={"\x1b[2J": 1}),
        _edit(model_args={"layers": [1 << 14] * 4}),
        _edit(mean=[10**400] * 3),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4096),
        lambda folder: (folder / "config.json").write_bytes(b"[" * 100_000),
    ],
    ids=["weights", "architecture", "argument", "layers", "mean", "header", "nested"],
)
def test_a_hostile_backbone_is_one_line(
    change: Callable[[Path], object], resnet: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """Export and evaluation refuse a doctored backbone in one line without control characters."""
    run_folder = Path(shutil.copytree(resnet, tmp_path / "run"))
    change(run_folder / "backbone")
    images = ("--train", scene_folder, "--test", scene_folder)
    for command in (
        ("export", run_folder, "--out", tmp_path / "out"),
        ("export", run_folder, "--to", "torchvision", "--out", tmp_path / "out"),
        ("evaluate", run_folder / "backbone", *images, "--device", "cpu", "--size", "32"),
    ):
        result = run(*command)
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"Error: {run_folder / 'backbone'}") and "\x1b" not in result.output
    assert not (tmp_path / "out").exists()
