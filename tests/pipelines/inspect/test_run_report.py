"""Runs inspected, and the differences between two runs or two caches."""

import json
import re
from pathlib import Path

import pytest
from store.builders import FINE, begin, tiny_plan
from support.inspecting import documented, inspect, page_of

from dtcache.store.summary import inspect_cache
from pipelines.inspect import run_report as student_run
from pipelines.inspect.compare import differences
from pipelines.runs.folder import METRICS, RUN, SUMMARY

pytestmark = pytest.mark.usefixtures("apart")


def a_run(root: Path, **changed: object) -> Path:
    """Write the files of a run."""
    root.mkdir()
    options = {
        "student": "resnet10t",
        "cache": "ab" * 32,
        "samples": "cd" * 32,
        "lr": 0.1,
        **changed,
    }
    (root / RUN).write_text(json.dumps(options))
    lines = [
        {"step": 2, "loss": 3.0},
        {"step": 2, f"held_out/mse/{FINE}": 1.5, f"held_out/at/{FINE}": 0.2, "held_out/loss": 3.1},
        {"step": 4, "loss": 2.0},
        {"step": 4, f"held_out/mse/{FINE}": 1.0, f"held_out/at/{FINE}": 0.1, "held_out/loss": 2.1},
    ]
    (root / METRICS).write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 6, "lo'
    )
    return root


def finish(root: Path, loss: float) -> None:
    """Write the results of a run."""
    held = {f"mse/{FINE}": 1.0, f"at/{FINE}": 0.1, "loss": loss}
    results = {
        "steps": 4,
        "loss": 2.0,
        "held_out": held,
        "noise_floor": {FINE: 0.2},
        "seconds": 9.0,
        "images_per_second": 7.0,
        "wait_share": 0.1,
    }
    (root / SUMMARY).write_text(json.dumps(results))


def test_a_run_is_inspected_finished_or_not(tmp_path: Path) -> None:
    """A run's curves end before a truncated line, and its results are those of the summary."""
    root = a_run(tmp_path / "run")
    report = json.loads(inspect(root, "--json").stdout)
    assert (report["kind"], report["state"], report["steps"], report["results"]) == (
        "run",
        "unfinished",
        4,
        None,
    )
    assert report["curves"][f"held_out/mse/{FINE}"] == {"steps": [2, 4], "values": [1.5, 1.0]}
    assert report["taps"] == [FINE]
    assert documented("a run") == sorted(report)
    finish(root, 2.1)
    output = inspect(root).output
    assert "finished, 4 steps" in output and "2.1000" in output and "0.200" in output
    page = page_of(root, tmp_path / "run.html")
    assert f'aria-label="{FINE}"' in page and "2.1000" in page and "Pass --cache CACHE" in page


def test_a_run_of_averaged_weights_shows_these(tmp_path: Path) -> None:
    """With --ema-decay the held-out curve is the EMA's, and the last weights' curve is dashed."""
    root = a_run(tmp_path / "run", ema_decay=0.9)
    with open(root / METRICS, "w") as file:
        for step, last, average in ((2, 4.0, 8.0), (4, 3.0, 1.0)):
            values = {"held_out/loss": last, "held_out_ema/loss": average}
            file.write(json.dumps({"step": step, "loss": 2.0, **values}) + "\n")
    finish(root, 1.0)
    report = json.loads(inspect(root, "--json").stdout)
    assert report["weights"] == "average"
    assert student_run.held_out_curve(report, "loss") == {"steps": [2, 4], "values": [8.0, 1.0]}
    assert json.loads(inspect(a_run(tmp_path / "plain"), "--json").stdout)["weights"] == "last"
    assert "averaged over steps" in inspect(root).output
    page = page_of(root, tmp_path / "run.html")
    assert "weights averaged over steps (EMA)" in page and "dashed" in page
    chart = page[page.index('aria-label="held-out loss"') :].partition("</svg>")[0]
    lines = dict(re.findall(r'<polyline class="([^"]+)" points="([^"]+)"', chart))
    ends = {
        style: [float(point.split(",")[1]) for point in points.split()]
        for style, points in lines.items()
    }
    # Pixel rows count downwards: the EMA's curve begins highest and ends lowest.
    assert ends["c0"][0] < ends["c0 dashed"][0] < ends["c0 dashed"][1] < ends["c0"][1]
    assert "dashed are" not in page_of(tmp_path / "plain", tmp_path / "plain.html")


def test_a_run_on_several_caches_is_inspected_without_pictures(tmp_path: Path) -> None:
    """A run on several caches has a page; a cache for its pictures is refused."""
    root = a_run(tmp_path / "run")
    record = json.loads((root / RUN).read_text())
    record["caches"] = {"ddpm": [{"cache": record.pop("cache")}], "vit": [{"cache": "ef" * 32}]}
    (root / RUN).write_text(json.dumps(record))
    assert "MSE" in page_of(root, tmp_path / "run.html")
    result = inspect(root, "--cache", "x", "--report", tmp_path / "x.html")
    assert f"--cache x: {root} was trained on several caches" in " ".join(result.output.split())


def test_a_run_with_the_teacher_in_the_loop_is_inspected(tmp_path: Path) -> None:
    """A run with an online teacher shows the teacher, and inspect refuses a cache for the run."""
    root = a_run(tmp_path / "run", teacher="photos-teacher", teacher_weights_sha256="ef" * 32)
    record = json.loads((root / RUN).read_text())
    del record["cache"]
    (root / RUN).write_text(json.dumps(record))
    assert "photos-teacher" in inspect(root).output
    assert "MSE" in page_of(root, tmp_path / "run.html")
    result = inspect(root, "--cache", "x", "--report", tmp_path / "x.html")
    assert (
        f"--cache x: {root} was trained with the teacher in the loop, on no cache; leave it out"
        in result.output
    )


def test_runs_differ_in_options_and_results(tmp_path: Path) -> None:
    """Two runs show their differing options and results, on the terminal and on one page."""
    roots = [a_run(tmp_path / "a"), a_run(tmp_path / "b", lr=0.2)]
    for root, loss in zip(roots, (2.1, 1.9), strict=True):
        finish(root, loss)
    report = json.loads(inspect(*roots, "--json").stdout)
    assert report["differences"] == {"options.lr": [0.1, 0.2], "results.held_out.loss": [2.1, 1.9]}
    assert "held_out.loss" in inspect(*roots).output
    result = inspect(*roots, "--report", tmp_path / "runs.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "runs.html").read_text()
    assert "Differences" in page and page.count("<polyline") >= 2 * 4
    assert (
        "--cache: expected one run with it"
        in inspect(*roots, "--report", tmp_path / "y.html", "--cache", "x").output
    )


def test_two_caches_stand_side_by_side(tiny_cache: Path, tmp_path: Path) -> None:
    """Differing fields of two caches are shown with both values, and equal fields are not shown."""
    plan = tiny_plan()
    writer = begin(tmp_path / "other", plan)
    writer.write_shard(plan.shards[0])
    report = json.loads(inspect(tiny_cache, tmp_path / "other", "--json").stdout)
    assert (report["kind"], report["schema"], len(report["reports"])) == ("comparison", 1, 2)
    assert report["differences"]["num_done"] == [9, 4]
    assert report["differences"]["state"] == ["complete", "unfinished"]
    assert "num_images" not in report["differences"]
    output = inspect(tiny_cache, tmp_path / "other").output
    assert "recipe and options: nothing differs" in output
    assert "unfinished" in output
    assert differences([inspect_cache(tiny_cache)] * 2) == {}


def test_timesteps_stand_side_by_side(tiny_cache: Path) -> None:
    """A tap at T = 150 is compared with the same tap of a cache of T = 50."""
    report = inspect_cache(tiny_cache)
    other = json.loads(json.dumps(report).replace("150", "50"))
    other["taps"][0]["bytes"] += 7
    found = differences([report, other])
    assert found["taps.stride2.bytes"] == [
        report["taps"][0]["bytes"],
        report["taps"][0]["bytes"] + 7,
    ]
    assert found["recipe.teacher.timesteps"] == [[150], [50]]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"held_out": 1}, "'int' object has no attribute 'items'"),
        ({"held_out": {"mse/x": 1.0}}, "held_out has no loss"),
        ({"held_out": {"loss": "\x1b[2J"}}, r"held_out loss is '\x1b[2J', not a number"),
        ({"noise_floor": {"x": [1]}}, "noise_floor x is '[1]', not a number"),
        ({"steps": -1}, "steps is -1"),
        ({"wait_share": None}, "wait_share is 'None', not a number"),
        ({"loss": 10**400}, "loss is '1000"),
    ],
)
def test_a_summary_of_another_type_is_one_line(
    changed: dict[str, object], reason: str, tmp_path: Path
) -> None:
    """A summary whose fields have other types is refused in one line that names the field."""
    root = a_run(tmp_path / "run")
    finish(root, 2.1)
    summary = json.loads((root / SUMMARY).read_text())
    (root / SUMMARY).write_text(json.dumps(summary | changed))
    result = inspect(root)
    assert result.output.startswith(f"Error: {root / SUMMARY}: not the summary of a run (")
    assert result.exit_code == 1
    assert reason in result.output and result.output.count("\n") == 1


def test_metrics_of_another_type_end_the_curves(tmp_path: Path) -> None:
    """Lines with other types, steps below 0, huge numbers or bytes that are no text end a curve."""
    whole = b'{"step": 1, "loss": 2.0}\n'
    hostile = [
        b"[1]",
        b'{"step": -1}',
        b'{"step": 1e400}',
        b'{"step": 3, "loss": "x"}',
        b'{"step": NaN, "loss": 1}',
        b'{"step": 2, "loss": 1' + b"0" * 400 + b"}",
        b"\xff\xfe",
        b"[" * 100_000,
    ]
    for number, line in enumerate(hostile):
        root = a_run(tmp_path / str(number))
        (root / METRICS).write_bytes(whole + line + b"\n" + whole)
        report = json.loads(inspect(root, "--json").stdout)
        assert report["curves"] == {"loss": {"steps": [1], "values": [2.0]}}
