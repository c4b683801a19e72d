"""TOML files of any values, to be mutated as JSON values are."""

import json
from collections.abc import Mapping
from typing import Any


def toml_bytes(table: Any) -> bytes:
    """Return a mapping as a TOML document of inline tables, and any other value as its text.

    Values that TOML lacks, None, are left out. Raises RecursionError for a value that is too deep.
    """
    if not isinstance(table, Mapping):
        return _text(table).encode("utf-8", "surrogatepass")
    lines = [
        f"{_key(name)} = {_text(value)}\n" for name, value in table.items() if value is not None
    ]
    return "".join(lines).encode("utf-8", "surrogatepass")


def _key(name: Any) -> str:
    return json.dumps(str(name))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        items = [f"{_key(name)} = {_text(x)}" for name, x in value.items() if x is not None]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(x) for x in value if x is not None) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)
