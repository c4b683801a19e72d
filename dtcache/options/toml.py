"""A TOML file of options: flat, with the names of the fields in dtcache/options/."""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtcache.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


def read_config(path: Path) -> dict[str, Any]:
    """Return a file's options by name: text, numbers, booleans, or lists of these.

    Raises ConfigError if the file is missing, larger than `MAX_CONFIG_BYTES`, or not flat TOML.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path}: expected at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}"
            )
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; pass a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for name, value in values.items():
        if isinstance(value, dict):
            raise ConfigError(f"{path}: expected no tables, got [{name}]; write its options flat")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise ConfigError(
                f"{path}: {name}: expected text, a number, true or false, or a list of these"
            )
    return values


def config_text(options: Mapping[str, Any]) -> str:
    """Return options as TOML that `read_config` reads. An option that is None is left out."""
    return "".join(
        f"{name} = {_toml(value)}\n" for name, value in options.items() if value is not None
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int | float):
        return repr(value) if math.isfinite(value) else str(float(value))
    # A basic string of TOML is a string of JSON, except that TOML requires DEL to be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
