"""One case: an original, one mutation of it, one command, and a verdict."""

import functools
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from support.fuzz.caches import mutate_cache
from support.fuzz.children import HARNESS_FAILED, TRACEBACK, Child, Ending, start
from support.fuzz.folders import mutate_folder
from support.fuzz.json_values import MARKUP
from support.fuzz.originals import EXTRACT, SECRET, TRAIN, write_outside

from pipelines.terminal.text import printable

MEMORY_BYTES = 1 << 30
"""Memory that no command may exceed on these small inputs."""
OUTPUT_BYTES = 1 << 20
ANSWERS = ("ok", "refused")
"""Verdicts that are no failure."""
FAILURES = (
    *("harness", "hang", "abort", "traceback", "memory", "outside", "escape", "markup"),
    *("message", "data"),
)
VOLATILE = ("extraction.log.json", ".lock", "cluster.log")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """A command on a mutated input."""

    words: str
    """{G} is the mutated copy, {B} the folder of the originals, {O} a new folder."""
    weight: int
    originals: tuple[str, ...]
    result: Callable[[Path], str] | None = None
    """Digest of what the command computed, given the case's folder."""
    writes: bool = False
    """True if the command may write into the mutated copy."""
    beside: str = ""
    """An original that the command writes into, copied to the new folder."""
    codes: tuple[int, ...] = (1, 2)
    """Exit codes, except 0, that the command may end with."""


def tree_digest(root: Path) -> str:
    """Return the SHA-256 of a folder's paths and bytes, without the files that may differ.

    Links to folders are followed, as a reader follows them.
    """
    digest = hashlib.sha256()
    names = [
        Path(folder) / name
        for folder, _, files in os.walk(root, followlinks=True)
        for name in files
    ]
    for path in sorted(names):
        if path.is_file() and path.name not in VOLATILE:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _given(case: Path) -> str:
    (given,) = (case / "given").iterdir()
    return tree_digest(given)


def _manifest(case: Path) -> str:
    """Return the digest of a cache's manifest, whose hashes cover the cache.

    Resuming compares the sizes of finished shard files. Their hashes are compared when they are
    read, so a damaged one remains damaged: it differs from the manifest.
    """
    (given,) = (case / "given").iterdir()
    return hashlib.sha256((given / "manifest.json").read_bytes()).hexdigest()


def _weights(case: Path) -> str:
    (model,) = (case / "out").glob("*/backbone/model.safetensors")
    return hashlib.sha256(model.read_bytes()).hexdigest()


def _interpreter(case: Path) -> str:
    return hashlib.sha256((case / "out/new/model.safetensors").read_bytes()).hexdigest()


def _labels(case: Path) -> str:
    (given,) = (case / "given").iterdir()
    return tree_digest(given / "labels/again")


def _json(case: Path) -> str:
    value = json.loads((case / "stdout").read_text())
    if isinstance(value, dict):
        for name in ("model", "path", "log", "extraction"):
            value.pop(name, None)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_CACHES = ("cache", "cache", "fp16", "begun")
_SEALED = ("cache", "cache", "fp16")
_VERIFY = (1, 2, 3, 4, 5)
_REPAIR = "--repair --images {B}/scenes/images --teacher {B}/teacher --interpreter {B}/interpreter"
VERBS: dict[str, Verb] = {
    "inspect": Verb(words="inspect {G}", weight=12, originals=_CACHES),
    "inspect --json": Verb(words="inspect {G} --json", weight=6, originals=_CACHES),
    "inspect --stats": Verb(
        words="inspect {G} --stats --num-samples 8", weight=5, originals=_CACHES
    ),
    "inspect --report": Verb(
        words="inspect {G} --report {O}/page.html", weight=6, originals=_CACHES
    ),
    "inspect two": Verb(words="inspect {B}/cache {G}", weight=5, originals=_CACHES),
    "verify": Verb(words="verify {G}", weight=14, originals=_CACHES, result=_given, codes=_VERIFY),
    "verify --json": Verb(
        words="verify {G} --json", weight=4, originals=_CACHES, result=_given, codes=_VERIFY
    ),
    "verify --repair": Verb(
        words=f"verify {{G}} {_REPAIR}",
        weight=8,
        originals=_CACHES,
        result=_given,
        writes=True,
        codes=_VERIFY,
    ),
    "train": Verb(
        words=f"train {{G}} {TRAIN} --out {{O}}/run",
        weight=12,
        originals=_SEALED,
        result=_weights,
    ),
    "train --labels": Verb(
        words=f"train {{G}} {TRAIN} --labels parts --out {{O}}/run",
        weight=4,
        originals=("cache",),
        result=_weights,
    ),
    "label fit": Verb(
        words=(
            "label fit {G} --masks {B}/scenes/masks --out {O}/new --width 32 --epochs 2 "
            "--warmup-epochs 1 --device cpu --limit 12"
        ),
        weight=4,
        originals=_SEALED,
        result=_interpreter,
    ),
    "label write": Verb(
        words="label write {G} {B}/interpreter --name again --masks {B}/scenes/masks",
        weight=5,
        originals=("cache",),
        result=_labels,
        writes=True,
    ),
    "evaluate": Verb(
        words="evaluate {G} --train {B}/scenes/images --device cpu --json",
        weight=5,
        originals=_SEALED,
        result=_json,
    ),
    "extract resumed": Verb(
        words=f"extract {{B}}/scenes/images --teacher {{B}}/teacher {EXTRACT} --out {{G}}",
        weight=10,
        originals=("begun",),
        result=_manifest,
        writes=True,
    ),
    "inspect run": Verb(words="inspect {G}", weight=6, originals=("run", "begun-run")),
    "inspect run --report": Verb(
        words="inspect {G} --report {O}/page.html", weight=3, originals=("run", "begun-run")
    ),
    "inspect two runs": Verb(words="inspect {B}/run {G}", weight=3, originals=("run",)),
    "train resumed": Verb(
        words=f"train {{B}}/cache {TRAIN} --out {{G}}",
        weight=10,
        originals=("begun-run", "begun-run", "run"),
        writes=True,
    ),
    "train --extend": Verb(
        words=f"train {{B}}/cache {TRAIN} --extend {{G}} --out {{O}}/run",
        weight=4,
        originals=("run",),
    ),
    "train --init": Verb(
        words=f"train {{B}}/cache {TRAIN} --init {{G}} --out {{O}}/run",
        weight=3,
        originals=("run/backbone",),
    ),
    "export": Verb(
        words="export {G} --to timm --out {O}/exported", weight=5, originals=("run", "begun-run")
    ),
    "evaluate run": Verb(
        words="evaluate {G} --train {B}/scenes/images --device cpu",
        weight=3,
        originals=("run/backbone",),
    ),
    "label write, interpreter": Verb(
        words="label write {O}/cache {G} --name new --masks {B}/scenes/masks",
        weight=4,
        originals=("interpreter",),
        beside="cache",
    ),
    "teacher show": Verb(words="teacher show {G}", weight=8, originals=("teacher",)),
    "extract, teacher": Verb(
        words=f"extract {{B}}/scenes/images --teacher {{G}} {EXTRACT} --limit 16 --out {{O}}/cache",
        weight=8,
        originals=("teacher",),
    ),
    "train, teacher": Verb(
        words=(
            f"train {{B}}/scenes/images --teacher {{G}} --timestep 150 --taps 4,8 {TRAIN} "
            "--out {O}/run"
        ),
        weight=2,
        originals=("teacher",),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a command did with a mutated input."""

    number: int
    verb: str
    original: str
    mutation: str
    verdict: str
    detail: str
    seconds: float
    peak_bytes: int


@dataclass(slots=True)
class Case:
    """A case that runs. `number` and the seed of all cases decide everything in it."""

    number: int
    verb_name: str
    original: str
    child: Child
    folder: Path
    expected: str | None
    """Digest of the command's result on the intact original."""

    def verdict(self, seconds: float) -> Verdict | None:
        """Return the verdict once the command has ended, else None."""
        ending = self.child.poll(seconds)
        if ending is None:
            return None
        record = self.folder / "mutation.json"
        value = json.loads(record.read_text()) if record.exists() else {}
        name, detail = self._judge(ending, value)
        return Verdict(
            number=self.number,
            verb=self.verb_name,
            original=self.original,
            mutation=value.get("note", ""),
            verdict=name,
            detail=detail,
            seconds=ending.seconds,
            peak_bytes=ending.peak_bytes,
        )

    def _judge(self, ending: Ending, value: dict[str, object]) -> tuple[str, str]:
        verb = VERBS[self.verb_name]
        errors = _text(self.folder / "stderr")
        shown = _text(self.folder / "stdout") + errors
        last = errors.strip().splitlines()[-1:] or [""]
        if ending.exit_code == HARNESS_FAILED:
            return "harness", errors[-2000:]
        if ending.timed_out:
            return "hang", last[0][:300]
        if ending.signal is not None:
            return "abort", f"signal {ending.signal}: {last[0][:300]}"
        if ending.exit_code == TRACEBACK or "Traceback (most recent call last)" in shown:
            return "traceback", errors[-2000:]
        if ending.peak_bytes > MEMORY_BYTES:
            return "memory", f"{ending.peak_bytes >> 20} MiB; {last[0][:300]}"
        if problem := self._outside(verb, value):
            return "outside", problem
        if printable(shown) != shown:
            control = next(c for c in shown if printable(c) != c)
            return "escape", f"{control!r} in {shown[:300]!r}"
        if len(shown) > OUTPUT_BYTES:
            return "escape", f"{len(shown)} characters of output"
        for page in (self.folder / "out").rglob("*.html"):
            if MARKUP in page.read_text(errors="replace"):
                return "markup", str(page.name)
        if ending.exit_code:
            if ending.exit_code not in verb.codes:
                return "message", f"exit code {ending.exit_code}: {errors[-300:]}"
            lines = [line for line in errors.splitlines() if line.startswith("Error: ")]
            # `verify` reports damage, and label sets that it cannot read, on stdout.
            answered = ending.exit_code in (3, 4, 5) and shown != errors
            if not answered and (len(lines) != 1 or last != lines):
                return "message", f"exit code {ending.exit_code}: {errors[-300:]}"
            return "refused", last[0][:300]
        if verb.result is not None and self.expected is not None and not value["signed"]:
            try:
                result = verb.result(self.folder)
            except (OSError, ValueError) as error:
                return "data", f"no result: {error}"
            if result != self.expected:
                return "data", "exit code 0, and another result than that of the original"
        return "ok", ""

    def _outside(self, verb: Verb, value: dict[str, object]) -> str | None:
        names = {path.name for path in self.folder.iterdir()}
        allowed = {"given", "outside", "out", "home", "stdout", "stderr", "baseline"}
        if more := sorted(names - allowed - {"mutation.json"}):
            return f"a new file: {more[0]}"
        if snapshot(self.folder / "outside") != value["outside"]:
            return "the folder outside was changed"
        if not verb.writes and snapshot(self.folder / "given") != value["given"]:
            return "the given folder was changed"
        for root in ("stdout", "stderr", "out"):
            top = self.folder / root
            for path in [top] if top.is_file() else top.rglob("*"):
                is_own = path.is_file() and not path.is_symlink()
                if is_own and SECRET.encode() in path.read_bytes():
                    return f"the secret is in {path.relative_to(self.folder)}"
        return None


def choice(number: int, seed: int) -> tuple[str, str, Random]:
    """Return the command and the original of a case, and the generator of its mutation."""
    rng = Random(f"{seed}:{number}")
    verb_name = rng.choices(list(VERBS), [verb.weight for verb in VERBS.values()])[0]
    return verb_name, rng.choice(VERBS[verb_name].originals), rng


def begin(
    number: int, seed: int, base: Path, work: Path, expected: dict[tuple[str, str], str]
) -> Case:
    """Start a case: choose a command, copy and change its original, and run it in a child."""
    verb_name, original, rng = choice(number, seed)
    folder = work / f"{number}"
    child = _start(verb_name, original, folder, base, rng)
    return Case(
        number=number,
        verb_name=verb_name,
        original=original,
        child=child,
        folder=folder,
        expected=expected.get((verb_name, original)),
    )


def begin_intact(verb_name: str, original: str, base: Path, work: Path) -> Case:
    """Start a command on an intact original."""
    folder = work / f"intact-{list(VERBS).index(verb_name)}-{Path(original).name}"
    child = _start(verb_name, original, folder, base, None)
    return Case(
        number=-1,
        verb_name=verb_name,
        original=original,
        child=child,
        folder=folder,
        expected=None,
    )


def _start(verb_name: str, original: str, folder: Path, base: Path, rng: Random | None) -> Child:
    folder.mkdir()
    verb = VERBS[verb_name]
    given = folder / "given" / Path(original).name
    out = folder / "out"

    def prepare() -> None:
        shutil.copytree(base / original, given)
        write_outside(folder / "outside")
        out.mkdir()
        if verb.beside:
            shutil.copytree(base / verb.beside, out / verb.beside)
        note = "none"
        signed = False
        if rng is not None and (given / "manifest.json").exists():
            note, signed = mutate_cache(given, folder / "outside", rng)
        elif rng is not None:
            note = mutate_folder(given, folder / "outside", rng)
        record = {
            "note": note,
            "signed": signed,
            "given": snapshot(folder / "given"),
            "outside": snapshot(folder / "outside"),
        }
        (folder / "mutation.json").write_text(json.dumps(record))

    return start(
        folder,
        prepare,
        functools.partial(
            run_command, [word.format(G=given, B=base, O=out) for word in verb.words.split()]
        ),
    )


def run_command(words: list[str]) -> int:
    """Run `dtcache` in this process and return its exit code."""
    from cli import main

    try:
        main(words, prog_name="dtcache")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def snapshot(root: Path) -> dict[str, list[int]]:
    """Return type, size, time of the last change and inode of every path below a folder."""
    entries = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            info = path.lstat()
            is_folder = stat.S_ISDIR(info.st_mode)
            entries[os.fsencode(path.relative_to(root)).hex()] = (
                [info.st_mode]
                if is_folder
                else [info.st_mode, info.st_size, info.st_mtime_ns, info.st_ino]
            )
    return entries


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape") if path.exists() else ""
