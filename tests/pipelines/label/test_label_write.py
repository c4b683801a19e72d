"""`dtcache label write`: soft labels as a sealed label set; the cache itself is unchanged."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from store.builders import tiny_plan, tree, write_cache
from support.cli import run
from support.files import flip
from support.interrupts import interrupt

from dtcache.cache.cache import Cache
from dtcache.cache.label_set import LabelledCache, LabelSet
from dtcache.errors import (
    CacheDamagedError,
    CacheIncompleteError,
    CacheMismatchError,
    ConfigError,
    UnknownLabelsError,
)
from dtcache.labels import load_interpreter
from dtcache.labels.label_decoder import join_views
from dtcache.losses.labels import entropy, total_variation
from dtcache.metrics.segmentation import confusion_matrix, mean_iou
from dtcache.options import ExtractOptions, LabelWriteOptions
from dtcache.store import writer
from dtcache.store.commits import commit_files
from dtcache.store.manifest import read_manifest, write_manifest
from pipelines.extract.extract import extract
from pipelines.label.label_quality import known_labels

ROOT = Path(__file__).resolve().parents[3]
NAME = "parts"


@pytest.fixture
def copy(labelled: Path, tmp_path: Path) -> Path:
    """A copy of the labelled cache, to be damaged."""
    root = tmp_path / "cache"
    shutil.copytree(labelled, root)
    return root


def exact_logits(cache: Cache, interpreter: Path) -> torch.Tensor:
    """Return all logits (N, V, K, H, W), computed by the interpreter from the cached features."""
    network = load_interpreter(interpreter).network
    rows = np.arange(len(cache))
    found = []
    with torch.no_grad():
        for view in range(cache.num_views):
            coefficients, _ = cache.coefficients(rows, np.full(len(rows), view), cache.names)
            found.append(network(cache.decoder(cache.names)(coefficients)))
    return torch.stack(found, 1)


def test_the_cache_itself_is_untouched(labelled: Path, scene_cache: Path) -> None:
    """Writing labels changes no existing file and adds files only under labels/."""
    before = tree(scene_cache)
    after = tree(labelled)
    assert {
        path: content for path, content in after.items() if not path.startswith("labels")
    } == before


def test_stored_logits_are_the_exact_ones_within_the_stated_error(
    labelled: Path, interpreter: Path
) -> None:
    """The manifest states the stored logits' own total variation and entropy over all views."""
    cache = Cache(labelled)
    stored = LabelSet(cache, NAME).logits(np.arange(40))
    exact = exact_logits(cache, interpreter)
    assert stored.shape == exact.shape == (40, 2, 9, 8, 8)
    measured = json.loads((labelled / "labels" / NAME / "manifest.json").read_text())["measured"]
    error = float(total_variation(stored.flatten(0, 1), exact.flatten(0, 1)).mean())
    assert measured["total_variation"] == pytest.approx(error, rel=1e-4)
    assert measured["temperature"] == 4.0
    assert measured["images"] == 40
    assert measured["entropy"] == pytest.approx(
        float(entropy(stored.flatten(0, 1)).mean()), rel=1e-4
    )
    swapped = float(total_variation(stored.flip(1).flatten(0, 1), exact.flatten(0, 1)).mean())
    assert error < 0.6 * swapped


def test_the_recorded_agreement_is_that_of_the_stored_labels(
    labelled: Path, scene_folder: Path
) -> None:
    """The recorded mIoU is that of the unmirrored view's stored labels and the given masks."""
    from dtcache.images import open_masks

    cache = Cache(labelled)
    masks = open_masks(scene_folder.parent / "masks")
    truth = np.stack([masks.load(key, cache.view) for key in cache.samples["key"].to_pylist()])
    stored = LabelSet(cache, NAME).logits(np.arange(40))[:, 0]
    whole = torch.nn.functional.interpolate(
        stored, size=(32, 32), mode="bilinear", align_corners=False
    )
    counts = confusion_matrix(truth, whole.argmax(1).numpy(), 9, 255)
    measured = json.loads((labelled / "labels" / NAME / "manifest.json").read_text())["measured"]
    assert measured["agreement"]["miou"] == pytest.approx(mean_iou(counts))
    assert measured["agreement"]["images"] == 40


def test_a_batch_has_the_labels_of_its_views(labelled: Path) -> None:
    """A training batch holds the logits of each row's own view, decoded on the device."""
    cache = LabelledCache(labelled, NAME)
    rows = np.array([3, 7, 7])
    views = np.array([1, 0, 1])
    found = cache.batch(rows, views, cache.names).labels
    assert found is not None
    decoded = cache.labels.decoder().chosen(found.coefficients_BN, found.scalars_B2, found.views_B)
    every = cache.labels.logits(np.arange(40))
    assert torch.allclose(decoded, torch.stack([every[3, 1], every[7, 0], every[7, 1]]), atol=1e-5)


def test_joined_views_are_mirrored_back() -> None:
    """Joining views mirrors the mirrored view's logits back to the image's orientation."""
    logits = torch.arange(12.0).view(1, 2, 1, 2, 3)
    joined = join_views(logits, [False, True])
    assert torch.equal(joined, torch.cat([logits[:, 0], logits[:, 1].flip(3)], 1))


def test_an_interrupted_write_resumes_to_the_same_bytes(
    labelled: Path,
    scene_cache: Path,
    interpreter: Path,
    scene_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Ctrl-C leaves an incomplete label set, and the same command resumes it to the same bytes."""
    root = tmp_path / "cache"
    shutil.copytree(scene_cache, root)
    arguments = (
        "label",
        "write",
        root,
        interpreter,
        "--name",
        NAME,
        "--masks",
        scene_folder.parent / "masks",
    )
    for name, call in (("write_attempt", 2), ("write_manifest", 1)):
        with monkeypatch.context() as patch:
            interrupt(patch, writer, name, call)
            assert run(*arguments).exit_code == 130
        result = run("verify", root)
        assert result.exit_code == 4, result.output
        assert "run dtcache label write again" in " ".join(
            re.sub(r"[│\s]+", " ", result.output).split()
        )
        with pytest.raises(
            CacheIncompleteError,
            match=r"the label set is not complete; run its dtcache label write",
        ):
            LabelSet(Cache(root), NAME)
    with monkeypatch.context() as patch:
        interrupt(patch, writer.shutil, "rmtree", 1)
        assert run(*arguments).exit_code == 130
    assert (root / "labels" / NAME / "commits").is_dir(), (
        "sealed, but for what is left of its records"
    )
    assert run(*arguments).exit_code == 0
    assert tree(root) == tree(labelled)
    assert run(*arguments).exit_code == 0, "a finished set is told again"


@pytest.mark.slow
def test_kills_do_not_change_a_byte(
    scene_folder: Path, teacher_dir: Path, interpreter: Path, tmp_path: Path
) -> None:
    """A write that SIGKILL ends twice resumes to an undisturbed run's bytes."""
    root = tmp_path / "cache"
    killed = tmp_path / "killed"
    options = ExtractOptions(
        teacher=str(teacher_dir),
        taps="4,8",
        precision="fp32",
        device="cpu",
        batch_size=8,
        shard_rows=1,
        bytes_per_image=4608,
    )
    extract(scene_folder, root, options)
    shutil.copytree(root, killed)
    flags = ("--name", NAME, "--device", "cpu")
    assert run("label", "write", root, interpreter, *flags).exit_code == 0
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "label",
        "write",
        str(killed),
        str(interpreter),
        *flags,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = killed / "labels" / NAME
    for more in (1, 9):
        before = len(commit_files(out))
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(commit_files(out)) < before + more:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert before + more <= len(commit_files(out)) < 40, "killed in the middle"
    assert run("verify", killed).exit_code == 4
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert tree(killed) == tree(root)


def test_verify_reads_every_byte_of_a_label_set(copy: Path) -> None:
    """A flipped bit or a missing file of a label set is damage, with the label set's own remedy."""
    assert run("verify", copy).exit_code == 0
    shard = next((copy / "labels" / NAME / "data.zarr" / "t0").glob("c.*"))
    flip(shard, 30)
    result = run("verify", copy, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["damage"] == []
    (damage,) = found["labels"][NAME]["damage"]
    assert damage["path"].startswith("data.zarr/t0/c.")
    assert damage["remedy"] == "run dtcache verify with --repair and --interpreter"
    assert len(damage["samples"]) == 1
    result = run("verify", copy)
    assert f"labels/{NAME}/{damage['path']}" in result.output


def test_inspect_describes_label_sets(labelled: Path, scene_cache: Path) -> None:
    """inspect shows a label set's classes, entropy, agreement and bytes apart from the cache."""
    report, before = (
        json.loads(run("inspect", root, "--json").stdout) for root in (labelled, scene_cache)
    )
    (found,) = report["labels"]
    assert found["name"] == NAME
    assert found["state"] == "complete"
    assert found["classes"][0] == "background"
    size = sum(p.stat().st_size for p in (labelled / "labels").rglob("*") if p.is_file())
    assert found["bytes"] == report["parts"]["labels"] == size
    assert found["share"] == pytest.approx(
        size / (report["parts"]["coefficients"] + report["parts"]["codec"])
    )
    assert 0 < found["agreement"]["miou"] < 1
    assert 0 < found["entropy"] < np.log2(9)
    assert sum(report["parts"].values()) == report["bytes_on_disk"]
    assert before["labels"] == []
    text = (Path(__file__).resolve().parents[3] / "docs" / "inspect.md").read_text()
    section = text[text.index("## JSON of a label set") : text.index("## Statistics")]
    assert set(re.findall(r"^\| `([a-z_]+)`", section, re.M)) == set(found)
    assert report["ratio"] == before["ratio"]
    text = run("inspect", labelled).output
    assert f"classes of {NAME}: background, crescent" in text
    assert "entropy" in text


def test_a_damaged_manifest_of_a_label_set_is_said_and_no_more(copy: Path) -> None:
    """inspect names the damaged manifest of a label set and still shows the cache."""
    path = copy / "labels" / NAME / "manifest.json"
    newer = json.dumps({**json.loads(path.read_text()), "format": 3})
    for content, reason in (
        (newer, "expected format 2, got 3"),
        ("{}", "not a manifest of dtcache"),
    ):
        path.write_text(content)
        result = run("inspect", copy, "--json")
        assert result.exit_code == 0
        (found,) = json.loads(result.stdout)["labels"]
        assert found["state"] == "damaged"
        assert reason in found["reason"]
    assert run("inspect", copy).exit_code == 0
    assert run("verify", copy).exit_code == 3


def test_an_extraction_that_resumes_leaves_a_label_set_alone(copy: Path) -> None:
    """A resumed extraction removes no file of a label set that another process writes."""
    left = copy / "labels" / NAME / ".tmp-abc-manifest.json"
    left.write_bytes(b"x")
    writer.CacheWriter.resume(copy)
    assert left.exists()


@pytest.fixture
def other(scene_cache: Path, interpreter: Path, tmp_path: Path) -> Iterator[Path]:
    """An interpreter of another teacher."""
    folder = tmp_path / "other"
    shutil.copytree(interpreter, folder)
    config = json.loads((folder / "config.json").read_text())
    config["teacher"]["weights_sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_bad_input_is_one_line(
    labelled: Path, interpreter: Path, other: Path, tmp_path: Path
) -> None:
    """Each bad input is refused in one line: teacher, name, interpreter or label set."""
    scoreless = tmp_path / "scoreless"
    shutil.copytree(interpreter, scoreless)
    config = json.loads((scoreless / "config.json").read_text())
    (scoreless / "config.json").write_text(json.dumps({**config, "validation": {"miou": 0.5}}))
    cases = (
        (
            (other, "--name", "b"),
            f"{labelled}: the interpreter was fitted to other features: teacher weights_sha256",
        ),
        (
            (interpreter, "--name", NAME, "--share", "0.05"),
            f"{NAME} was begun with --share 0.1, got --share 0.05; use the same",
        ),
        ((interpreter, "--name", "../x"), "--name '../x': expected up to 64 lower-case letters"),
        (
            (scoreless, "--name", "b"),
            f"{scoreless}/config.json: not the configuration of an interpreter ('images')",
        ),
        (
            (tmp_path, "--name", "b"),
            "config.json: missing; expected an output folder of dtcache label fit",
        ),
        ((interpreter, "--name", "b", "--share", "0"), "--share 0: expected a number over 0"),
    )
    for arguments, message in cases:
        result = run("label", "write", labelled, *arguments)
        assert result.exit_code == (1 if arguments[0] == scoreless else 2)
        assert message in result.output
        assert result.output.count("\n") == 1
        assert [path.name for path in (labelled / "labels").iterdir()] == [NAME]
    with pytest.raises(UnknownLabelsError, match=rf"no label set 'b'; it has {NAME}"):
        LabelSet(Cache(labelled), "b")


def test_masks_of_other_classes_do_not_agree_by_number(
    labelled: Path, interpreter: Path, scene_folder: Path, tmp_path: Path
) -> None:
    """Masks with other classes, or for a pooled head, are refused before anything is written."""
    others = tmp_path / "masks"
    shutil.copytree(scene_folder.parent / "masks", others)
    (others / "classes.toml").write_text(f"names = {json.dumps([f'c{i}' for i in range(9)])}\n")
    result = run("label", "write", labelled, interpreter, "--name", "b", "--masks", others)
    assert result.output.startswith(
        f"Error: {others}: expected the interpreter's classes, background, "
    )
    whole = replace(load_interpreter(interpreter).spec, level="image")
    with pytest.raises(
        ConfigError,
        match=r"`masks`: the interpreter labels whole images; leave `masks` and `ignore_index`",
    ):
        known_labels(Cache(labelled), whole, LabelWriteOptions(masks=others))
    assert known_labels(Cache(labelled), whole, LabelWriteOptions()) is None, (
        "its classes are not those of the index"
    )
    assert [path.name for path in (labelled / "labels").iterdir()] == [NAME]


def test_masks_that_come_too_late_are_told(
    copy: Path, interpreter: Path, scene_folder: Path
) -> None:
    """Masks given after a set is finished are not used, and the command says so."""
    assert run("label", "write", copy, interpreter, "--name", "b").exit_code == 0
    masks = scene_folder.parent / "masks"
    result = run("label", "write", copy, interpreter, "--name", "b", "--masks", masks)
    assert f"warning: {copy / 'labels' / 'b'} was finished without masks" in result.output


def test_a_set_of_another_cache_is_refused(labelled: Path, tmp_path: Path) -> None:
    """Labels copied from a different cache are refused."""
    root = write_cache(tmp_path / "cache", tiny_plan())
    with pytest.raises(
        UnknownLabelsError,
        match=r"no label set 'parts'; it has none; dtcache label write creates one",
    ):
        LabelSet(Cache(root), NAME)
    shutil.copytree(labelled / "labels", root / "labels")
    with pytest.raises(
        CacheMismatchError, match=r"made from other features: expected .*write labels again"
    ):
        LabelSet(Cache(root), NAME)


def test_labels_of_whole_images(scene_cache: Path, tmp_path: Path) -> None:
    """The pooled head's logits are one vector per view with the recorded agreement."""
    root = tmp_path / "cache"
    shutil.copytree(scene_cache, root)
    flags = ("--width", "32", "--epochs", "2", "--warmup-epochs", "1", "--device", "cpu")
    assert (
        run("label", "fit", root, "--level", "image", "--out", tmp_path / "i", *flags).exit_code
        == 0
    )
    result = run("label", "write", root, tmp_path / "i", "--name", "kinds")
    assert result.exit_code == 0, result.output
    cache = Cache(root)
    labels = LabelSet(cache, "kinds")
    assert labels.shape == (8, 1, 1)
    stored = labels.logits(np.arange(40))
    exact = exact_logits(cache, tmp_path / "i")
    assert float(total_variation(stored.flatten(0, 1), exact.flatten(0, 1)).mean()) < 0.02
    right = (stored[:, 0, :, 0, 0].argmax(1).numpy() == np.array(cache.samples["label"])).mean()
    measured = json.loads((root / "labels" / "kinds" / "manifest.json").read_text())["measured"]
    assert measured["agreement"] == {"accuracy": pytest.approx(right), "images": 40, "miou": None}


@pytest.mark.parametrize(
    "change",
    [
        {"entropy": 10**400},
        {"total_variation": -0.5},
        {"agreement": {"images": 3, "miou": 7.0, "accuracy": 0}},
    ],
    ids=["huge", "negative", "over 1"],
)
def test_figures_out_of_range_damage_their_own_set_alone(
    copy: Path, change: dict[str, object]
) -> None:
    """A label set with impossible figures is shown as damaged, and the cache is still shown."""
    manifest = read_manifest(copy / "labels" / NAME)
    assert manifest.measured is not None
    write_manifest(
        copy / "labels" / NAME, replace(manifest, measured={**manifest.measured, **change})
    )
    with pytest.raises(
        CacheDamagedError, match=r"not a manifest of dtcache .* is not a number from 0 to"
    ):
        read_manifest(copy / "labels" / NAME)
    result = run("inspect", copy)
    assert result.exit_code == 0, result.output
    assert "40 done" in result.output and "damaged" in result.output
