"""The public surface of dtcache: its names, the verbs as functions, README's training loop."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from store.builders import FINE, tiny_plan

import dtcache
from dtcache.device import resolve_compute
from dtcache.errors import CacheNotFoundError, ConfigError
from dtcache.recipe import ViewSpec
from dtcache.teacher import TeacherSettings, prepare_teacher
from dtcache.teacher import load_teacher as load_network

ROOT = Path(__file__).resolve().parents[1]
QUANTITY = re.compile(
    r"\([A-Z]\w*(, [A-Z0-9]\w*)*\)|fp32|uint8|scalar|seconds|bytes|samples|steps|channels|features"
)
"""A shape, a dtype or a unit in a docstring."""


@pytest.mark.parametrize("name", [name for name in dtcache.__all__ if name != "__version__"])
def test_a_public_name_is_documented(name: str) -> None:
    """Every public function and class says what it takes: a docstring with shapes or units.

    Every public method of a public class has a docstring too.
    """
    public = getattr(dtcache, name)
    methods = [
        value
        for key, value in vars(public).items()
        if inspect.isclass(public)
        and not key.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property))
    ]
    texts = [inspect.getdoc(public), *map(inspect.getdoc, methods)]
    assert all(texts)
    source = inspect.getsource(public)  # attributes of a class are described beside it
    assert name in dir(dtcache)
    described = source if inspect.isclass(public) else str(texts[0])
    assert name == "DtcacheError" or QUANTITY.search(described)


def test_an_unknown_name() -> None:
    """A name that dtcache does not have raises AttributeError, as any module does."""
    with pytest.raises(AttributeError, match="module 'dtcache' has no attribute 'opne'"):
        dtcache.opne  # type: ignore[attr-defined]  # noqa: B018


def readme_loop() -> str:
    """Return README's training loop."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (loop,) = [block for block in blocks if "distillation_step" in block]
    return loop


def test_the_loop_of_the_readme_trains(
    tiny_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """README's fifteen lines run as they stand, on a smaller student and batch, and learn."""
    loop = readme_loop()
    assert len([line for line in loop.splitlines() if line]) <= 15
    for old, new in (
        ("photos.cache", str(tiny_cache)),
        ('"resnet50"', '"resnet10t"'),
        ("batch_size=256", "batch_size=4"),
    ):
        assert old in loop
        loop = loop.replace(old, new)
    torch.manual_seed(0)
    exec(compile(loop, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_a_step_wants_the_arrays_of_its_student(tiny_cache: Path) -> None:
    """distillation_step names a missing or misshapen prediction; MSE is to whitened features."""
    cache = dtcache.open(tiny_cache)
    batch = next(iter(cache.loader(batch_size=2, names=[FINE])))
    losses = dtcache.distillation_step(lambda images: batch.whitened, batch)
    assert float(losses["loss"]) == float(losses[f"mse/{FINE}"]) == 0
    with pytest.raises(ConfigError, match=rf"^`student`: expected a prediction {FINE} of .*None"):
        dtcache.distillation_step(lambda images: {}, batch)
    with pytest.raises(ConfigError, match=r"^`batch`: expected targets; make the loader with"):
        dtcache.distillation_step(
            lambda images: {}, next(iter(cache.loader(batch_size=2, names=[])))
        )


def test_inspect_from_python(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """dtcache.inspect returns the report and prints nothing; misuse names the field."""
    (report,) = dtcache.inspect(tiny_cache).reports
    assert report["kind"] == "cache"
    for call, message in (
        (lambda: dtcache.inspect(), r"^`roots`: expected one or more caches"),
        (lambda: dtcache.inspect(3), r"^`roots` 3: expected a path, got int"),
        (lambda: dtcache.inspect(tiny_cache, stat=True), r"^`stat`: expected a field of Inspect"),
        (
            lambda: dtcache.inspect(tiny_cache, options=dtcache.InspectOptions(), stats=True),
            r"^`stats`: expected `options` or keywords, got both",
        ),
        (
            lambda: dtcache.train(tiny_cache, "out", dtcache.InspectOptions()),
            r"^`options`: expected TrainOptions, got InspectOptions",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(CacheNotFoundError):
        dtcache.inspect("nowhere")
    assert capsys.readouterr() == ("", "")


def test_the_examples_of_the_reference_run(
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The examples of the reference run, use every public name, and agree with one another.

    Extraction and training report progress to the callback, and print nothing.
    """
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    used = set(re.findall(r"\bdtcache\.(\w+)", code))
    assert used == set(dtcache.__all__)
    (tmp_path / "photos").symlink_to(scene_folder)
    (tmp_path / "teacher").symlink_to(teacher_dir)
    monkeypatch.chdir(tmp_path)
    example: dict[str, Any] = {}
    exec(compile(code, "python.md", "exec"), example)
    assert capsys.readouterr() == ("", "")
    assert example["extracted"].num_done == len(example["cache"]) == 40
    done = {event.title: event for event in example["events"]}
    assert (done["extract"].done, done["extract"].total) == (40, 40)
    assert done["train resnet10t"].done == example["trained"].steps > 0
    assert len(example["reports"]) == 1
    losses = example["losses"]
    name = example["name"]
    assert losses[f"mse/{name}"].item() == pytest.approx(example["mse"].item(), rel=1e-4)
    assert losses[f"at/{name}"].item() == pytest.approx(example["at"].item(), rel=1e-4)
    shapes = {name: (2, *shape) for name, shape in example["shapes"].items()}
    for maps in (example["maps"], example["features"]):
        assert {name: tuple(x.shape) for name, x in maps.items()} == shapes


def test_a_teacher_in_memory(teacher_dir: Path) -> None:
    """load_teacher(...).features equals the passes of an extraction, for equal seed and keys."""
    images = torch.from_numpy(tiny_plan().pixels[:2].repeat(4, axis=2).repeat(4, axis=3))
    teacher = dtcache.load_teacher(str(teacher_dir), device="cpu", precision="fp32")
    features = teacher.features(images, timestep=50, seed=3, keys=["a", "b"])
    network = prepare_teacher(
        load_network(str(teacher_dir)),
        TeacherSettings(view=ViewSpec(height=32, width=32), timesteps=(50,), batch_size=2),
        resolve_compute("cpu", "fp32"),
    )
    inputs = [
        network.input(image.numpy(), key, False, seed=3, draws=(0,))
        for image, key in zip(images, "ab", strict=True)
    ]
    (wanted,) = network.features(network.batch(inputs))
    assert list(features) == list(wanted)
    for name, maps in features.items():
        assert torch.equal(maps, wanted[name]) and not maps.requires_grad
    for wrong, message in (
        ({"images": images.float()}, r"^`images`: expected a uint8 tensor"),
        ({"images": images[0]}, r"^`images`: expected \(B, 3, H, W\), got \(3, 32, 32\)"),
        ({"keys": ["a"]}, r"^`keys`: expected a list of 2 keys, one per image"),
        ({"timestep": 5.0}, r"^`timestep` 5\.0: expected an integer"),
        ({"timestep": 5000}, r"^`timestep` 5000: this teacher was trained with steps 0 to 999"),
    ):
        with pytest.raises(ConfigError, match=message):
            teacher.features(**{"images": images, "timestep": 50, **wrong})  # type: ignore[arg-type]
