"""From a dataclass of options to a command's flags, its TOML file and its one line of failure; for cli.py."""

import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dtcache.errors import DtcacheError
from dtcache.options.toml import read_config
from pipelines.terminal.text import printable

PATH = click.Path(path_type=Path)

JSON_FLAG = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout."
)

RESUMABLE = ("scenes", "teach", "extract", "write", "train", "demo")
"""Verbs that go on from where they were interrupted; write is that of label."""

WRITES_NOTHING = "dtcache.writes_nothing"
"""Key of a context's `meta`: set where flags have made a verb of RESUMABLE one that leaves nothing to go on with."""


class Group(click.Group):
    """Translates dtcache's failures into one line and Ctrl-C into exit code 130, once, for every verb."""

    group_class = type  # groups within are of this class too

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except DtcacheError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise click.ClickException(printable(in_flags(str(error), command))) from error
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in RESUMABLE and WRITES_NOTHING not in ctx.meta
            more = "; run the same command again to resume" if resumes else ""
            click.echo(f"\nInterrupted{more}.", err=True)
            sys.exit(130)


_FIELD = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def in_flags(message: str, command: click.Command | None) -> str:
    """Return a library message in the words of a command: a field in backticks becomes its flag.

    `batch_size` becomes --batch-size, `encoding='ddim'` becomes --encoding ddim, `flip=False` becomes --no-flip.
    Other text in backticks stays.
    """
    options = {p.name: p for p in command.params if isinstance(p, click.Option)} if command else {}

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        option = options.get(name)
        if option is None:
            return match.group(0)
        if value is None:
            return option.opts[0]
        if option.is_flag:
            return (option.opts if value == "True" else option.secondary_opts or option.opts)[0]
        return f"{option.opts[0]} {value.strip(chr(39))}"

    return _FIELD.sub(flag, message)


def options_of(options: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag a field of a frozen dataclass, and pass it the filled dataclass as `options`.

    `--config FILE` gives any of the command's options too; the command line wins over it.
    """
    hints = typing.get_type_hints(options)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)  # its flags too, which click keeps on the function
        def filled(**values: Any) -> Any:
            chosen = {f.name: values.pop(f.name) for f in dataclasses.fields(options)}
            return command(**values, options=options(**chosen))

        for f in reversed(dataclasses.fields(options)):
            filled = _flag(f, hints[f.name])(filled)
        return click.option(
            "--config",
            type=PATH,
            metavar="FILE",
            is_eager=True,
            expose_value=False,
            callback=_read_defaults,
            help="TOML file of options, such as the config.toml of a run; flags win over it.",
        )(filled)

    return decorate


def _read_defaults(ctx: click.Context, flag: click.Parameter, path: Path | None) -> None:
    """Make a file's options the defaults of the flags, in words, so that click checks them as if typed."""
    if path is None:
        return
    known = {
        p.name
        for p in ctx.command.params
        if isinstance(p, click.Option) and p.expose_value and p.name
    }
    try:
        found = read_config(path, known)
    except DtcacheError as error:
        raise click.ClickException(str(error)) from error
    words = {
        n: [str(v) for v in value] if isinstance(value, list) else str(value)
        for n, value in found.items()
    }
    ctx.default_map = {**(ctx.default_map or {}), **words}


def _flag(f: dataclasses.Field[Any], hint: Any) -> Callable[..., Any]:
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    name = f.name.replace("_", "-")
    shape: dict[str, Any] = {"help": f.metadata["help"], "default": f.default}
    shape["show_default"] = f.default not in (None, "")
    if f.metadata["metavar"]:
        shape["metavar"] = f.metadata["metavar"]
    if typing.get_origin(hint) is tuple:
        return click.option(f"--{name}", type=typing.get_args(hint)[0], multiple=True, **shape)
    if hint is bool:
        off = f.metadata["off"] or (f"no-{name}" if f.default else "")
        return click.option(f"--{name}/--{off}" if off else f"--{name}", is_flag=True, **shape)
    if f.default == "":
        # click 8.3 takes an explicit default of None for a value and then misses nothing.
        del shape["default"]
        shape["required"] = True
    kind = (
        click.Choice(f.metadata["choices"])
        if f.metadata["choices"]
        else PATH
        if hint is Path
        else hint
    )
    if f.metadata["auto"]:
        kind, shape["metavar"] = _number_or_auto, "N|AUTO"
    return click.option(f"--{name}", type=kind, **shape)


def _number_or_auto(word: Any) -> int | None:
    """Return an integer, or None for auto."""
    return None if word == "auto" else int(click.INT.convert(word, None, None))


def out_flag(help_text: str) -> Callable[..., Any]:
    """Return the flag that says where a command writes."""
    return click.option("--out", type=click.Path(path_type=Path), required=True, help=help_text)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(value, indent=2))
