"""Options in a TOML file: flat, named as in dtcache/options/."""

import difflib
import json
import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dtcache.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


def read_config(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Return a file's options by name. Raises ConfigError for a file that is not flat TOML or has an unknown option."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"--config {path}: expected at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}"
            )
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"--config {path}: {error.strerror or error}; give a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not TOML: {error}") from error
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else f"expected some of {', '.join(sorted(known))}"
            )
            raise ConfigError(f"--config {path}: this command has no option {name}; {hint}")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise ConfigError(
                f"--config {path}: {name}: expected text, a number, true or false, or a list of these"
            )
    return values


def config_text(options: Mapping[str, Any]) -> str:
    """Return options as a file that `read_config` reads; those that are None are left out: TOML has no such value."""
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
    # TOML's basic strings are JSON's, but for DEL, which it wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
