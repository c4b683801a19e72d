"""Run `dtcache demo` with its default options, record the result, and write its page.

    python benchmarks/demo.py [--work runs/demo]

The script skips stages that are finished in the work folder. Results: docs/results/demo.json and
demo.md.
"""

import argparse
from pathlib import Path
from typing import Any

from records import RESULTS, ROOT, commit, machine, write

from dtcache.options import DemoOptions
from pipelines.demo import cost_of, demo


def main() -> None:
    """Run the demonstration; write the JSON file and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "demo",
        help="folder of the demonstration [runs/demo]",
    )
    args = parser.parse_args()
    summary = demo(args.work, DemoOptions())
    seconds = sum(summary["seconds"].values())
    write(RESULTS / "demo.json", "python benchmarks/demo.py", summary, seconds)
    (RESULTS / "demo.md").write_text("\n".join(page_lines(summary, seconds)))


def page_lines(summary: dict[str, Any], seconds: float) -> list[str]:
    """Return the lines of the page: machine, bytes per image, students, times."""
    stage_seconds = summary["seconds"]
    rows = []
    for student in summary["students"]:
        training = stage_seconds[f"train {student['name'].split(',')[0]}"]
        time = f"{training:.0f} s" if "cache" in student["name"] else "-"
        rows.append(
            f"| {student['name']} | {student['knn_top1']:.1f} | {student['linear_top1']:.1f} | "
            f"{time} |"
        )
    evaluations = [value for name, value in stage_seconds.items() if name.startswith("evaluate")]
    options = DemoOptions()
    return [
        "# The demonstration",
        "",
        f"`dtcache demo` took {seconds:.0f} s on {machine()}, commit {commit()}.",
        f"{cost_of(summary)}.",
        "The demonstration has one seed, so it supports no claim about student quality.",
        "`python benchmarks/demo.py` writes this page and `demo.json`, which has all results.",
        "",
        "| student | k-NN top-1 % | linear probe top-1 % | training |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Chance is 12.5 %: there are eight classes of scenes, {options.train_images} training "
        f"images and {options.test_images} test images.",
        f"Writing the scenes took {stage_seconds['scenes']:.0f} s.",
        f"Fitting the codec and extracting the cache took {stage_seconds['extract']:.0f} s.",
        f"Evaluating a row of the table took {min(evaluations):.0f} to {max(evaluations):.0f} s.",
        "",
    ]


if __name__ == "__main__":
    main()
