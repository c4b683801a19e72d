"""The command line has help with examples, bounded options and one-line errors."""

import importlib
import json
import re
import typing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.interrupts import interrupt

from cli import main
from dtcache.errors import ConfigError
from dtcache.options import (
    EvaluateOptions,
    ExtractOptions,
    LabelFitOptions,
    TeachOptions,
    TrainOptions,
    parse_ints,
    parse_size,
    parse_taps,
)


def verbs(group: click.Group, *above: str) -> dict[tuple[str, ...], click.Command]:
    """Return every command by the words that call it, groups and subcommands alike."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        found[(*above, name)] = command
        if isinstance(command, click.Group):
            found |= verbs(command, *above, name)
    return found


VERBS = verbs(main)


@pytest.mark.parametrize("words", sorted(VERBS), ids=" ".join)
def test_every_verb_has_help_with_an_example(words: tuple[str, ...]) -> None:
    """--help has a summary and an example per verb, and describes every option."""
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    assert f"dtcache {' '.join(words)}" in result.output.split("Example:")[1]
    assert all(option.help for option in VERBS[words].params if isinstance(option, click.Option))


def test_the_verbs_are_the_documented_ones() -> None:
    """README names every verb."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    stages = {
        "scenes",
        "teacher",
        "extract",
        "label",
        "train",
        "sweep",
        "evaluate",
        "export",
    }
    assert set(main.commands) == stages | {"inspect", "verify", "demo", "doctor", "completion"}
    assert all(re.search(rf"dtcache {verb}\b(?!-)", readme) for verb in main.commands)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainOptions(batch_size=1), r"`batch_size` 1: expected at least 2"),
        (lambda: TrainOptions(epochs=0), r"`epochs` 0: expected at least 1"),
        (lambda: TrainOptions(limit=-5), r"`limit` -5: expected at least 1"),
        (lambda: TrainOptions(log_every=0), r"`log_every` 0: expected at least 1"),
        (lambda: TrainOptions(num_workers=0), r"`num_workers` 0: expected at least 1"),
        (lambda: TrainOptions(optimizer="sgd"), r"`optimizer` sgd: expected one of adamw, lamb"),
        (lambda: TeachOptions(save_every=0), r"`save_every` 0: expected at least 1"),
        (lambda: TeachOptions(steps=-1), r"`steps` -1: expected at least 0"),
        (
            lambda: ExtractOptions(bytes_per_image=float("nan")),
            r"`bytes_per_image` nan: expected at least 1",
        ),
        (
            lambda: ExtractOptions(bytes_per_image=0.0),
            r"`bytes_per_image` 0.0: expected at least 1",
        ),
        (lambda: ExtractOptions(shard_rows=0), r"`shard_rows` 0: expected at least 1"),
        (
            lambda: EvaluateOptions(train=Path("x"), k=0),
            r"`k` 0: expected at least 1",
        ),
        (lambda: TrainOptions(lr=float("nan")), r"`lr` nan: expected at least 1e-12"),
        (lambda: TrainOptions(lr=0.0), r"`lr` 0.0: expected at least 1e-12"),
        (lambda: TeachOptions(lr=-1.0), r"`lr` -1.0: expected at least 1e-12"),
        (lambda: TeachOptions(lr=float("inf")), r"`lr` inf: expected a finite number"),
    ],
)
def test_options_have_bounds(make: object, message: str) -> None:
    """Out-of-bounds values are refused with the name of the field."""
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "options", [ExtractOptions, LabelFitOptions, TeachOptions, TrainOptions, EvaluateOptions]
)
def test_no_option_is_infinite_or_no_number(options: type) -> None:
    """Every numeric option refuses nan and inf."""
    hints = typing.get_type_hints(options)
    names = [name for name, hint in hints.items() if float in (hint, *typing.get_args(hint))]
    assert names
    for name in names:
        for value in ("nan", "inf"):
            with pytest.raises(ConfigError, match=f"`{name}` {value}: expected"):
                options(**{name: float(value)})


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("128x256", (128, 256)), ("8X4", (8, 4))]
)
def test_sizes_are_height_by_width(text: str, size: tuple[int, int]) -> None:
    """H is a square, and HxW is height by width."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "64x", "64x64x3", "-1", "6.4", "²", "999999"])
def test_other_sizes_are_refused(text: str) -> None:
    """Any other size is refused with the name of the field."""
    with pytest.raises(
        ConfigError, match=r"`student_size` .*: expected H or HxW in pixels, such as 256 or 128x256"
    ):
        parse_size(text, "student_size")


@pytest.mark.parametrize("text", ["", "4,", "a", "0", "4;8", "²"])
def test_other_lists_are_refused(text: str) -> None:
    """A list of strides must be positive integers separated by commas."""
    assert parse_ints("4, 8", "taps") == (4, 8)
    with pytest.raises(
        ConfigError, match=r"`taps` .*: expected positive integers separated by commas"
    ):
        parse_ints(text, "taps")


def test_taps_are_strides_or_names() -> None:
    """A number is a stride; any other text is a tap's name."""
    assert parse_taps("4, stride8,block14") == ("stride4", "stride8", "block14")


@pytest.mark.parametrize("text", ["", "4,", "Block1", "4;8", "²", "a/b"])
def test_other_taps_are_refused(text: str) -> None:
    """Tap names must be lower-case letters and digits."""
    with pytest.raises(
        ConfigError, match=r"`taps` .*: expected strides or names of taps separated by commas"
    ):
        parse_taps(text)


def test_scenes_are_written_with_progress(tmp_path: Path) -> None:
    """The verb writes images, masks and boxes, and prints their number."""
    result = CliRunner().invoke(
        main, ["scenes", "--count", "5", "--size", "16", "--out", str(tmp_path / "s")]
    )
    assert result.exit_code == 0, result.output
    assert "5 scenes" in result.output
    assert len(list((tmp_path / "s" / "images").rglob("*.png"))) == 5
    assert len(json.loads((tmp_path / "s" / "boxes.json").read_text())["images"]) == 5


def test_a_missing_cache_is_one_line(tmp_path: Path) -> None:
    """Inspecting a folder that is not a cache prints one line and exits with 1."""
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: {tmp_path} is not a cache: expected manifest.json")
    assert result.output.count("\n") == 1


def test_an_error_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """Escape sequences in names from caches or model folders do not reach the terminal."""
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "a\x1b[2Jb")])
    assert result.exit_code == 2
    assert r"a\x1b[2Jb is not a cache" in result.output
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("words", "module", "function", "resumes"),
    [
        ("teacher train x --out y", "pipelines.teach", "teach", True),
        ("label write x y --name z", "pipelines.label.write_labels", "write_labels", True),
        ("extract x --teacher t --out y", "pipelines.extract.extract", "extract", True),
        ("extract x --teacher t --out y --dry-run", "pipelines.extract.dry_run", "forecast", False),
        ("label fit x --out y", "pipelines.label.fit_interpreter", "fit_interpreter", False),
        ("evaluate x --train y", "pipelines.evaluate.evaluate", "evaluate", False),
        ("verify x", "pipelines.verify.verify", "verify", False),
    ],
)
def test_only_verbs_that_resume_say_so(
    words: str, module: str, function: str, resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C exits with 130 and advises to run again only for verbs that resume."""
    interrupt(monkeypatch, importlib.import_module(module), function, 1)
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 130
    more = "; run the same command again to resume" if resumes else ""
    assert result.output == f"\nInterrupted{more}.\n"
