"""Options from a TOML file: valid content, override by flags, and the written text."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cli import main
from dtcache.errors import ConfigError
from dtcache.options import ExtractOptions, Options, TrainOptions, option
from dtcache.options.toml import config_text, read_config
from pipelines.terminal.commands import Group
from pipelines.terminal.flags import options_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Few(Options):
    """One option of each type."""

    name: str = option("", "A name.")
    count: int = option(3, "A number.", minimum=1)
    rate: float | None = option(None, "A rate.")
    step: tuple[int, ...] = option((1,), "Steps.")
    flip: bool = option(True, "Flip.")
    where: Path | None = option(None, "A path.")


def filled(tmp_path: Path, toml: str, *flags: str) -> Few | str:
    """Return the options that a command receives from a file and flags, or its error output."""
    got: list[Few] = []

    @click.group(cls=Group)
    def group() -> None: ...

    @group.command()
    @options_of(Few)
    def verb(options: Few) -> None:
        got.append(options)

    (tmp_path / "c.toml").write_text(toml)
    result = CliRunner().invoke(group, ["verb", "--config", str(tmp_path / "c.toml"), *flags])
    return got[0] if result.exit_code == 0 else result.output


def test_a_file_gives_options_and_flags_win(tmp_path: Path) -> None:
    """A file can set every type of option; a flag overrides the file, the file the default."""
    toml = 'name = "a"\ncount = 5\nrate = 1e-3\nstep = [50, 150]\nflip = false\nwhere = "x/y"\n'
    assert filled(tmp_path, toml) == Few(
        name="a", count=5, rate=1e-3, step=(50, 150), flip=False, where=Path("x/y")
    )
    flags = ("--count", "7", "--flip", "--step", "9", "--name", "b")
    got = filled(tmp_path, toml, *flags)
    assert got == Few(name="b", count=7, rate=1e-3, step=(9,), flip=True, where=Path("x/y"))
    assert filled(tmp_path, "name = 64\n") == Few(name="64")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("name = 'a'\ncuont = 1", "dtcache verb has no option cuont. Did you mean count?"),
        ("zzz = 1", "dtcache verb has no option zzz. Run dtcache verb --help for help."),
        ("name = 'a'\ncount = 1.5", "'1.5' is not a valid integer"),
        ("name = 'a'\ncount = true", "'True' is not a valid integer"),
        ("name = 'a'\nflip = 'perhaps'", "'perhaps' is not a valid boolean"),
        ("name = 'a'\nrate = '5%'", "'5%' is not a number. Pass 0.05 for 5%"),
        ("name = 'a'\ncount = 0", "--count 0: expected at least 1"),
        ("count = 1", "Missing option '--name'"),
        ("[train]\ncount = 1", "expected no tables, got [train]; write its options flat"),
        ("name = 1979-05-27", "name: expected text, a number, true or false, or a list of these"),
        ("name = ", "not TOML: "),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, toml: str, message: str) -> None:
    """An unknown option is named with the nearest valid one, and values are checked like flags."""
    said = filled(tmp_path, toml)
    assert isinstance(said, str)
    assert message in said.replace("\n", " ")


def test_an_option_of_another_tool_is_refused_with_the_right_name(tmp_path: Path) -> None:
    """Options of other tools get the same hints in a file as on the command line."""
    (tmp_path / "c.toml").write_text("learning_rate = 1")
    words = ["train", "x", "--out", "y", "--config", str(tmp_path / "c.toml")]
    output = CliRunner().invoke(main, words).output
    assert output.endswith("c.toml: dtcache train has no option learning_rate. Use lr.\n")


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    """A missing or too large file is refused by name."""
    with pytest.raises(ConfigError, match=r"nowhere: No such file or directory; pass a TOML file"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "large.toml").write_text("#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match=r"expected at most 1048576 bytes, got 1048577"):
        read_config(tmp_path / "large.toml")


@pytest.mark.parametrize(
    "options",
    [
        TrainOptions(
            weight_decay=1e-20, images=Path('a "b"\\c\x7f\u00fc\n\U0001f600'), clip_grad=1e300
        ),
        ExtractOptions(teacher="x", timestep=(50, 150), flip=False),
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, options: Any) -> None:
    """Written options read back from TOML as the same options."""
    values = dataclasses.asdict(options)
    text = config_text(values)
    (tmp_path / "c.toml").write_text(text)
    read = read_config(tmp_path / "c.toml")
    back = {**read, **{k: tuple(v) for k, v in read.items() if isinstance(v, list)}}
    if "images" in back and isinstance(values["images"], Path):
        back["images"] = Path(back["images"])
    assert type(options)(**back) == options
    assert tomllib.loads(text).keys() == {
        name for name, value in values.items() if value is not None
    }


@pytest.mark.parametrize(
    "verb",
    ["teacher train", "teacher convert", "extract", "verify", "train", "evaluate", "demo"],
)
def test_every_verb_with_options_takes_a_file(verb: str) -> None:
    """Every verb with options accepts --config."""
    assert "--config FILE" in CliRunner().invoke(main, [*verb.split(), "--help"]).output


def test_text_that_is_not_utf8_is_refused() -> None:
    """A path of bytes that are not UTF-8, such as one under LANG=C, cannot be written as TOML."""
    for value in ("a\udce9", ("b", "a\udce9"), Path("a\udce9")):
        with pytest.raises(ConfigError, match=r"`init` .*: expected UTF-8 text; .*LC_ALL=C\.UTF-8"):
            config_text({"seed": 1, "init": value})
