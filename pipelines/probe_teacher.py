"""A linear probe of every block of a teacher's decoder at several timesteps.

B images per batch, C channels, H rows, W columns.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.styled import Styled
from rich.table import Table
from torch import Tensor

from dtcache.atomic_files import disk_errors
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError
from dtcache.images import LoadedView
from dtcache.metrics.probes import C_GRID, at_edge, linear_predict
from dtcache.options import EvaluateOptions, TeacherShowOptions
from dtcache.options.teacher import PROBED_TIMESTEPS
from dtcache.process_settings import configure_process
from dtcache.recipe import Json, Sample, TapSpec, ViewSpec, tap_name
from dtcache.teacher import (
    LoadedTeacher,
    Teacher,
    TeacherSettings,
    load_teacher,
    prepare_teacher,
)
from pipelines.evaluate.image_split import EvaluatedImages
from pipelines.evaluate.labelled_images import split_labelled
from pipelines.evaluate.pooled_features import pooled_features
from pipelines.extract.teacher_classes import require_teacher_classes
from pipelines.make_teacher import view_size
from pipelines.terminal.output import say
from pipelines.terminal.progress import track


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScore:
    """The accuracy of the probe on one block at one timestep."""

    tap: str
    timestep: int
    linear_top1: float
    """Test images that the linear probe classifies correctly, per cent."""
    linear_c: float
    """Inverse strength of the probe's L2 penalty, chosen on training images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherProbe:
    """The accuracies of all blocks and timesteps, on the same images."""

    scores: tuple[BlockScore, ...]
    """Block by block in the order of the pass, timestep by timestep."""
    num_train: int
    num_test: int

    @property
    def best(self) -> BlockScore:
        """The score with the highest accuracy; of equal ones, the first."""
        return max(self.scores, key=lambda score: score.linear_top1)

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the best accuracy over the test images, in points."""
        share = self.best.linear_top1 / 100
        return 100 * math.sqrt(share * (1 - share) / self.num_test)

    def to_json(self) -> Json:
        """Return the probe as JSON values."""
        return {
            "num_train": self.num_train,
            "num_test": self.num_test,
            "standard_error": self.standard_error,
            "best": {"name": self.best.tap, "timestep": self.best.timestep},
            "scores": [
                {
                    "name": score.tap,
                    "timestep": score.timestep,
                    "linear_top1": score.linear_top1,
                    "linear_C": score.linear_c,
                    "linear_C_at_edge": at_edge(score.linear_c),
                }
                for score in self.scores
            ],
        }

    def to_table(self) -> Table:
        """Return a table with a row per block and a column per timestep; the best is bold."""
        table = Table(
            title=f"linear probe, top-1 %\n{self.num_train} training, {self.num_test} test images",
            caption=f"best: {self.best.tap} at t={self.best.timestep};\nstandard error "
            f"{self.standard_error:.1f} points",
            title_justify="left",
            caption_justify="left",
        )
        timesteps = list(dict.fromkeys(score.timestep for score in self.scores))
        table.add_column("block")
        for timestep in timesteps:
            table.add_column(f"t={timestep}", justify="right")
        for tap in dict.fromkeys(score.tap for score in self.scores):
            row = [score for score in self.scores if score.tap == tap]
            cells = (
                Styled(f"{score.linear_top1:.1f}", style="bold" if score is self.best else "")
                for score in row
            )
            table.add_row(tap, *cells)
        return table


class TeacherFeatures:
    """Spatial means of every block at every timestep, of noise draw 0 of images as they are."""

    def __init__(self, teacher: Teacher, seed: int) -> None:
        self.view = teacher.view
        self._teacher = teacher
        self._seed = seed

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Raise ImagesError if the teacher is conditioned on labels that the images lack."""
        for images in (train, test):
            keys = [images.source.keys[index] for index in images.indices]
            labels = images.source.labels
            self._teacher.require_labels(
                keys, None if labels is None else [labels[index] for index in images.indices]
            )
            require_teacher_classes(self._teacher, images.source)

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return means (B, C) by array, fp32."""
        inputs = [
            self._teacher.input(
                view.pixels_CHW, sample.key, False, seed=self._seed, draws=[0], label=sample.label
            )
            for view, sample in zip(batch, samples, strict=True)
            if view.pixels_CHW is not None
        ]
        (features,) = self._teacher.features(self._teacher.batch(inputs))
        return {name: x_BCHW.mean((2, 3)).cpu() for name, x_BCHW in features.items()}


def probe_teacher(where: str, options: TeacherShowOptions) -> TeacherProbe:
    """Probe every decoder block of a teacher at every timestep, on labelled images.

    The judge is that of `dtcache evaluate`: logistic regression on spatial means. Writes
    `options.plot` if it is set. Raises ConfigError without `probe`, TeacherError if the teacher
    cannot be loaded, ImagesError for images without labels, and DiskError.
    """
    if options.probe is None:
        raise ConfigError("`probe`: expected labelled images")
    if options.plot is not None and not options.plot.absolute().parent.is_dir():
        raise ConfigError(f"`plot` {options.plot}: expected a file in a folder that exists")
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    train, test = split_labelled(
        EvaluateOptions(
            train=options.probe,
            test=options.test,
            test_split=options.test_split,
            limit_train=options.limit,
            limit_test=options.limit,
            seed=options.seed,
            **asdict(options.reading),
        )
    )
    loaded = load_teacher(where)
    height, width = view_size(loaded, options.size)
    view = ViewSpec(height=height, width=width)
    taps = _taps_in_order(loaded, view)
    teacher = prepare_teacher(
        loaded,
        TeacherSettings(
            view=view,
            taps=tuple(tap.name for tap in taps),
            timesteps=_timesteps(loaded, options),
            batch_size=options.batch_size,
        ),
        compute,
    )
    extractor = TeacherFeatures(teacher, options.seed)
    extractor.prepare(train, test)
    train_features, train_labels = pooled_features(extractor, train, options.batch_size)
    test_features, test_labels = pooled_features(extractor, test, options.batch_size)
    scores = []
    timesteps = teacher.spec.timesteps
    with track("probe", len(taps) * len(timesteps)) as progress:
        for tap in taps:
            for timestep in timesteps:
                name = tap_name(timestep, tap.name)
                predicted, c = linear_predict(
                    train_features[name], train_labels, test_features[name]
                )
                correct = int((predicted == test_labels).sum())
                scores.append(
                    BlockScore(
                        tap=tap.name,
                        timestep=timestep,
                        linear_top1=100 * correct / len(test_labels),
                        linear_c=c,
                    )
                )
                progress.advance(1, name)
    edges = sum(at_edge(score.linear_c) for score in scores)
    if edges:
        say(
            f"{edges} of {len(scores)} linear probes chose a C at an edge of the grid of "
            f"{C_GRID[0]:g} to {C_GRID[-1]:g}; a value beyond may be better"
        )
    probe = TeacherProbe(
        scores=tuple(scores), num_train=len(train_labels), num_test=len(test_labels)
    )
    if options.plot is not None:
        plot_probe(probe, options.plot)
    return probe


def plot_probe(probe: TeacherProbe, path: Path) -> None:
    """Write a PNG with one line of accuracies per block, over the timesteps. Raises DiskError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    taps = list(dict.fromkeys(score.tap for score in probe.scores))
    timesteps = list(dict.fromkeys(score.timestep for score in probe.scores))
    for number, tap in enumerate(taps):
        axes.plot(
            range(len(timesteps)),
            [score.linear_top1 for score in probe.scores if score.tap == tap],
            marker=".",
            label=tap,
            color=_color(number / max(1, len(taps) - 1)),
        )
    axes.set(xlabel="timestep", ylabel="linear probe, top-1 %")
    axes.set_xticks(range(len(timesteps)), labels=list(map(str, timesteps)))
    axes.grid(alpha=0.3)
    axes.legend(title="block", loc="center left", bbox_to_anchor=(1, 0.5))
    with disk_errors(path):
        figure.savefig(path, dpi=120, format="png")


def _color(share: float) -> tuple[float, float, float, float]:
    """Return the colour of a block by its place in the pass, 0 to 1."""
    from matplotlib import colormaps

    red, green, blue, alpha = colormaps["viridis"](0.95 * share)
    return (red, green, blue, alpha)


def _taps_in_order(loaded: LoadedTeacher, view: ViewSpec) -> list[TapSpec]:
    """Return every tap of the decoder in the order of the pass."""
    geometry = (view.height, view.width, loaded.latent_stride)
    taps = loaded.denoiser.find_taps(*geometry) + loaded.denoiser.find_blocks(*geometry)
    # A tap without a layer ends its block.
    return sorted(taps, key=lambda tap: (tap.block, math.inf if tap.layer is None else tap.layer))


def _timesteps(loaded: LoadedTeacher, options: TeacherShowOptions) -> tuple[int, ...]:
    """Return the timesteps to probe at: of the default, those that the teacher has."""
    if options.timestep != PROBED_TIMESTEPS:
        return options.timestep
    return tuple(t for t in PROBED_TIMESTEPS if t < len(loaded.alpha_bars)) or (0,)
