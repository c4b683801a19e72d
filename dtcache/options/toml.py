"""TOML files of options, with the names of the fields in dtcache/options/."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dtcache.errors import ConfigError
from dtcache.names import IN_UTF8, is_utf8
from dtcache.options.field import Options

MAX_CONFIG_BYTES = 1 << 20

Chosen = TypeVar("Chosen", bound=Options)


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's values.

    Raises ConfigError if the file is missing, not a regular file, larger than `MAX_CONFIG_BYTES`,
    or not TOML.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: expected a file; pass a TOML file")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path}: expected at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}"
            )
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; pass a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return a file's options by name: text, numbers, booleans, or lists of these.

    Raises ConfigError if the file is not flat TOML, and what `read_toml` raises.
    """
    values = read_toml(path)
    for name, value in values.items():
        if isinstance(value, dict):
            raise ConfigError(f"{path}: expected no tables, got [{name}]; write its options flat")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise ConfigError(
                f"{path}: {name}: expected text, a number, true or false, or a list of these"
            )
    return values


def require_names(table: Mapping[str, Any], known: Collection[str], title: str) -> None:
    """Raise ConfigError, with the nearest known name, for a name that is not known."""
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{title}: no option {name}; {hint}")


def options_from(
    options: type[Chosen], table: Mapping[str, Any], *, title: str, folder: Path
) -> Chosen:
    """Return the options that a TOML table sets; relative paths are relative to `folder`.

    `title` names the table in errors. Raises ConfigError for an unknown name, a value of another
    type, and what the options themselves refuse.
    """
    hints = typing.get_type_hints(options)
    metadata = {f.name: f.metadata for f in dataclasses.fields(options)}  # type: ignore[arg-type]
    require_names(table, metadata, title)
    values = {
        name: _typed(value, hints[name], metadata[name], folder) for name, value in table.items()
    }
    try:
        return options(**values)
    except ConfigError as error:
        raise ConfigError(f"{title}: {error}") from error


def _typed(value: Any, hint: Any, metadata: Mapping[str, Any], folder: Path) -> Any:
    """Return a TOML value as the type of a field, if TOML and Python write it differently."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if metadata["auto"] and value == "auto":
        return None
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    if hint in (str, Path) and is_text:
        return str(value) if hint is str else folder / str(value)
    return value


def config_text(options: Mapping[str, Any]) -> str:
    """Return options as TOML that `read_config` reads. An option that is None is left out.

    Raises ConfigError for text that is not UTF-8, such as a path under LANG=C.
    """
    lines = []
    for name, value in options.items():
        line = f"{name} = {_toml(value)}\n" if value is not None else ""
        if not is_utf8(line):
            raise ConfigError(f"`{name}` {value}: expected UTF-8 text; {IN_UTF8}")
        lines.append(line)
    return "".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int | float):
        return repr(value) if math.isfinite(value) else str(float(value))
    # A basic string of TOML is a string of JSON, except that TOML requires DEL to be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
