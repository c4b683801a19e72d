"""The operation log of a writer, and the disk after a kill or a power cut at any point."""

import builtins
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dtcache import atomic_files as storage

Tree = dict[str, bytes | None]
"""Bytes of every file by path, None for a folder."""


@dataclass(frozen=True)
class Operation:
    """One change of a file system, or one fsync; paths are relative to the recorded folder."""

    kind: str
    path: str
    target: str = ""
    data: bytes = b""


class Recorder:
    """Record every write, fsync, rename, unlink, mkdir and rmdir below a folder.

    The real fsync is skipped.

    Each write of dtcache.atomic_files is recorded as two halves.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.log = list[Operation]()
        for kind, name in (
            ("rename", "replace"),
            ("mkdir", "mkdir"),
            ("unlink", "unlink"),
            ("rmdir", "rmdir"),
        ):
            patch.setattr(os, name, self._recorded(kind, getattr(os, name)))
        patch.setattr(
            os, "fsync", lambda handle: self.add("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        )
        patch.setattr(storage, "open", self._open, raising=False)

    def add(self, kind: str, path: Any, target: Any = None, data: bytes = b"") -> None:
        """Append one operation."""
        names = [
            "" if p is None else Path(p).relative_to(self.root).as_posix() for p in (path, target)
        ]
        self.log.append(Operation(kind, *names, data))

    def _recorded(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            result = function(path, *rest, **options)  # a call that raises is not recorded
            folder = options.get("dir_fd")
            whole = Path(
                path if folder is None else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
            )
            self.add(kind, whole, rest[0] if kind == "rename" else None)
            return result

        return call

    def _open(self, path: Path, mode: str) -> Any:
        if mode[0] not in "wx":
            return builtins.open(path, mode)
        self.add("create", path)
        return Written(self, path)


class Written:
    """A file whose writes are recorded as two halves."""

    def __init__(self, recorder: Recorder, path: Path) -> None:
        self._recorder = recorder
        self._path = path
        self._file = builtins.open(path, "wb")  # noqa: SIM115

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        """Write and record both halves."""
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._recorder.add("write", self._path, data=bytes(half))
        self._file.write(data)


@dataclass
class Node:
    """A file or folder, as processes see it and as its last fsync left it on disk."""

    is_folder: bool
    data: bytes = b""
    kept_data: bytes = b""
    names: dict[str, "Node"] = field(default_factory=dict)
    kept_names: dict[str, "Node"] = field(default_factory=dict)


class Disk:
    """A file system with POSIX guarantees only: fsync keeps a file's bytes or a folder's names."""

    def __init__(self, tree: Tree) -> None:
        self._root = Node(is_folder=True)
        for path, data in sorted(tree.items()):
            folder, name = self._place(path)
            folder.names[name] = Node(
                is_folder=data is None, data=data or b"", kept_data=data or b""
            )
            folder.kept_names = dict(folder.names)

    def apply(self, operation: Operation) -> None:
        """Apply one operation."""
        if operation.kind == "fsync":
            node = self._node(operation.path)
            node.kept_data = node.data
            node.kept_names = dict(node.names)
            return
        folder, name = self._place(operation.path)
        if operation.kind == "mkdir":
            folder.names[name] = Node(is_folder=True)
        elif operation.kind == "create":
            folder.names.setdefault(name, Node(is_folder=False)).data = b""
        elif operation.kind == "write":
            folder.names[name].data += operation.data
        elif operation.kind == "rename":
            node = folder.names.pop(name)
            other, new = self._place(operation.target)
            other.names[new] = node
        else:
            del folder.names[name]

    def left(self, *, writes: bool, names: bool) -> Tree:
        """Return the tree after a crash, with un-fsynced `writes` and `names` each kept or lost."""
        found: Tree = {}

        def walk(folder: Node, prefix: str) -> None:
            for name, node in sorted((folder.names if names else folder.kept_names).items()):
                found[prefix + name] = (
                    None if node.is_folder else node.data if writes else node.kept_data
                )
                walk(node, f"{prefix}{name}/")

        walk(self._root, "")
        return found

    def _node(self, path: str) -> Node:
        node = self._root
        for part in () if path == "." else path.split("/"):
            node = node.names[part]
        return node

    def _place(self, path: str) -> tuple[Node, str]:
        folder, _, name = path.rpartition("/")
        return self._node(folder or "."), name


def lay_out(tree: Tree, root: Path) -> Path:
    """Write a tree into a new folder."""
    root.mkdir()
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)
    return root
