"""Open hostile caches, runs, interpreters and teachers, and count what each command answers.

    python benchmarks/fuzz.py --count 10000 [--seed 0] [--jobs 2] [--log FILE] [--only N]

Each input is an intact folder with one thing changed: a field of JSON or TOML, a column of Parquet,
bytes of payloads, weights or checkpoints, an index under a right checksum, or what a path is (a
FIFO, a link, a sparse file). Most changes of caches come with recomputed hashes. One command opens
the input in a process of its own, under limits of time and memory. It must succeed or be refused
in one line. A failure is a traceback, a hang, an abort, more than 1 GB of memory, a write outside
the given folders or a read that shows in the output, a control character on the terminal, markup
on a page, or exit code 0 with other results than those of the intact input although hashes were
not recomputed. The script exits with 1 if there is one, and lists the numbers; `--only N` runs one
again and prints what the command printed.

With `--log FILE`, each verdict is appended to FILE when its command ends. A run with the same file
and seed continues there: it skips the inputs that succeeded or were refused, and runs the failures
again. The results then name every commit whose commands gave a verdict.

Results: docs/results/fuzz.json.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM = (
    *("cli", "pipelines.train.train", "pipelines.train.shared_loader"),
    *("pipelines.extract.extract", "pipelines.inspect.inspect", "pipelines.inspect.statistics"),
    *("pipelines.inspect.page.cache_page", "pipelines.inspect.page.run_page"),
    *("pipelines.inspect.statistics.remeasure", "pipelines.verify.verify"),
    *("pipelines.verify.report", "pipelines.verify.repair", "pipelines.label.fit_interpreter"),
    *("pipelines.label.write_labels", "pipelines.evaluate.evaluate", "pipelines.export"),
    *("pipelines.evaluate.classification", "pipelines.describe_teacher", "dtcache.teacher.load"),
    *("pipelines.runs.curves", "pipelines.train.online_batches", "dtcache.images.source_images"),
    *(
        "dtcache.store.read_kernel",
        "dtcache.codec.rans",
        "sklearn.cluster",
        "sklearn.linear_model",
        "timm",
        "zarr",
    ),
    *("distributed", "dateutil.tz", "zarrs"),
)
"""Modules that the parent imports, so that a child begins in milliseconds."""
POLL_SECONDS = 0.02
LISTED = 60
"""Failures whose details the record holds."""


def main() -> None:
    """Run the inputs, print every failure, and record the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="number of inputs [10000]")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs [0]")
    parser.add_argument("--log", type=Path, help="append the verdicts to this file, and resume")
    parser.add_argument("--only", type=int, help="run only the input of this number")
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time [1]")
    parser.add_argument(
        "--seconds", type=float, default=120, help="a command that takes longer hangs [120]"
    )
    _warm_up()
    from records import commit, results_flag, write
    from support.fuzz.cases import ANSWERS

    results_flag(parser)
    args = parser.parse_args()
    command = f"python benchmarks/fuzz.py --count {args.count} --seed {args.seed}"
    started = time.time()
    log = VerdictLog(args.log, args.seed, commit())
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        if args.only is not None:
            numbers = [args.only]
        else:
            numbers = [n for n in range(args.count) if not log.is_answered(n)]
            print(f"{len(numbers)} of {args.count} inputs to run", flush=True)
        for verdict in _campaign(numbers, args, Path(scratch)):
            log.add(verdict)
    verdicts = log.verdicts(args.count if args.only is None else args.only + 1)
    failures = [v for v in verdicts if v["verdict"] not in ANSWERS]
    if args.only is None:
        seconds = sum(v["seconds"] for v in verdicts) if args.log else time.time() - started
        write(args.results / "fuzz.json", command, _counts(verdicts), seconds)
    totals = Counter(v["verdict"] for v in verdicts)
    print(", ".join(f"{name} {count}" for name, count in totals.most_common()))
    sys.exit(1 if failures else 0)


class VerdictLog:
    """Verdicts by number. They are also lines of a file if there is one; the last line counts."""

    def __init__(self, path: Path | None, seed: int, commit: str) -> None:
        """Read the verdicts of the same seed from the file. A torn last line is ignored."""
        self.path = path
        self.seed = seed
        self.commit = commit
        self.by_number: dict[int, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        text = path.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            verdict = json.loads(line)
            if verdict["seed"] == seed:
                self.by_number[verdict["number"]] = verdict
        if not text.endswith("\n"):
            os.truncate(path, len(text[: text.rfind("\n") + 1].encode()))

    def is_answered(self, number: int) -> bool:
        """True if the command succeeded on this input or refused it."""
        from support.fuzz.cases import ANSWERS

        return number in self.by_number and self.by_number[number]["verdict"] in ANSWERS

    def add(self, verdict: Any) -> None:
        """Record one verdict."""
        record = dataclasses.asdict(verdict) | {"seed": self.seed, "commit": self.commit}
        self.by_number[verdict.number] = record
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def verdicts(self, count: int) -> list[dict[str, Any]]:
        """Return the verdicts of the inputs below `count`, in the order of their numbers."""
        return [self.by_number[n] for n in sorted(self.by_number) if n < count]


def _warm_up() -> None:
    """Import everything, on one thread: a process with threads must not fork."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    # No case cuts the power.
    os.fsync = lambda handle: None
    for path in (ROOT / "tests", ROOT):
        sys.path.insert(0, str(path))
    import torch

    torch.set_num_threads(1)
    for name in WARM:
        importlib.import_module(name)


def _warm_up_kernels(base: Path) -> None:
    """Load the kernels, image formats and fonts that each child would load again."""
    from PIL import Image

    import dtcache
    from pipelines.runs.curves import plot_curves

    threads = _count_threads()
    Image.init()
    plot_curves({"loss": [1.0, 2.0]}, base / "curves.png", title="x", xlabel="x")
    (base / "curves.png").unlink()
    with dtcache.open(base / "cache") as cache:
        cache.features([cache.samples["key"][0].as_py()])
    gc.collect()
    gc.freeze()
    if _count_threads() != threads:
        sys.exit("the warm process started a thread, which its children would lack")


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _campaign(numbers: list[int], args: argparse.Namespace, scratch: Path) -> Iterator[Any]:
    """Yield the verdict of every input, in the order of their ends."""
    from support.fuzz.cases import ANSWERS, VERBS, begin, begin_intact, choice, tree_digest
    from support.fuzz.children import start
    from support.fuzz.originals import write_originals

    base = scratch / "originals"
    work = scratch / "work"
    for folder in (base, work, scratch / "writer"):
        folder.mkdir()

    def write() -> int:
        write_originals(base)
        return 0

    writer = start(scratch / "writer", lambda: None, write)
    while (ending := writer.poll(1800)) is None:
        time.sleep(POLL_SECONDS)
    if ending.exit_code != 0:
        sys.exit((scratch / "writer/stderr").read_text())
    _warm_up_kernels(base)
    digest = tree_digest(base)

    expected: dict[tuple[str, str], str] = {}
    needed = {choice(number, args.seed)[:2] for number in numbers}
    for name, original in sorted(needed):
        result = VERBS[name].result
        # An unfinished cache is refused by most commands.
        if result is None or original.startswith("begun") != name.startswith("extract"):
            continue
        case = begin_intact(name, original, base, work)
        while (intact := case.verdict(600)) is None:
            time.sleep(POLL_SECONDS)
        if intact.verdict != "ok":
            sys.exit(f"{name} fails on the intact {original}: {intact}")
        expected[name, original] = result(case.folder)
        shutil.rmtree(case.folder)

    waiting = iter(numbers)
    running = []
    done = 0
    while True:
        while len(running) < args.jobs and (number := next(waiting, None)) is not None:
            running.append(begin(number, args.seed, base, work, expected))
        if not running:
            break
        time.sleep(POLL_SECONDS)
        for case in list(running):
            verdict = case.verdict(args.seconds)
            if verdict is None:
                continue
            running.remove(case)
            done += 1
            if args.only is not None:
                print(verdict)
                print((case.folder / "stdout").read_text(errors="backslashreplace"))
                print((case.folder / "stderr").read_text(errors="backslashreplace"))
            elif verdict.verdict not in ANSWERS:
                print(f"{verdict!r}", flush=True)
            if done % 500 == 0:
                print(f"{done} of {len(numbers)} inputs", flush=True)
            shutil.rmtree(case.folder, ignore_errors=True)
            yield verdict
    if tree_digest(base) != digest:
        sys.exit("a command changed an original that it was not given to change")


def _counts(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of verdicts, in all, by command and by kind of change."""
    from support.fuzz.cases import ANSWERS

    def by(key: Callable[[dict[str, Any]], str]) -> dict[str, dict[str, int]]:
        table: dict[str, Counter[str]] = {}
        for v in verdicts:
            table.setdefault(key(v), Counter())[v["verdict"]] += 1
        return {name: dict(sorted(table[name].items())) for name in sorted(table)}

    def change(v: dict[str, Any]) -> str:
        return f"{v['original']}: {v['mutation'].partition(' ')[0].rstrip(':')}"

    return {
        "inputs": len(verdicts),
        "verdicts": dict(sorted(Counter(v["verdict"] for v in verdicts).items())),
        "commits": dict(Counter(v["commit"] for v in verdicts).most_common()),
        "by_command": by(lambda v: v["verb"]),
        "by_change": by(change),
        "slowest_s": round(max(v["seconds"] for v in verdicts), 1),
        "peak_mib": max(v["peak_bytes"] for v in verdicts) >> 20,
        "failures": [
            {
                "number": v["number"],
                "command": v["verb"],
                "original": v["original"],
                "change": v["mutation"][:200],
                "verdict": v["verdict"],
            }
            for v in verdicts
            if v["verdict"] not in ANSWERS
        ][:LISTED],
    }


if __name__ == "__main__":
    main()
