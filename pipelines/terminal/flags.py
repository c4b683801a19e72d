"""Turns a frozen dataclass of options into a command's flags and its TOML file."""

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dtcache.arguments import is_address
from dtcache.atomic_files import NO_LOCK
from dtcache.errors import ConfigError, DtcacheError
from dtcache.options.images import READING
from dtcache.options.toml import read_config
from dtcache.storage.local_copy import DEFAULT_GB, local_copies
from pipelines.terminal.commands import RUN_GROUP, GroupedOption, WrongUsage, verb_of
from pipelines.terminal.hints import option_hint


class _Path(click.Path):
    """A path. An empty text, which Path reads as the working folder, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path. Raises click.BadParameter."""
        if value == "":
            self.fail("expected a path, got an empty text.", param, ctx)
        if is_address(value):
            self.fail(
                f"{value}: expected a path on this machine. Only a sealed cache that is read may "
                "be in an object store.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class _Location(_Path):
    """A path, or the address of a cache in an object store, such as s3://bucket/cats.cache."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a path, or the text of an address. Raises click.BadParameter."""
        return value if is_address(value) else super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
FOLDER = _Path(path_type=Path, file_okay=False)
"""A folder, which may not exist yet."""

JSON_FLAG = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout."
)


def location_argument(
    name: str, metavar: str, *, several: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Give a command an argument that is a cache's path or address, and flags of local copies.

    With `several`, the argument is one or more of them.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)  # copies the flags that click has stored on the function
        def located(**values: Any) -> Any:
            folder = values.pop("local_cache")
            gigabytes = values.pop("local_cache_size")
            caches = values[name] if several else (values[name],)
            if any(map(is_address, caches)):
                from dtcache.store.remote import location_of

                copies = local_copies(folder, gigabytes)
                caches = tuple(location_of(name, cache, copies) for cache in caches)
                values[name] = caches if several else caches[0]
            elif (folder, gigabytes) != (None, None):
                option = "local_cache" if folder is not None else "local_cache_size"
                raise ConfigError(
                    f"`{option}`: expected a cache in an object store, which is copied, got "
                    f"{caches[0]}; leave `{option}` out"
                )
            return command(**values)

        flags = (
            click.argument(
                name,
                metavar=metavar,
                type=_Location(path_type=Path),
                required=True,
                nargs=-1 if several else 1,
            ),
            click.option(
                "--local-cache",
                cls=GroupedOption,
                group=RUN_GROUP,
                type=PATH,
                metavar="DIR",
                help="Folder for local copies of caches in object stores "
                "[default: ~/.cache/dtcache/copies].",
            ),
            click.option(
                "--local-cache-size",
                cls=GroupedOption,
                group=RUN_GROUP,
                type=float,
                metavar="GB",
                help=f"Most gigabytes of all local copies [default: {DEFAULT_GB}].",
            ),
        )
        for flag in reversed(flags):
            located = flag(located)
        return located

    return decorate


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the time of the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _no_locks(ctx: click.Context, _: click.Parameter, is_chosen: bool) -> None:
    if is_chosen:
        ctx.with_resource(_environment(NO_LOCK, "1"))


NO_LOCK_FLAG = click.option(
    "--no-lock",
    cls=GroupedOption,
    group=RUN_GROUP,
    is_flag=True,
    expose_value=False,
    callback=_no_locks,
    help="Lock no folder. Write each folder from one process at a time.",
)
"""The flag of every command that locks the folders that it writes."""


def options_of(options: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag for each field of a frozen dataclass.

    The command receives the filled dataclass as `options`. `--config FILE` also sets any of the
    command's options; a flag overrides the file.
    """
    hints = typing.get_type_hints(options)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)  # copies the flags that click has stored on the function
        def filled(**values: Any) -> Any:
            chosen = {f.name: values.pop(f.name) for f in dataclasses.fields(options)}
            return command(**values, options=options(**chosen))

        # The common options of reading images come after the verb's own.
        ordered = sorted(dataclasses.fields(options), key=lambda f: f.metadata["group"] == READING)
        for f in reversed(ordered):
            filled = _flag(f, hints[f.name])(filled)
        return click.option(
            "--config",
            cls=GroupedOption,
            group=RUN_GROUP,
            type=PATH,
            metavar="FILE",
            is_eager=True,
            expose_value=False,
            callback=_read_defaults,
            help="TOML file of options, such as config.toml of a run. Flags override it.",
        )(filled)

    return decorate


def _read_defaults(ctx: click.Context, flag: click.Parameter, path: Path | None) -> None:
    """Make a file's options the flags' defaults, as text, which click checks like typed values."""
    if path is None:
        return
    try:
        values = read_config(path)
    except DtcacheError as error:
        raise WrongUsage(f"--config {error}") from error
    known = [p.name for p in ctx.command.params if isinstance(p, click.Option) and p.expose_value]
    for name in values:
        if name not in known:
            verb = verb_of(ctx)
            hint = option_hint(name, ctx.command, verb, ctx.find_root().command)
            raise WrongUsage(f"--config {path}: dtcache {verb} has no option {name}. {hint}")
    texts = {
        name: [str(item) for item in value] if isinstance(value, list) else str(value)
        for name, value in values.items()
    }
    ctx.default_map = {**(ctx.default_map or {}), **texts}


def _flag(f: dataclasses.Field[Any], hint: Any) -> Callable[..., Any]:
    """Return the click option of a field whose type is `hint`."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    name = f.name.replace("_", "-")
    settings: dict[str, Any] = {
        "cls": GroupedOption,
        "group": f.metadata["group"],
        "help": f.metadata["help"],
        "default": f.default,
        "show_default": f.default not in (None, ""),
    }
    if f.metadata["metavar"]:
        settings["metavar"] = f.metadata["metavar"]
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if f.default is None:
            settings["callback"] = _none_if_empty
        return click.option(f"--{name}", type=_click_type(item), multiple=True, **settings)
    if hint is bool:
        off = f.metadata["off"] or (f"no-{name}" if f.default else "")
        return click.option(f"--{name}/--{off}" if off else f"--{name}", is_flag=True, **settings)
    if f.default == "":
        # click 8.3 treats an explicit default of None as a value, and then accepts a missing flag.
        del settings["default"]
        settings["required"] = True
        settings["callback"] = require_text
    if f.metadata["choices"]:
        return click.option(f"--{name}", type=click.Choice(f.metadata["choices"]), **settings)
    if f.metadata["auto"]:
        settings["metavar"] = "N|AUTO"
        return click.option(f"--{name}", type=_integer_or_auto, **settings)
    if hint is float:
        settings.setdefault("metavar", "FLOAT")
    return click.option(f"--{name}", type=_click_type(hint), **settings)


def _none_if_empty(_: click.Context, __: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Return None, the default of the field, for a flag that is not given."""
    return values or None


def _click_type(hint: type) -> Any:
    """Return the type by which click checks the text of a value of the Python type `hint`."""
    if hint is Path:
        return PATH
    if hint is float:
        return _number
    return hint


def _number(text: Any) -> float:
    """Return a float. The error for a percentage names the share to pass instead."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        share = float(str(text).removesuffix("%")) / 100
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number.") from None
    raise click.BadParameter(f"{text!r} is not a number. Pass {share:g} for {text}.")


def require_text(_: click.Context, __: click.Parameter, text: str) -> str:
    """Return a text that the command needs. Raises click.BadParameter if it is empty."""
    if not text:
        raise click.BadParameter("expected a value, got an empty text.")
    return text


def _integer_or_auto(text: Any) -> int | None:
    """Return an integer, or None for the word auto."""
    return None if text == "auto" else int(click.INT.convert(text, None, None))


def out_flag(help_text: str) -> Callable[..., Any]:
    """Return the flag --out: the folder that a command writes to."""
    return click.option("--out", type=FOLDER, required=True, help=help_text)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(value, indent=2))
