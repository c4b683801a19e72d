"""Mutations of runs, backbones, interpreters and teachers: folders of JSON, TOML and weights."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from support.fuzz.files import mutate_bytes, mutate_path
from support.fuzz.json_values import (
    HOSTILE_TEXTS,
    hostile_value,
    json_bytes,
    mutate_json,
    mutate_json_text,
    shown,
)


def mutate_folder(root: Path, outside: Path, rng: Random) -> str:
    """Change one file of a run, a backbone, an interpreter or a teacher; return what."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"]
    # Pictures are never read.
    path = rng.choice([p for p in files if p.suffix != ".png"])
    name = path.relative_to(root).as_posix()
    if rng.random() < 0.12:
        everything = [p for p in sorted(root.rglob("*")) if p.name != ".lock"]
        path = rng.choice(everything)
        return f"{path.relative_to(root).as_posix()} {mutate_path(path, outside, rng)}"
    if rng.random() < 0.04:
        return _second_weights(root, rng)
    if path.suffix == ".json":
        if rng.random() < 0.25:
            content, note = mutate_json_text(path.read_bytes(), rng)
        else:
            value, note = mutate_json(json.loads(path.read_bytes()), rng)
            content = json_bytes(value)
    elif path.suffix == ".jsonl":
        content, note = _mutate_lines(path.read_bytes(), rng)
    elif path.suffix == ".toml":
        content, note = _mutate_toml(path.read_bytes(), rng)
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        content, note = _mutate_safetensors(path.read_bytes(), rng)
    elif path.suffix == ".pt" and rng.random() < 0.8:
        note = _mutate_checkpoint(path, rng)
        content = path.read_bytes()
    else:
        content, note = mutate_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return f"{name} {note}"


def _mutate_lines(content: bytes, rng: Random) -> tuple[bytes, str]:
    lines = content.splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    if not lines or rng.random() < 0.3:
        return mutate_bytes(content, rng)
    value, note = mutate_json(json.loads(lines[at]), rng)
    lines[at] = json_bytes(value)
    return b"\n".join(lines) + b"\n", f"line {at}: {note}"


def _mutate_toml(content: bytes, rng: Random) -> tuple[bytes, str]:
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    name = lines[at].partition("=")[0].strip() or "x"
    value = rng.choice(
        (
            "",
            "true",
            "-1",
            "1e400",
            "nan",
            "99999999999999999999",
            "[1, 2]",
            "{a = 1}",
            "1979-05-27",
        )
    )
    if rng.random() < 0.4:
        value = json.dumps(rng.choice(HOSTILE_TEXTS))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at] = f"{name} = {value}"
    elif kind == 2:
        lines.insert(at, f"{rng.choice(('nosuch', name))} = {value}")
    else:
        return mutate_bytes(content, rng)
    return "\n".join(lines).encode(), f"line {at}: {name} = {value[:30]}"


def _mutate_safetensors(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Change the header; its length stays right, or is any number."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header, note = mutate_json(header, rng)
    text = json_bytes(header)
    size = rng.choice((len(text),) * 6 + (0, 2**40, 2**63, len(text) + 1))
    return size.to_bytes(8, "little") + text + content[8 + length :], f"header: {note}"


def _mutate_checkpoint(path: Path, rng: Random) -> str:
    state = torch.load(path, weights_only=True, map_location="cpu")
    notes = []
    for _ in range(rng.choice((1, 1, 2))):
        # Small containers near the root are changed as often as the many tensors below.
        parent = state
        names = []
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = rng.choice(keys)
            names.append(str(key))
            child = parent[key]
            if isinstance(child, (dict, list)) and child and rng.random() < 0.8:
                parent = child
                continue
            break
        if not keys:
            continue
        if isinstance(parent, tuple):
            continue
        notes.append(".".join(names) + _change_entry(parent, key, rng))
    torch.save(state, path)
    return ", ".join(notes)


def _change_entry(parent: Any, key: Any, rng: Random) -> str:
    value = parent[key]
    kind = rng.randrange(5)
    if kind == 0:
        del parent[key]
        return " missing"
    if isinstance(value, torch.Tensor) and kind < 4:
        if kind == 1:
            parent[key] = value.reshape(-1)[: rng.randrange(3)]
            return f" of shape {tuple(parent[key].shape)}"
        if kind == 2:
            parent[key] = value.to(rng.choice((torch.float64, torch.int8, torch.bool)))
            return f" of {parent[key].dtype}"
        number = rng.choice((float("nan"), float("inf"), 1e30))
        parent[key] = torch.full_like(value, number) if value.is_floating_point() else value - 1000
        return f" filled with {number}"
    if type(value) in (int, float) and kind < 4:
        parent[key] = rng.choice((-1, 0, value + 1, 10**9, float("nan"), float("inf"), str(value)))
    else:
        parent[key] = hostile_value(rng)
        if isinstance(parent[key], list) and len(parent[key]) == 1:
            parent[key] = [1]
    return f" = {shown(parent[key])}"


def _second_weights(root: Path, rng: Random) -> str:
    """Add an index of shards beside a file of weights."""
    weights = sorted(root.rglob("*.safetensors"))
    if not weights:
        return "no weights"
    path = rng.choice(weights)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../outside/secret.txt"}}
    index_path = path.with_name(f"{path.name}.index.json")
    index_path.write_text(json.dumps(index))
    return f"{index_path.relative_to(root).as_posix()} added"
