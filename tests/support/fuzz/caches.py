"""Mutations of caches, with the hashes recomputed or not.

If the hashes are recomputed, the cache is another cache, made by an attacker. If they are not, the
cache is damaged, and no stage may use values that differ from those of the original.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from google_crc32c import value as crc32c
from numcodecs.zstd import compress, decompress
from safetensors.numpy import load, save
from support.fuzz.files import mutate_bytes, mutate_path, swap_files
from support.fuzz.json_values import json_bytes, mutate_json, mutate_json_text
from support.hostile import reseal

from dtcache.hashing import canonical_json, file_sha256
from dtcache.json_files import with_own_hash
from dtcache.store.layout import CODEC
from dtcache.store.tag import TAG_BYTES, tag_seed, tagged
from dtcache.store.zstd_frame import pack_frame

CRC_BYTES = 4
ENTRY = struct.Struct("<QQ")


def mutate_cache(root: Path, outside: Path, rng: Random) -> tuple[str, bool]:
    """Change one thing in a cache, or in one of its label sets.

    Returns what was changed, and whether the result is intact by its own hashes.
    """
    sets = sorted(path for path in root.glob("labels/*") if path.is_dir())
    if sets and rng.random() < 0.15:
        root = rng.choice(sets)
    kinds: dict[str, int] = {
        "manifest": 24,
        "samples": 12,
        "shards": 8 if (root / "shards.parquet").exists() else 0,
        "commit": 15 if list(root.glob("commits/*")) else 0,
        "node": 6,
        "artefact": 10,
        "payloads": 18,
        "log": 4,
        "path": 14,
        "extra": 2,
    }
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    signed = rng.random() < 0.7
    note = _MUTATIONS[kind](root, outside, rng, signed)
    if kind == "path":
        # No hash of a cache covers its label sets, so one may be missing.
        signed = root.parent.name == "labels" or note.startswith("labels")
    return f"{kind}: {note}", signed or kind == "extra"


def _manifest(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    path = root / "manifest.json"
    if not signed and rng.random() < 0.5:
        return _raw_json(path, rng)
    value = json.loads(path.read_bytes())
    del value["sha256"]
    value, note = mutate_json(value, rng)
    path.write_bytes(_own_hash(value) if signed else json_bytes(value))
    return note


def _samples(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    return _table(root / "samples.parquet", rng, signed)


def _shards(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    return _table(root / "shards.parquet", rng, signed)


def _table(path: Path, rng: Random, signed: bool) -> str:
    from support.fuzz.tables import mutate_table

    if rng.random() < 0.2:
        content, note = mutate_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
    else:
        table, note = mutate_table(pq.read_table(path), rng)
        try:
            pq.write_table(table, path)
        except (pa.ArrowException, ValueError) as error:
            path.write_bytes(b"PAR1")
            note += f" (not written: {type(error).__name__})"
    if signed:
        reseal(path.parent)
    return note


def _commit(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    path = rng.choice(sorted(root.glob("commits/*")))
    return f"{path.name} {_hashed_json(path, rng, signed)}"


def _log(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    path = root / "extraction.log.json"
    if not path.exists():
        path.write_bytes(_own_hash({"runs": []}))
    return _hashed_json(path, rng, signed)


def _hashed_json(path: Path, rng: Random, signed: bool) -> str:
    if not signed and rng.random() < 0.5:
        return _raw_json(path, rng)
    value = json.loads(path.read_bytes())
    value.pop("sha256", None)
    value, note = mutate_json(value, rng)
    path.write_bytes(_own_hash(value) if signed else json_bytes(value))
    return note


def _node(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    path = rng.choice(sorted(root.rglob("zarr.json")))
    if rng.random() < 0.3:
        note = _raw_json(path, rng)
    else:
        value, note = mutate_json(json.loads(path.read_bytes()), rng)
        path.write_bytes(json_bytes(value))
    if signed:
        reseal(root)
    return f"{path.relative_to(root)} {note}"


def _artefact(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    """Change an array of the codec, the file's header, or its compressed bytes."""
    path = root / CODEC
    content = path.read_bytes()
    kind = rng.randrange(9)
    note = f"values {kind}"
    if kind < 3:
        content, note = mutate_bytes(content, rng)
    else:
        tensors = load(decompress(content))
        name = rng.choice(sorted(tensors))
        values = tensors[name]
        raw = np.frombuffer(values.tobytes(), np.uint8).copy()
        if kind == 3:
            raw[:] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 4 and len(raw):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == 5:
            tensors[name] = values.reshape(-1)[: rng.randrange(values.size + 1)]
        elif kind == 6:
            tensors[name] = np.tile(values, rng.choice((2, 1000)))
        elif kind == 7:
            del tensors[name]
            tensors[rng.choice(("", "x", "t150/stride2/basis", name + "\x1b[2J"))] = values
        if kind in (3, 4):
            tensors[name] = raw.view(values.dtype).reshape(values.shape)
        plain = save(tensors)
        if kind == 8:
            plain, note = mutate_bytes(plain, rng)
        content = compress(plain, 1)
    path.write_bytes(content)
    if signed:
        reseal(root)
    return f"{CODEC} {note}"


def _payloads(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    """Change shard files: bytes, whole files, or the entries of an index under its checksum."""
    files = sorted((root / "data.zarr").rglob("c.*"))
    path = rng.choice(files)
    name = path.relative_to(root).as_posix()
    kind = rng.randrange(5)
    if kind == 0:
        same_size = [p for p in files if p.stat().st_size == path.stat().st_size and p != path]
        other = rng.choice(same_size or files)
        swap_files(path, other)
        note = f"{name} swapped with {other.relative_to(root).as_posix()}"
        changed = [path, other]
    else:
        if kind == 1:
            content, note = mutate_bytes(path.read_bytes(), rng)
        elif kind == 2:
            content, note = _mutate_index(path.read_bytes(), rng)
        elif kind == 3:
            content, note = _mutate_content(root, path, rng)
        else:
            content, note = _mutate_frame(path.read_bytes(), rng)
        path.write_bytes(content)
        note = f"{name} {note}"
        changed = [path]
    if signed:
        sign_shards(root, changed)
    return note


def _index_of(content: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Return where the index of a shard begins, and its entries."""
    for entries in range(1, 4097):
        at = len(content) - CRC_BYTES - entries * ENTRY.size
        if at < 0:
            break
        index = content[at:-CRC_BYTES]
        if crc32c(index) == int.from_bytes(content[-CRC_BYTES:], "little"):
            return at, list(ENTRY.iter_unpack(index))
    raise ValueError("not a shard")


def _with_index(body: bytes, entries: list[tuple[int, int]]) -> bytes:
    index = b"".join(ENTRY.pack(*entry) for entry in entries)
    return body + index + crc32c(index).to_bytes(CRC_BYTES, "little")


def _mutate_index(content: bytes, rng: Random) -> tuple[bytes, str]:
    at, entries = _index_of(content)
    one = rng.randrange(len(entries))
    other = rng.randrange(len(entries))
    offset, size = entries[one]
    kind = rng.randrange(6)
    if kind == 0:
        entries[one] = entries[other]
        entries[other] = (offset, size)
        note = f"chunks {one} and {other} swapped"
    elif kind == 1:
        entries = [entries[one]] * len(entries)
        note = "all chunks the same"
    elif kind == 2:
        entries[one] = (rng.choice((2**40, 2**63, 2**64 - 2, len(content))), size)
        note = "offset outside the file"
    elif kind == 3:
        entries[one] = (offset, rng.choice((0, 1, 3, size - 1, size + 1, 2**31, 2**64 - 1)))
        note = f"size {entries[one][1]}"
    elif kind == 4:
        entries[one] = (2**64 - 1, 2**64 - 1)
        note = "chunk absent"
    else:
        entries = entries[:-1] if rng.random() < 0.5 else entries * 2
        note = f"{len(entries)} entries"
    return _with_index(content[:at], entries), note


def _mutate_frame(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Change a chunk's frame under right checksums; or change the payload in it."""
    entries = _index_of(content)[1]
    offset, size = rng.choice([entry for entry in entries if entry[0] < 2**63])
    frame = bytearray(content[offset : offset + size - CRC_BYTES])
    kind = rng.randrange(4)
    if kind == 0:
        # The header: magic, descriptor, content size.
        place = rng.randrange(4, min(10, len(frame)))
        frame[place] = rng.choice((0, 0x20, 0x60, 0xA0, 0xE0, 0xFF, rng.randrange(256)))
        note = f"frame byte {place} = {frame[place]}"
    elif kind == 1:
        place = rng.randrange(4, len(frame))
        frame[place] ^= 1 << rng.randrange(8)
        note = f"frame bit in byte {place}"
    elif kind == 2:
        payload = bytearray(decompress(bytes(frame)))
        for _ in range(rng.choice((1, 8))):
            payload[rng.randrange(min(64, len(payload)))] = rng.choice((0, 255, rng.randrange(256)))
        repacked: bytes = compress(bytes(payload), 1)
        frame = bytearray(repacked.ljust(len(frame), b"\0"))
        note = "payload"
    else:
        # A frame of the declared size that is an image, or nothing.
        frame[:] = rng.choice((b"\0", b"\xff", b"\x28\xb5\x2f\xfd")) * len(frame)
        frame = frame[: size - CRC_BYTES]
        note = "frame of one value"
    frame = frame[: size - CRC_BYTES].ljust(size - CRC_BYTES, b"\0")
    chunk = bytes(frame) + crc32c(bytes(frame)).to_bytes(CRC_BYTES, "little")
    return content[:offset] + chunk + content[offset + size :], note


def _mutate_content(root: Path, path: Path, rng: Random) -> tuple[bytes, str]:
    """Change lengths, lane states or words of a payload under the right tag and checksums."""
    content = path.read_bytes()
    at, entries = _index_of(content)
    manifest = json.loads((root / "manifest.json").read_bytes())
    array = path.parent.relative_to(root / "data.zarr").as_posix()
    number = rng.randrange(sum(offset < 2**63 for offset, _ in entries))
    offset, size = entries[number]
    payload = decompress(content[offset : offset + size - CRC_BYTES])
    views = len(entries) // manifest["arrays"][array]["shard_rows"]
    shard = int(path.name.split(".")[1])
    inner, view = divmod(number, views)
    row = shard * manifest["arrays"][array]["shard_rows"] + inner
    changed = bytearray(payload[TAG_BYTES:].rstrip(b"\0") or b"\1" * 40)
    note = "content"
    for _ in range(rng.choice((1, 4))):
        place = rng.randrange(min(rng.choice((2, 6, 40, len(changed))), len(changed)))
        changed[place] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        note += f" byte {place} = {changed[place]}"
    if rng.random() < 0.3:
        del changed[rng.randrange(1, len(changed) + 1) :]
        note += f", cut to {len(changed)}"
    seed = tag_seed(manifest["fingerprint"], array)
    frame = pack_frame(tagged(seed, row, view, bytes(changed)), len(payload))
    chunk = frame + crc32c(frame).to_bytes(CRC_BYTES, "little")
    entries[number] = (offset, len(chunk))
    difference = len(chunk) - size
    entries = [(o + difference if offset < o < 2**63 else o, length) for o, length in entries]
    body = content[:offset] + chunk + content[offset + size : at]
    return _with_index(body, entries), note


def _path(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    paths = [path for path in sorted(root.rglob("*")) if path.name != ".lock"]
    path = rng.choice(paths)
    return f"{path.relative_to(root).as_posix()} {mutate_path(path, outside, rng)}"


def _extra(root: Path, outside: Path, rng: Random, signed: bool) -> str:
    name = rng.choice(("\x1b[31mred", "data.zarr/x", "labels/\x1b[2J", "commits/000099.json"))
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("labels"):
        path.mkdir()
        (path / "manifest.json").write_text("{}")
    else:
        path.write_text("{}")
    return repr(name)


def _raw_json(path: Path, rng: Random) -> str:
    content, note = (mutate_json_text if rng.random() < 0.6 else mutate_bytes)(
        path.read_bytes(), rng
    )
    path.write_bytes(content)
    return note


def _own_hash(value: object) -> bytes:
    """Return a value as canonical JSON with its own hash; without, if it has no canonical form."""
    try:
        return canonical_json(with_own_hash(value))  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError):
        return json_bytes(value)


def sign_shards(root: Path, changed: list[Path]) -> None:
    """Record the sizes and hashes of shard files where the cache records them."""
    names = {path.relative_to(root).as_posix(): path for path in changed}
    table = root / "shards.parquet"
    if table.exists():
        rows = pq.read_table(table)
        records = rows.to_pylist()
        for record in records:
            if record["path"] in names:
                record["bytes"] = names[record["path"]].stat().st_size
                record["sha256"] = file_sha256(names[record["path"]])
        pq.write_table(pa.Table.from_pylist(records, rows.schema), table)
        reseal(root)
    for path in sorted(root.glob("commits/*.json")):
        value = json.loads(path.read_bytes())
        del value["sha256"]
        for entry in value["objects"]:
            if entry["path"] in names:
                entry["bytes"] = names[entry["path"]].stat().st_size
                entry["sha256"] = file_sha256(names[entry["path"]])
        path.write_bytes(canonical_json(with_own_hash(value)))


_MUTATIONS: dict[str, Callable[[Path, Path, Random, bool], str]] = {
    "manifest": _manifest,
    "samples": _samples,
    "shards": _shards,
    "commit": _commit,
    "node": _node,
    "artefact": _artefact,
    "payloads": _payloads,
    "log": _log,
    "path": _path,
    "extra": _extra,
}
