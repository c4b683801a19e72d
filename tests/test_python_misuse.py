"""Misuses of the Python interface: each raises one of dtcache's errors, which names the field."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from store.builders import COARSE, FAILED_ROW, FINE, ROWS, tiny_plan

import dtcache
from dtcache.recipe import ViewSpec


@dataclass(frozen=True)
class Surface:
    """Something right of every kind, to be used wrongly."""

    root: Path
    """A sealed cache."""
    images: Path
    teacher: str
    out: Path
    """A path that must stay free."""
    cache: Any
    """The open cache; `Any`, because the misuses are of wrong types."""
    loader: Any
    batch: Any
    memory: Any
    """The teacher in memory."""
    dt: Any = dtcache

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) by array."""
        return {FINE: (4, 4, 4), COARSE: (6, 2, 2)}

    def student(self, **changes: Any) -> Any:
        """Build a student with some arguments changed."""
        arguments = {
            "student": "resnet10t",
            "targets": self.shapes,
            "view": ViewSpec(height=32, width=32),
            "width": 8,
        }
        return self.dt.build_student(**(arguments | changes))

    def regressor(self, **changes: Any) -> Any:
        """Build a regressor with some arguments changed."""
        arguments: dict[str, Any] = {
            "channels": (8, 16),
            "grids": ((4, 4), (2, 2)),
            "targets": self.shapes,
            "width": 8,
        }
        return self.dt.FeatureRegressor(**(arguments | changes))

    def extract(self, **changes: Any) -> Any:
        """Extract with some arguments changed."""
        arguments = {"images": self.images, "out": self.out, "teacher": self.teacher}
        return self.dt.extract(**(arguments | changes))

    def train(self, **changes: Any) -> Any:
        """Train with some arguments changed."""
        arguments = {"where": self.root, "out": self.out, "student": "resnet10t", "batch_size": 4}
        return self.dt.train(**(arguments | changes))

    def features(self, **changes: Any) -> Any:
        """Compute features with some arguments changed."""
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        return self.memory.features(**({"images": images, "timestep": 50} | changes))

    def step(self, **changes: Any) -> Any:
        """Take a distillation step with some arguments changed."""
        arguments = {"student": lambda images: self.batch.whitened, "batch": self.batch}
        return self.dt.distillation_step(**(arguments | changes))

    def objective(self, **changes: Any) -> Any:
        """Make the objective of options with some arguments changed."""
        codec = self.cache.recipe["codec"]
        arguments = {
            "options": dtcache.TrainOptions(),
            "fit": self.cache.fit,
            "codec": codec,
            "shapes": self.shapes,
        }
        return self.dt.make_objective(**(arguments | changes))


MAPS = torch.zeros(2, 4, 4, 4)
FAILED = f"class{FAILED_ROW % 3}/image{FAILED_ROW:02}.png"
MISUSES: list[tuple[str, Callable[[Surface], object]]] = [
    # The field that the error names, and the misuse.
    ("`path` 3", lambda s: s.dt.open(3)),
    ("`path` None", lambda s: s.dt.open(None)),
    ("nowhere", lambda s: s.dt.open("nowhere")),
    ("no cache|not a cache", lambda s: s.dt.open(s.images)),
    ("`images` 3", lambda s: s.dt.open(s.root, images=3)),
    ("`images`", lambda s: s.dt.open(s.root, images=s.images)),
    # Samples.
    ("`index` 0.5", lambda s: s.cache[0.5]),
    ("`index` None", lambda s: s.cache[None]),
    (r"`index` \(0, 1\)", lambda s: s.cache[0, 1]),
    ("index 99", lambda s: s.cache[99]),
    ("key 'x'", lambda s: s.cache["x"]),
    (FAILED, lambda s: s.cache[FAILED]),
    ("`index` slice", lambda s: s.cache[0.5:]),
    ("`index` slice", lambda s: s.cache[::0]),
    ("`index` 'a'", lambda s: s.cache.__getitems__(["a"])),
    ("`indices` 3", lambda s: s.cache.__getitems__(3)),
    ("`keys` 'x'", lambda s: s.cache.features("x")),
    ("`keys` 3", lambda s: s.cache.features(3)),
    ("`keys` 3", lambda s: s.cache.features([3])),
    ("key 'x'", lambda s: s.cache.features(["x"])),
    ("`rows` 3", lambda s: s.cache.images(3)),
    (r"`rows` 10", lambda s: s.cache.images([ROWS])),
    ("`rows` -1", lambda s: s.cache.images([-1])),
    ("`rows` 'a'", lambda s: s.cache.images(["a"])),
    (FAILED, lambda s: s.cache.images([FAILED_ROW])),
    ("`name` 'x'", lambda s: s.cache.shape("x")),
    ("`name` 3", lambda s: s.cache.shape(3)),
    ("`names` 'x'", lambda s: s.cache.decoder(["x"])),
    (f"`names` '{FINE}'", lambda s: s.cache.decoder(FINE)),
    ("`names` 3", lambda s: s.cache.decoder(3)),
    ("x", lambda s: s.cache.stack("x")),
    ("`tap` 3", lambda s: s.cache.stack(3)),
    ("`timestep` '150'", lambda s: s.cache.stack("stride2", timestep="150")),
    # The loader and its batches.
    ("`batch_size` '4'", lambda s: s.cache.loader(batch_size="4")),
    ("`batch_size` 0", lambda s: s.cache.loader(batch_size=0)),
    ("`names` 3", lambda s: s.cache.loader(batch_size=2, names=3)),
    (r"`names` 3", lambda s: s.cache.loader(batch_size=2, names=[3])),
    ("`whitened` 'no'", lambda s: s.cache.loader(batch_size=2, whitened="no")),
    ("`drop_last` 1", lambda s: s.cache.loader(batch_size=2, drop_last=1)),
    ("`pin_memory` 'x'", lambda s: s.cache.loader(batch_size=2, pin_memory="x")),
    ("`shuffle` None", lambda s: s.cache.loader(batch_size=2, shuffle=None)),
    (r"`shuffle` \['full'\]", lambda s: s.cache.loader(batch_size=2, shuffle=["full"])),
    ("`seed` 1.5", lambda s: s.cache.loader(batch_size=2, seed=1.5)),
    ("`epoch` -1", lambda s: s.cache.loader(batch_size=2, epoch=-1)),
    ("`threads` None", lambda s: s.cache.loader(batch_size=2, threads=None)),
    ("`device` 'gpu'", lambda s: s.cache.loader(batch_size=2, device="gpu")),
    ("`rank` 'a'", lambda s: s.cache.loader(batch_size=2, rank="a", world_size=2)),
    ("`epoch` 'a'", lambda s: s.loader.set_epoch("a")),
    ("`state`", lambda s: s.loader.load_state_dict("a")),
    ("`device` 'gpu'", lambda s: s.batch.to("gpu")),
    ("`device` None", lambda s: s.batch.to(None)),
    # Losses.
    ("`student` None", lambda s: s.step(student=None)),
    ("`student`", lambda s: s.step(student=lambda images: MAPS)),
    ("`student`", lambda s: s.step(student=lambda images: {FINE: MAPS})),
    ("`student`", lambda s: s.step(student=lambda images: {FINE: 3, COARSE: 3})),
    ("`batch` 3", lambda s: s.step(batch=3)),
    ("`objective` 'mse'", lambda s: s.step(objective="mse")),
    (f"`objective`.*{FINE}", lambda s: s.step(objective=s.dt.Objective({}, {}))),
    ("`mse` 3", lambda s: s.dt.Objective(3, {})),
    ("`mse` .*'1'", lambda s: s.dt.Objective({FINE: "1"}, {})),
    ("`at` .*-1", lambda s: s.dt.Objective({}, {FINE: -1})),
    ("`feature_weight` 'a'", lambda s: s.dt.Objective({FINE: 1}, {}, feature_weight="a")),
    ("`targets` 3", lambda s: s.dt.Objective({FINE: 1}, {})({}, 3)),
    (
        f"`predicted`.*{FINE}",
        lambda s: s.dt.Objective({FINE: 1}, {})(
            {}, s.dt.Targets(whitened={FINE: MAPS}, raw={FINE: MAPS})
        ),
    ),
    ("`whitened` 3", lambda s: s.dt.Targets(whitened=3, raw={})),
    ("`raw`", lambda s: s.dt.Targets(whitened={FINE: MAPS}, raw={})),
    ("`labels` 3", lambda s: s.dt.Targets(whitened={}, raw={}, labels=3)),
    ("`predicted_BCHW` 3", lambda s: s.dt.mse_loss(3, MAPS)),
    ("`whitened_BCHW`", lambda s: s.dt.mse_loss(MAPS, MAPS[:1])),
    ("`raw_BCHW`", lambda s: s.dt.at_loss(MAPS, MAPS[:, :, :2])),
    ("`raw_BCHW` None", lambda s: s.dt.at_loss(MAPS, None)),
    ("`target_BKHW`", lambda s: s.dt.label_loss(MAPS, MAPS[:, :1])),
    ("`predicted_BKHW`", lambda s: s.dt.label_loss(MAPS[0], MAPS[0])),
    ("`options` None", lambda s: s.objective(options=None)),
    ("`shapes` 3", lambda s: s.objective(shapes=3)),
    ("`shapes`.*x", lambda s: s.objective(shapes={"x": (4, 4, 4)})),
    ("`fit` 3", lambda s: s.objective(fit=3)),
    (
        "`codec`",
        lambda s: s.objective(options=dtcache.TrainOptions(noise_weighting=True), codec={}),
    ),
    # Students.
    ("nosuch", lambda s: s.student(student="nosuch")),
    ("`student` 3", lambda s: s.student(student=3)),
    ("`targets`", lambda s: s.student(targets={})),
    ("`targets`", lambda s: s.student(targets=3)),
    ("`targets`.*x", lambda s: s.student(targets={"x": 3})),
    ("`targets`.*x", lambda s: s.student(targets={"x": (4, 0, 4)})),
    ("`view` 32", lambda s: s.student(view=32)),
    ("`size` '32'", lambda s: s.student(size="32")),
    (r"`size` \(32,\)", lambda s: s.student(size=(32,))),
    (r"`size` \(0, 32\)", lambda s: s.student(size=(0, 32))),
    ("`width` 0", lambda s: s.student(width=0)),
    ("`width` 1.5", lambda s: s.student(width=1.5)),
    ("nowhere", lambda s: s.student(init="nowhere")),
    ("`init` 3", lambda s: s.student(init=3)),
    ("`seed` 'a'", lambda s: s.student(seed="a")),
    ("`regressor` 'x'", lambda s: s.student(regressor="x")),
    ("`mean` 3", lambda s: s.student(student=torch.nn.Identity(), mean=3)),
    ("`std`", lambda s: s.student(student=torch.nn.Identity(), std=(0, 0, 0))),
    ("`regressor` 'x'", lambda s: s.regressor(kind="x")),
    (r"`width` -1", lambda s: s.regressor(width=-1)),
    ("`targets`", lambda s: s.regressor(targets={})),
    ("`grids`", lambda s: s.regressor(grids=((4, 4),))),
    ("`channels`", lambda s: s.regressor(channels=())),
    # Teachers.
    ("`where` 3", lambda s: s.dt.load_teacher(3)),
    ("nowhere", lambda s: s.dt.load_teacher("nowhere")),
    ("`device` gpu", lambda s: s.dt.load_teacher(s.teacher, device="gpu")),
    ("`device` 3: expected a str", lambda s: s.dt.load_teacher(s.teacher, device=3)),
    ("`precision` int8", lambda s: s.dt.load_teacher(s.teacher, precision="int8")),
    ("`prompt`", lambda s: s.dt.load_teacher(s.teacher, prompt="a cat")),
    ("`prompt` 3", lambda s: s.dt.load_teacher(s.teacher, prompt=3)),
    ("`images`", lambda s: s.features(images=MAPS)),
    ("`timestep` '50'", lambda s: s.features(timestep="50")),
    ("`timestep` 5000", lambda s: s.features(timestep=5000)),
    ("`timestep` -1", lambda s: s.features(timestep=-1)),
    ("`taps` '8'", lambda s: s.features(taps="8")),
    ("`taps` .*3", lambda s: s.features(taps=[3])),
    ("`taps` .*nosuch", lambda s: s.features(taps=["nosuch"])),
    (r"`taps`", lambda s: s.features(taps=[])),
    ("`seed` -1", lambda s: s.features(seed=-1)),
    ("`seed` 'a'", lambda s: s.features(seed="a")),
    (r"`keys`", lambda s: s.features(keys=[1, 2])),
    (r"`keys`", lambda s: s.features(keys=3)),
    ("`loaded` 3", lambda s: s.dt.ImageTeacher(3, "cpu", "fp32")),
    # The verbs.
    ("`images` 3", lambda s: s.extract(images=3)),
    ("nowhere", lambda s: s.extract(images="nowhere")),
    ("`out` None", lambda s: s.extract(out=None)),
    ("`teacher`", lambda s: s.dt.extract(s.images, s.out)),
    ("`teacher` 3", lambda s: s.extract(teacher=3)),
    ("`timestep` 'a'", lambda s: s.extract(timestep="a")),
    ("`timestep` 5000", lambda s: s.extract(timestep=5000)),
    ("`timestep`", lambda s: s.extract(timestep=())),
    ("`batch_size` '8'", lambda s: s.extract(batch_size="8")),
    ("`batch_size` 0", lambda s: s.extract(batch_size=0)),
    ("`flip` 1", lambda s: s.extract(flip=1)),
    ("`quality` best", lambda s: s.extract(quality="best")),
    ("`taps` 8", lambda s: s.extract(taps=8)),
    ("`nosuch`", lambda s: s.extract(nosuch=1)),
    ("`progress` 3", lambda s: s.extract(progress=3)),
    ("`options`.*int", lambda s: s.dt.extract(s.images, s.out, 3)),
    ("`where` 3", lambda s: s.train(where=3)),
    ("nowhere", lambda s: s.train(where="nowhere")),
    ("`student` 3", lambda s: s.train(student=3)),
    ("nosuch", lambda s: s.train(student="nosuch")),
    ("`epochs` 1.5", lambda s: s.train(epochs=1.5)),
    ("`epochs` True", lambda s: s.train(epochs=True)),
    ("`epochs` None", lambda s: s.train(epochs=None)),
    ("`lr` nan", lambda s: s.train(lr=float("nan"))),
    ("`lr` '1e-3'", lambda s: s.train(lr="1e-3")),
    ("`loss` x", lambda s: s.train(loss="x")),
    ("`progress` 'bar'", lambda s: s.train(progress="bar")),
    ("`learning_rate`", lambda s: s.train(learning_rate=1)),
    ("`roots`", lambda s: s.dt.inspect()),
    ("`roots` 3", lambda s: s.dt.inspect(3)),
    (r"`roots` \[", lambda s: s.dt.inspect([s.root])),
    ("`stats` 'yes'", lambda s: s.dt.inspect(s.root, stats="yes")),
    ("`report` 3", lambda s: s.dt.inspect(s.root, report=3)),
    ("`num_samples` 0", lambda s: s.dt.inspect(s.root, stats=True, num_samples=0)),
    ("`seed` -1", lambda s: s.dt.ExtractOptions(seed=-1)),
    ("`images` 3", lambda s: s.dt.TrainOptions(images=3)),
    ("`gallery` 1.5", lambda s: s.dt.InspectOptions(gallery=1.5)),
]


@pytest.fixture(scope="module")
def surface(
    tiny_cache: Path,
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Surface:
    """An open cache, a batch of it and a teacher in memory."""
    cache = dtcache.open(tiny_cache)
    loader = cache.loader(batch_size=2)
    return Surface(
        root=tiny_cache,
        images=scene_folder,
        teacher=str(teacher_dir),
        out=tmp_path_factory.mktemp("misuse") / "out",
        cache=cache,
        loader=loader,
        batch=next(iter(loader)),
        memory=dtcache.load_teacher(str(teacher_dir), device="cpu", precision="fp32"),
    )


@pytest.mark.parametrize(("named", "misuse"), MISUSES)
def test_a_misuse_raises_a_dtcache_error_that_names_the_field(
    surface: Surface, named: str, misuse: Callable[[Surface], object]
) -> None:
    """The error is one of dtcache's, names the field or the file, and nothing is begun."""
    with pytest.raises(dtcache.DtcacheError) as caught:
        misuse(surface)
    assert re.search(named, str(caught.value)), caught.value
    assert not surface.out.exists()


def test_the_misuses_are_of_every_public_callable() -> None:
    """There are more than 60 misuses."""
    assert len(MISUSES) >= 60
    assert tiny_plan().samples[FAILED_ROW].key == FAILED
