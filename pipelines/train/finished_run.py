"""A finished run that another run extends: read from its folder, and compared by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dtcache.errors import CacheDamagedError, ConfigError
from dtcache.hashing import file_sha256
from dtcache.json_files import read_json
from dtcache.options import TrainOptions
from dtcache.recipe import Json
from pipelines.runs.checkpoint import load_checkpoint, require_number
from pipelines.runs.folder import MAX_BYTES, RUN, SUMMARY, read_summary

MUST_AGREE = (
    *("student", "student_size", "init", "regressor", "fpn_width", "labels"),
    *("optimizer", "weight_decay"),
)
"""Options that the weights and the optimizer's moments depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """A run of `dtcache train` whose steps have all been taken."""

    root: Path
    options: Json
    """The contents of its run.json."""
    fingerprint: str
    """SHA-256 of its run.json."""
    own_steps: int
    epochs: int
    """Epochs of the run, and of the runs that it extends."""
    steps: int
    """Steps of the run, and of the runs that it extends."""

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read the folder of a run.

        Raises ConfigError if no finished run on a cache is there, and CacheDamagedError if its
        files are not readable.
        """
        options = _read_options(root)
        if "student" not in options or "epochs" not in options:
            raise ConfigError(f"`extend` {root}: expected a run of dtcache train, got another run")
        if options.get("teacher") is not None:
            raise ConfigError(
                f"`extend` {root}: expected a run that was trained on a cache, got one with a "
                "teacher in the loop; start from its backbone with `init`"
            )
        if not (root / SUMMARY).is_file():
            raise ConfigError(
                f"`extend` {root}: expected a finished run, got one that has steps left; run its "
                "dtcache train command again to finish it"
            )
        own_steps = int(read_summary(root)["steps"])
        before = {"extended_epochs": 0, "extended_steps": 0, **options}
        try:
            for name in ("epochs", "extended_epochs", "extended_steps"):
                require_number(name, before[name], kind=int)
        except ValueError as error:
            raise CacheDamagedError(
                f"`extend` {root}: its {RUN} is not as dtcache train writes it ({error}); pass "
                "another run"
            ) from error
        return cls(
            root=root,
            options=options,
            fingerprint=file_sha256(root / RUN),
            own_steps=own_steps,
            epochs=before["epochs"] + before["extended_epochs"],
            steps=own_steps + before["extended_steps"],
        )

    @property
    def identity(self) -> Json:
        """The fields that a run extending this one adds to its run.json."""
        return {
            "extended_run": self.fingerprint,
            "extended_epochs": self.epochs,
            "extended_steps": self.steps,
        }

    def require_same_student(self, options: TrainOptions) -> None:
        """Raise ConfigError, naming the option, if this run has another student or optimizer."""
        for name in MUST_AGREE:
            self._require(name, self.options.get(name), getattr(options, name))
        has_average = self.options.get("ema_decay") is not None
        if has_average != (options.ema_decay is not None):
            self._require("ema_decay", self.options.get("ema_decay"), options.ema_decay)

    def checkpoint(self) -> dict[str, Any]:
        """Return the run's checkpoint, with its tensors on the CPU.

        Raises ConfigError if the run has none of its last step, and CacheDamagedError if the file
        cannot be read.
        """
        state = load_checkpoint(self.root)
        if state is None or state.get("step") != self.own_steps:
            raise ConfigError(
                f"`extend` {self.root}: expected the checkpoint of its last step, "
                f"{self.own_steps}, with the moments of the optimizer, got "
                f"{'none' if state is None else 'one of another step'}; start from its backbone "
                "with `init`"
            )
        return state

    def require_same_source(self, expected: Json, got: Json) -> None:
        """Raise ConfigError if the records of two sources differ: targets, teacher or classes.

        `expected` is the record in this run's checkpoint, `got` that of the data to train on.
        Raises CacheDamagedError if the checkpoint has no record.
        """
        before = expected.get("targets")
        if not isinstance(before, dict) or not before:
            raise CacheDamagedError(
                f"`extend` {self.root}: its checkpoint does not record the targets that it was "
                "trained on; start from the run's backbone with `init`"
            )
        targets = got["targets"]
        if list(before) != list(targets):
            raise ConfigError(
                f"`extend` {self.root}: expected its targets, "
                f"{', '.join(map(str, before))}, got {', '.join(targets)}; pass a cache that has "
                "them, and its `taps` and `timestep`"
            )
        for name, shape in targets.items():
            if before[name] != shape:
                raise ConfigError(
                    f"`extend` {self.root}: expected maps of {name} with (channels, height, width) "
                    f"{before[name]}, got {shape}; pass a cache with such maps"
                )
        if expected.get("teacher") != got["teacher"]:
            raise ConfigError(
                f"`extend` {self.root}: expected a cache of the same teacher, got one of other "
                "weights; start from the run's backbone with `init`"
            )
        if expected.get("classes") != got["classes"]:
            raise ConfigError(
                f"`extend` {self.root}: expected `labels` of the same classes in the same order; "
                "start from the run's backbone with `init`"
            )

    def _require(self, name: str, expected: object, got: object) -> None:
        if expected != got:
            raise ConfigError(
                f"`extend` {self.root}: expected its `{name}`, {expected!r}, got {got!r}; pass the "
                "options of that run, which its config.toml has"
            )


def _read_options(root: Path) -> Json:
    """Return a run's run.json.

    Raises ConfigError if it is missing, and CacheDamagedError if it is not readable.
    """
    try:
        return read_json(root / RUN, MAX_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(
            f"`extend` {root}: expected the folder of a run of dtcache train, which has {RUN}; "
            "pass another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise CacheDamagedError(
            f"`extend` {root / RUN}: not readable as JSON ({error}); pass another run"
        ) from error
