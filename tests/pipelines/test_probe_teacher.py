"""`dtcache teacher show --probe`: accuracies against an independent probe of hooked blocks."""

import io
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from support.cli import run

from dtcache.images import decode_view, open_source
from dtcache.recipe import ViewSpec
from dtcache.rng import permuted, sample_noise
from dtcache.teacher import load_teacher
from pipelines.probe_teacher import BlockScore, TeacherProbe

FLAGS = ("--device", "cpu", "--precision", "fp32")


def independent_accuracies(
    teacher_dir: Path, images: Path, timestep: int, strengths: dict[str, float]
) -> dict[str, float]:
    """Probe hooked blocks of diffusers' own U-Net with scikit-learn, at the given C per block."""
    loaded = load_teacher(str(teacher_dir))
    unet = loaded.denoiser.unet
    pooled: dict[str, torch.Tensor] = {}

    def keep(name: str) -> None:
        block = unet.mid_block if name == "mid" else unet.up_blocks[1].resnets[0]
        block.register_forward_hook(lambda m, a, out: pooled.update({name: out.mean((2, 3))}))

    for name in strengths:
        keep(name)
    source = open_source(images)
    order = permuted(len(source.keys), seed=0, stream="evaluate-train").tolist()
    alpha_bar = float(loaded.alpha_bars[timestep])
    rows = []
    for index in order:
        pixels, _ = decode_view(source.read(index), ViewSpec(height=32, width=32))
        noise = sample_noise(
            (3, 32, 32), seed=0, key=source.keys[index], timestep=timestep, draw=0, flip=False
        )
        noisy = alpha_bar**0.5 * (pixels / 127.5 - 1) + (1 - alpha_bar) ** 0.5 * noise
        with torch.inference_mode():
            unet(torch.from_numpy(noisy)[None].float(), timestep)
        rows.append({name: x[0].numpy() for name, x in pooled.items()})
    labels = np.array([source.labels[index] for index in order])
    held_out = len(order) // 5
    accuracies = {}
    for name, c in strengths.items():
        x = np.stack([row[name] for row in rows])
        scaler = StandardScaler().fit(x[:-held_out])
        probe = LogisticRegression(C=c, max_iter=1000, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(scaler.transform(x[:-held_out]), labels[:-held_out])
        predicted = probe.predict(scaler.transform(x[-held_out:]))
        accuracies[name] = 100 * float((predicted == labels[-held_out:]).mean())
    return accuracies


def test_accuracies_are_those_of_an_independent_probe(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Each accuracy is that of scikit-learn on hooked maps of noised images; a PNG shows them."""
    plot = tmp_path / "probe.png"
    flags = ("--probe", scene_folder, "--timestep", 20, "--timestep", 150, "--plot", plot, *FLAGS)
    result = run("teacher", "show", teacher_dir, "--json", *flags)
    assert result.exit_code == 0, result.output
    probe = json.loads(result.stdout)["probe"]
    assert (probe["num_train"], probe["num_test"]) == (32, 8)
    names = ["mid", "up0layer0", "stride8", "up1layer0", "stride4"]
    names += ["up2layer0", "stride2", "up3layer0", "stride1"]
    places = [(score["name"], score["timestep"]) for score in probe["scores"]]
    assert places == [(name, t) for name in names for t in (20, 150)]
    best = max(probe["scores"], key=lambda score: score["linear_top1"])
    assert probe["best"] == {"name": best["name"], "timestep": best["timestep"]}
    share = best["linear_top1"] / 100
    assert probe["standard_error"] == pytest.approx(100 * (share * (1 - share) / 8) ** 0.5)
    measured = {
        score["name"]: score
        for score in probe["scores"]
        if score["timestep"] == 150 and score["name"] in ("mid", "up1layer0")
    }
    expected = independent_accuracies(
        teacher_dir,
        scene_folder,
        150,
        {name: score["linear_C"] for name, score in measured.items()},
    )
    assert {name: score["linear_top1"] for name, score in measured.items()} == expected
    at_edge = [score["linear_C"] in (1e-5, 100.0) for score in probe["scores"]]
    assert [score["linear_C_at_edge"] for score in probe["scores"]] == at_edge
    warning = f"{sum(at_edge)} of 18 linear probes chose a C at an edge of the grid of 1e-05 to 100"
    assert (warning in result.stderr) == any(at_edge)
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


def test_the_table_shows_every_block_and_names_the_best() -> None:
    """The table has a row per block, a column per timestep, and names the best of all."""
    scores = [("mid", 5, 30.0), ("mid", 50, 31.0), ("up0layer0", 5, 64.0), ("up0layer0", 50, 12.5)]
    probe = TeacherProbe(
        scores=tuple(
            BlockScore(tap=tap, timestep=t, linear_top1=top1, linear_c=0.1)
            for tap, t, top1 in scores
        ),
        num_train=300,
        num_test=100,
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(probe.to_table())
    text = " ".join(console.export_text().split())
    assert "t=5 " in text
    assert "t=50 " in text
    assert re.search(r"mid │ +30.0 │ +31.0", text)
    assert re.search(r"up0layer0 │ +64.0 │ +12.5", text)
    assert "best: up0layer0 at t=5; standard error 4.8 points" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--plot", "p.png"), "--plot: only a probe uses this option; pass --probe too"),
        (("--probe", "SCENES", "--timestep", 1000), "--timestep 1000: this teacher was trained"),
        (("--probe", "SCENES", "--limit", 0), "--limit 0: expected at least 1"),
        (
            ("--probe", "SCENES", "--plot", "no/p.png"),
            "--plot no/p.png: expected a file in a folder",
        ),
        (("--probe", "SCENES/ball"), "expected a label for every image"),
        (("--probe", "./nowhere"), "nowhere"),
    ],
)
def test_a_probe_that_cannot_be_made_is_one_line(
    scene_folder: Path, teacher_dir: Path, flags: tuple[object, ...], message: str
) -> None:
    """Probe options without a probe, bad values and unlabelled images end in one line."""
    unlabelled = sorted(path for path in scene_folder.iterdir())[0]
    names = {"SCENES": scene_folder, "SCENES/ball": unlabelled}
    result = run("teacher", "show", teacher_dir, *(names.get(str(f), f) for f in flags), *FLAGS)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
