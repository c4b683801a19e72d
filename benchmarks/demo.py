"""The demonstration as `dtcache demo` runs it, kept with its machine and commit, and its page.

    python benchmarks/demo.py [--work runs/demo]

A demonstration that the work folder holds is not repeated. Results: docs/results/demo.json and demo.md.
"""

import argparse
from pathlib import Path
from typing import Any

from records import RESULTS, ROOT, commit, machine, write

from dtcache.options import DemoOptions
from pipelines.demo import cost_of, demo


def main() -> None:
    """Run it with its defaults and write both files."""
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
    """Return the page: what was run where, what an image costs, a row a student before and after, the times."""
    spent = summary["seconds"]
    rows = []
    for student in summary["students"]:
        trained = spent[f"train {student['name'].split(',')[0]}"]
        time = f"{trained:.0f} s" if "cache" in student["name"] else "-"
        rows.append(
            f"| {student['name']} | {student['knn_top1']:.1f} | {student['linear_top1']:.1f} | {time} |"
        )
    evaluations = [value for name, value in spent.items() if name.startswith("evaluate")]
    options = DemoOptions()
    return [
        "# The demonstration",
        "",
        f"`dtcache demo` on {machine()}, commit {commit()}: {seconds:.0f} s in all. {cost_of(summary)}.",
        "One seed: a demonstration, not a claim about student quality. The whole result is in `demo.json`; both files",
        "are written by `python benchmarks/demo.py`.",
        "",
        "| student | k-NN top-1 % | linear probe top-1 % | training |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Chance is 12.5 % (eight classes of scenes, {options.train_images} training and {options.test_images} test",
        f"images). Scenes are written in {spent['scenes']:.0f} s, the cache is fitted and extracted in "
        f"{spent['extract']:.0f} s,",
        f"each row of the table is evaluated in {min(evaluations):.0f} to {max(evaluations):.0f} s.",
        "",
    ]


if __name__ == "__main__":
    main()
