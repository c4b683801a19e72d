"""Mutations of JSON values, in memory and as text."""

import json
import math
from random import Random
from typing import Any

MARKUP = "<script>alert('fuzz')</script>"
HOSTILE_TEXTS = (
    "",
    "x",
    "../../outside/secret.txt",
    "../outside/new.txt",
    "/etc/passwd",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "\x9b2J",
    "\u202eright to left",
    "two\nlines",
    "a\x00b",
    "[bold red]markup[/]",
    "[/nothing]",
    MARKUP,
    "é" * 300,
    "A" * 100_000,
    "{0}",
    "%s%n",
)
_NUMBERS = (0, -1, 1, 2, 3, 255, 2**20, 2**27, 2**30, 2**31, 2**63, 2**64, 10**30, -(2**63))
_FLOATS = (0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf)


def hostile_value(rng: Random) -> Any:
    """Return a value of a random type, at the edges of that type."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(HOSTILE_TEXTS)
    if kind < 6:
        return rng.choice(_NUMBERS)
    if kind == 6:
        return rng.choice(_FLOATS)
    if kind == 7:
        return rng.choice((None, True, False))
    if kind == 8:
        return rng.choice(([], {}, [[]] * 1000, {"x": 1}, [None], list(range(100_000))))
    nested: Any = []
    for _ in range(rng.choice((5, 500, 5000))):
        nested = [nested]
    return nested


def shown(value: Any) -> str:
    """Return the beginning of a value as text."""
    return type(value).__name__ if isinstance(value, (list, dict)) else repr(value)[:40]


def mutate_json(value: Any, rng: Random) -> tuple[Any, str]:
    """Make one to three changes to a JSON value; return the value, and what was changed."""
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value, note = _change(value, rng)
        notes.append(note)
    return value, ", ".join(notes)


def mutate_json_text(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Return the text of a JSON file with a change that a value in memory cannot have."""
    kind = rng.randrange(7)
    at = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at], f"cut at {at}"
    if kind == 1:
        return content[:at] + b"\xff\xfe" + content[at:], f"bad UTF-8 at {at}"
    if kind == 2:
        return b"\xef\xbb\xbf" + content, "byte order mark"
    if kind == 3:
        return content.replace(b"{", b'{"format": 1, "shard": 0, ', 1), "duplicate keys"
    if kind == 4:
        return content.replace(b",", b",\n "), "spaces"
    if kind == 5:
        return b"[" * 100_000 + content, "100,000 brackets"
    return content.replace(b'"', b'"\\ud800', 1), "lone surrogate"


def json_bytes(value: Any) -> bytes:
    """Return a JSON value as text, with NaN and infinities as Python writes them."""
    try:
        return json.dumps(value).encode()
    except (RecursionError, ValueError):
        return b"[" * 5000 + b"]" * 5000


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every item in nested containers; not below long lists."""
    paths = []
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:100])
        if isinstance(value, list)
        else ()
    )
    if len(path) < 12:
        for key, item in items:
            paths += [(*path, key), *_places(item, (*path, key))]
    return paths


def _change(value: Any, rng: Random) -> tuple[Any, str]:
    places = _places(value)
    if not places or rng.random() < 0.02:
        return hostile_value(rng), "the whole value"
    path = rng.choice(places)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    name = ".".join(map(str, path))
    kind = rng.randrange(10)
    if kind < 2:
        del parent[key]
        return value, f"without {name}"
    if kind == 2 and isinstance(parent, dict):
        parent[rng.choice(HOSTILE_TEXTS)] = parent.pop(key)
        return value, f"{name} renamed"
    if kind == 3 and isinstance(parent, list):
        parent.extend([parent[key]] * rng.choice((1, 5, 1000)))
        return value, f"{name} repeated"
    if kind == 4:
        parent[key] = [parent[key]]
        return value, f"{name} in a list"
    if kind == 5:
        other = value
        other_path = rng.choice(places)
        for step in other_path:
            other = other[step]
        # One object in two places; if it holds itself, it has no JSON.
        parent[key] = other
        return value, f"{name} = {'.'.join(map(str, other_path))}"
    if kind < 8 and type(parent[key]) in (int, float):
        x = parent[key]
        parent[key] = rng.choice((x + 1, x - 1, -x, x * 2, x * 1000, x / 3, str(x)))
        return value, f"{name} = {shown(parent[key])}"
    parent[key] = hostile_value(rng)
    return value, f"{name} = {shown(parent[key])}"
