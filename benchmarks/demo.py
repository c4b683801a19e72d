"""Run `dtcache demo` with its defaults; record the result with machine and commit, and write its
page.

    python benchmarks/demo.py [--work runs/demo]

Stages that are finished in the work folder are not repeated. Results: docs/results/demo.json and
demo.md.
"""

import argparse
from pathlib import Path
from typing import Any

from records import RESULTS, ROOT, commit, machine, write

from dtcache.options import DemoOptions
from pipelines.demo import cost_of, demo


def main() -> None:
    """Run the demonstration and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "demo", help="folder of the demonstration"
    )
    asked = parser.parse_args()
    summary = demo(asked.work, DemoOptions())
    seconds = sum(summary["seconds"].values())
    write(RESULTS / "demo.json", "python benchmarks/demo.py", summary, seconds)
    (RESULTS / "demo.md").write_text("\n".join(page_lines(summary, seconds)))


def page_lines(summary: dict[str, Any], seconds: float) -> list[str]:
    """Return the lines of the page: machine, bytes per image, students, times."""
    spent = summary["seconds"]
    rows = []
    for student in summary["students"]:
        trained = spent[f"train {student['name'].split(',')[0]}"]
        time = f"{trained:.0f} s" if "cache" in student["name"] else "-"
        rows.append(
            f"| {student['name']} | {student['knn_top1']:.1f} | {student['linear_top1']:.1f} | "
            f"{time} |"
        )
    evaluations = [value for name, value in spent.items() if name.startswith("evaluate")]
    options = DemoOptions()
    return [
        "# The demonstration",
        "",
        f"`dtcache demo` took {seconds:.0f} s on {machine()}, commit {commit()}. "
        f"{cost_of(summary)}.",
        "The demonstration has one seed, so it supports no claim about student quality. "
        "`demo.json` has the "
        "whole result;",
        "`python benchmarks/demo.py` writes both files.",
        "",
        "| student | k-NN top-1 % | linear probe top-1 % | training |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Chance is 12.5 %: eight classes of scenes, with {options.train_images} training and "
        f"{options.test_images} test",
        f"images. Writing the scenes took {spent['scenes']:.0f} s, fitting the codec and "
        f"extracting the cache "
        f"{spent['extract']:.0f} s,",
        f"evaluating each row of the table {min(evaluations):.0f} to {max(evaluations):.0f} s.",
        "",
    ]


if __name__ == "__main__":
    main()
