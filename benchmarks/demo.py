"""Run `dtcache demo` with its default options, record the result, and write its page.

    python benchmarks/demo.py [--name demo] [--work runs/demo]

The script skips stages that are finished in the work folder. Results: docs/results/NAME.json. The
page docs/results/demo.md shows every record whose name begins with `demo`. Environment variables
limit the CPU's instructions, for example ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, ROOT, write

from dtcache.device import resolve_compute
from dtcache.options import DemoOptions
from pipelines.demo import cost_of, demo


def main() -> None:
    """Run the demonstration; write the JSON file and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="demo", help="name of the record [demo]")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "demo",
        help="folder of the demonstration [runs/demo]",
    )
    args = parser.parse_args()
    summary = demo(args.work, DemoOptions())
    summary["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    summary["precision"] = resolve_compute("auto", "auto").precision
    seconds = sum(summary["seconds"].values())
    command = f"python benchmarks/demo.py --name {args.name}"
    write(RESULTS / f"{args.name}.json", command, summary, seconds)
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("demo*.json"))]
    (RESULTS / "demo.md").write_text("\n".join(page_lines(records)))


def page_lines(records: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the page: the options, then each record's machine, students and times."""
    options = DemoOptions()
    lines = [
        "# The demonstration",
        "",
        f"`dtcache demo` on {options.train_images} training and {options.test_images} test images.",
        "There are eight classes of scenes: chance is 12.5 %. The demonstration has one seed, so",
        "it supports no claim about student quality; it has no student of an untrained teacher as",
        "a control either. Its accuracies depend on the machine, since",
        "precision and instructions of the CPU change the rounding of every step.",
        "`python benchmarks/demo.py` writes this page and the JSON files beside it.",
        "",
    ]
    for record in records:
        lines += _section(record)
    return lines


def _section(record: dict[str, Any]) -> list[str]:
    """Return the lines of one record."""
    summary = record["result"]
    seconds = summary["seconds"]
    cpu_seconds = summary["cpu_seconds"]
    rows = []
    for student in summary["students"]:
        training = f"train {student['name'].split(',')[0]}"
        time = f"{cpu_seconds[training]:.0f} s" if "cache" in student["name"] else "-"
        rows.append(
            f"| {student['name']} | {student['knn_top1']:.1f} | {student['linear_top1']:.1f} | "
            f"{time} |"
        )
    return [
        f"## {summary['cpu_capability']}, {summary['precision']}",
        "",
        f"{sum(seconds.values()):.0f} s and {sum(cpu_seconds.values()):.0f} CPU seconds on "
        f"{record['machine']}, commit {record['commit']}.",
        f"{cost_of(summary)}.",
        "",
        "| student | k-NN top-1 % | linear probe top-1 % | training, CPU |",
        "|---|---|---|---|",
        *rows,
        "",
        f"CPU seconds: scenes {cpu_seconds['scenes']:.0f}, extraction with its fit "
        f"{cpu_seconds['extract']:.0f}.",
        "",
    ]


if __name__ == "__main__":
    main()
