"""Open hostile caches, runs, interpreters and teachers, and count what each command answers.

    python benchmarks/fuzz.py --count 10000 [--seed 0] [--jobs 2] [--only N] [--results DIR]

Each input is an intact folder with one thing changed: a field of JSON or TOML, a column of Parquet,
bytes of payloads, weights or checkpoints, an index under a right checksum, or what a path is (a
FIFO, a link, a sparse file). Most changes of caches come with recomputed hashes. One command opens
the input in a process of its own, under limits of time and memory. It must succeed or be refused
in one line. A failure is a traceback, a hang, an abort, more than 1 GB of memory, a write outside
the given folders or a read that shows in the output, a control character on the terminal, markup
on a page, or exit code 0 with other results than those of the intact input although hashes were
not recomputed. The script exits with 1 if there is one, and lists the numbers; `--only N` runs one
again and prints what the command printed.

Results: docs/results/fuzz.json.
"""

import argparse
import gc
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
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
    *("dtcache.store.read_kernel", "dtcache.codec.rans"),
)
"""Modules that the parent imports, so that a child begins in milliseconds."""
POLL_SECONDS = 0.005
LISTED = 60
"""Failures whose details the record holds."""


def main() -> None:
    """Run the inputs, print every failure, and record the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="number of inputs [10000]")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs [0]")
    parser.add_argument("--only", type=int, help="run only the input of this number")
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time [1]")
    parser.add_argument(
        "--seconds", type=float, default=120, help="a command that takes longer hangs [120]"
    )
    _warm_up()
    from records import results_flag, write

    results_flag(parser)
    args = parser.parse_args()
    command = f"python benchmarks/fuzz.py --count {args.count} --seed {args.seed}"
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        numbers = range(args.count) if args.only is None else range(args.only, args.only + 1)
        verdicts = list(_campaign(numbers, args, Path(scratch)))
    failures = [v for v in verdicts if v.verdict not in ("ok", "refused")]
    if args.only is None:
        write(args.results / "fuzz.json", command, _counts(verdicts), time.time() - started)
    totals = Counter(v.verdict for v in verdicts)
    print(", ".join(f"{name} {count}" for name, count in totals.most_common()))
    sys.exit(1 if failures else 0)


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


def _campaign(numbers: range, args: argparse.Namespace, scratch: Path) -> Iterator[Any]:
    """Yield the verdict of every input, in the order of their ends."""
    from support.fuzz.cases import VERBS, begin, begin_intact, choice, tree_digest
    from support.fuzz.children import start
    from support.fuzz.originals import write_originals

    base = scratch / "originals"
    work = scratch / "work"
    for folder in (base, work, scratch / "writer"):
        folder.mkdir()
    gc.freeze()

    def write() -> int:
        write_originals(base)
        return 0

    writer = start(scratch / "writer", lambda: None, write)
    while (ending := writer.poll(1800)) is None:
        time.sleep(POLL_SECONDS)
    if ending.exit_code != 0:
        sys.exit((scratch / "writer/stderr").read_text())
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
            elif verdict.verdict not in ("ok", "refused"):
                print(f"{verdict!r}", flush=True)
            if done % 500 == 0:
                print(f"{done} of {len(numbers)} inputs", flush=True)
            shutil.rmtree(case.folder, ignore_errors=True)
            yield verdict
    if tree_digest(base) != digest:
        sys.exit("a command changed an original that it was not given to change")


def _counts(verdicts: list[Any]) -> dict[str, Any]:
    """Return the counts of verdicts, in all, by command and by kind of change."""

    def by(key: Any) -> dict[str, dict[str, int]]:
        table: dict[str, Counter[str]] = {}
        for v in verdicts:
            table.setdefault(key(v), Counter())[v.verdict] += 1
        return {name: dict(sorted(table[name].items())) for name in sorted(table)}

    failures = sorted(
        (v for v in verdicts if v.verdict not in ("ok", "refused")), key=lambda v: v.number
    )
    return {
        "inputs": len(verdicts),
        "verdicts": dict(sorted(Counter(v.verdict for v in verdicts).items())),
        "by_command": by(lambda v: v.verb),
        "by_change": by(lambda v: f"{v.original}: {v.mutation.partition(' ')[0].rstrip(':')}"),
        "slowest_s": round(max(v.seconds for v in verdicts), 1),
        "peak_mib": max(v.peak_bytes for v in verdicts) >> 20,
        "failures": [
            {
                "number": v.number,
                "command": v.verb,
                "original": v.original,
                "change": v.mutation[:200],
                "verdict": v.verdict,
            }
            for v in failures[:LISTED]
        ],
    }


if __name__ == "__main__":
    main()
