"""Stage 1 on the command line: the cache is a function of its recipe, despite interruptions."""

import errno
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from PIL import Image
from support.cli import run, words
from support.interrupts import interrupt

from dtcache.atomic_files import FolderLock
from dtcache.cache.cache import Cache
from dtcache.errors import ExtractionError
from dtcache.images import FolderSource, decode_view
from dtcache.recipe import FailedSample
from dtcache.rng import permuted, sample_noise
from dtcache.teacher import load_teacher
from dtcache.whitening import whiten
from pipelines.extract import extract as extract_module
from pipelines.extract.extract import require_few_failures

ROOT = Path(__file__).resolve().parents[3]
VOLATILE = {"extraction.log.json", ".lock"}
FLAGS = words("--precision fp32 --device cpu --batch-size 8 --shard-rows 8 --bytes-per-image 4608")


def extract(images: Path, teacher: Path, out: Path, *more: object) -> Result:
    """Extract with small constants."""
    return run("extract", images, "--teacher", teacher, "--out", out, *FLAGS, *more)


def tree(root: Path) -> dict[str, bytes]:
    """Return a cache's files without the volatile files."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in VOLATILE)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def inspect(cache: Path) -> dict:
    """Return what inspect --json prints."""
    result = run("inspect", cache, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def cache(scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of 40 scenes, five shards."""
    out = tmp_path_factory.mktemp("extract") / "cache"
    result = extract(scene_folder, teacher_dir, out)
    assert result.exit_code == 0, result.output
    return out


def test_inspect_tells_what_is_there(cache: Path) -> None:
    """The counts, bytes and ratio of inspect agree with each other and with the files on disk."""
    report = inspect(cache)
    assert report["complete"]
    assert [report[f"num_{k}"] for k in ("images", "done", "failed", "missing", "views")] == [
        40,
        40,
        0,
        0,
        2,
    ]
    assert report["bytes_on_disk"] == sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    assert report["image_bytes"] == sum(
        p.stat().st_size for p in (cache / "data.zarr" / "images").glob("c.*")
    )
    assert [t["name"] for t in report["taps"]] == ["stride1", "stride2", "stride4", "stride8"]
    values = sum(t["channels"] * t["height"] * t["width"] for t in report["taps"])
    assert report["fp16_bytes_per_image"] == 2 * 2 * values
    assert report["bytes_per_image"] == pytest.approx(
        (report["bytes_on_disk"] - report["image_bytes"]) / 40
    )
    assert report["ratio"] == pytest.approx(
        report["fp16_bytes_per_image"] / report["bytes_per_image"]
    )
    assert all(0 < t["relative_mse"] < 2 for t in report["taps"])


def test_the_images_are_told_and_logged(
    cache: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Extract says what it read; log and inspect have the same line, the manifest has not."""
    (tmp_path / "images").mkdir()
    for folder in scene_folder.iterdir():
        (tmp_path / "images" / folder.name).symlink_to(folder)
    (tmp_path / "images" / "notes.txt").touch()
    refused = extract(tmp_path / "images", teacher_dir, tmp_path / "cache")
    assert "links to folders" in refused.output
    assert "--follow-links reads links to folders" in refused.output
    again = extract(tmp_path / "images", teacher_dir, cache, "--follow-links")
    assert again.exit_code == 0, again.output
    assert "1 file of another name (.txt)" in again.stderr
    log = json.loads((cache / "extraction.log.json").read_bytes())
    report = inspect(cache)
    assert report["source"] == log["images"]
    assert log["images"]["summary"].startswith("40 images in ")
    assert sum(report["class_counts"].values()) == log["images"]["labelled"] == 40
    assert "left_out" not in (cache / "manifest.json").read_text()
    shown = " ".join(run("inspect", cache).output.split())
    assert f"read: {log['images']['summary']}" in shown


def test_inspect_without_json_fits_a_narrow_terminal(cache: Path) -> None:
    """The table names the ratio and every tap, in at most 80 columns."""
    result = run("inspect", cache)
    assert result.exit_code == 0
    assert "stride8" in result.output
    assert "under fp16" in result.output
    assert "fitted on 40 images" in result.output
    body = result.output.splitlines()[1:]
    assert max(map(len, body)) <= 80


def test_cached_features_are_the_teachers(
    cache: Path, scene_folder: Path, teacher_dir: Path
) -> None:
    """A row's decoded features correlate best with its own image's independent forward pass.

    The oracle builds noise, noising, U-Net and whitening from their definitions, without our
    teacher class.
    """
    opened = Cache(cache)
    source = FolderSource(scene_folder)
    unet = load_teacher(str(teacher_dir)).denoiser.unet
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[150]
    seen = {}
    unet.up_blocks[0].upsamplers[0].register_forward_pre_hook(
        lambda m, args: seen.update(x=args[0])
    )
    name = "t150/stride8"
    errors = np.zeros((4, 4))
    decode = opened.decoder([name])
    for row in range(4):
        key = opened.samples["key"][row].as_py()
        pixels, _ = decode_view(source.read(source.keys.index(key)), opened.view)
        pixels = pixels[:, :, ::-1].copy()
        noise = sample_noise(pixels.shape, seed=0, key=key, timestep=150, draw=0, flip=True)
        x = alpha.sqrt() * (torch.from_numpy(pixels) / 127.5 - 1) + (
            1 - alpha
        ).sqrt() * torch.from_numpy(noise)
        with torch.inference_mode():
            unet(x[None], torch.tensor([150]))
        expected = whiten(seen["x"])[0]
        for other in range(4):
            got = decode(opened.batch([other], [1], [name]).coefficients)[name]
            errors[row, other] = (got - expected).square().mean() / expected.square().mean()
    assert (errors.argmin(1) == np.arange(4)).all()
    assert errors.diagonal().max() < 0.75 * errors[~np.eye(4, dtype=bool)].min()


def test_rows_are_the_permuted_sample_list(cache: Path, scene_folder: Path) -> None:
    """The rows follow the seed's permutation, with the labels and content hashes of the files."""
    import hashlib

    source = FolderSource(scene_folder)
    order = permuted(len(source.keys), seed=0, stream="rows")
    samples = Cache(cache).samples
    assert samples["key"].to_pylist() == [source.keys[i] for i in order]
    assert samples["label"].to_pylist() == [source.labels[i] for i in order]
    assert samples["content_sha256"].to_pylist() == [
        hashlib.sha256(source.read(i)).digest() for i in order
    ]


def test_limit_takes_the_first_rows_of_the_same_order(
    cache: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """--limit 10 caches the first ten rows of the full cache."""
    assert extract(scene_folder, teacher_dir, tmp_path / "c", "--limit", 10).exit_code == 0
    few = Cache(tmp_path / "c").samples["key"].to_pylist()
    assert few == Cache(cache).samples["key"].to_pylist()[:10]


@pytest.mark.parametrize("kind", ["parquet", "parquet in windows", "tar"])
def test_the_kind_of_source_changes_no_byte(
    kind: str,
    cache: Path,
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folder, Parquet and tar sources of equal keys, labels and bytes give equal cache files."""
    source = FolderSource(scene_folder)
    images = tmp_path / "images"
    images.mkdir()
    rows = [{"bytes": source.read(i), "path": key} for i, key in enumerate(source.keys)]
    for number, part in enumerate((range(25), range(25, 40))):
        labels = [(source.labels or [])[i] for i in part]
        if kind == "tar":
            with tarfile.open(images / f"{number}.tar", "w") as tar:
                for i, label in zip(part, labels, strict=True):
                    for name, data in (
                        (f"{source.keys[i]}.png", rows[i]["bytes"]),
                        (f"{source.keys[i]}.cls", label),
                    ):
                        content = data if isinstance(data, bytes) else str(data).encode()
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        else:
            image = pa.array(
                [rows[i] for i in part], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            )
            pq.write_table(
                pa.table({"image": image, "label": labels}),
                images / f"{number}.parquet",
                row_group_size=9,
            )
    if kind == "parquet in windows":
        monkeypatch.setattr("dtcache.images.parquet.default_held_bytes", lambda: 20_000)
    assert extract(images, teacher_dir, tmp_path / "c").exit_code == 0
    found = tree(tmp_path / "c")
    wanted = tree(cache)
    assert found.pop("manifest.json") != wanted.pop("manifest.json")
    assert found == wanted
    assert Cache(tmp_path / "c").reader.manifest.recipe == Cache(cache).reader.manifest.recipe


def test_a_second_run_changes_nothing(cache: Path, scene_folder: Path, teacher_dir: Path) -> None:
    """A second extraction into a finished cache is quick and changes no byte."""
    before = tree(cache)
    assert extract(scene_folder, teacher_dir, cache).exit_code == 0
    assert tree(cache) == before


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--seed", 1), "seed"),
        (("--timestep", 50), "teacher.timesteps"),
        (("--no-flip",), "flips"),
        (("--taps", "4,8"), "teacher.taps"),
        (("--limit", 20), "the cache has 40 of the images, 20 are selected now (--limit)"),
        (("--resize-mode", "stretch"), "view.resize_mode"),
        (("--bytes-per-image", 3000), "codec.ratio"),
    ],
)
def test_another_recipe_is_refused(
    cache: Path, scene_folder: Path, teacher_dir: Path, flags: tuple[object, ...], field: str
) -> None:
    """An extraction with other options into a cache is refused with the field that differs."""
    before = tree(cache)
    result = extract(scene_folder, teacher_dir, cache, *flags)
    assert result.exit_code == 2
    assert "holds a cache of another recipe" in result.output
    assert field in result.output
    assert tree(cache) == before


def test_another_teacher_or_image_set_is_refused(
    cache: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Different weights or a different image list are refused with what differs."""
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights)
    assert "teacher.weights_sha256" in extract(scene_folder, other, cache).output
    images = Path(shutil.copytree(scene_folder, tmp_path / "images"))
    next(images.rglob("*.png")).rename(images / "star" / "renamed.png")
    (images / "star" / "renamed.png").rename(images / "star" / "new.png")
    output = extract(images, teacher_dir, cache).output
    assert (
        "holds a cache of another recipe: of other images: 1 image was added (first star/new.png) "
        "and 1 image was" in output
    )


def test_bad_images_keep_their_rows(scene_folder: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """Unreadable images keep their rows as failures with reasons, and are never served."""
    images = Path(shutil.copytree(scene_folder, tmp_path / "images"))
    victims = sorted(images.rglob("*.png"))[::13]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:100])
    victims[2].write_bytes(b"not an image at all")
    out = tmp_path / "cache"
    result = extract(images, teacher_dir, out)
    assert result.exit_code == 0
    assert "empty file" in result.output
    bad = len(victims)
    report = inspect(out)
    assert (report["num_done"], report["num_failed"], report["num_missing"]) == (
        40 - min(bad, 3),
        min(bad, 3),
        0,
    )
    assert report["failures"]["empty file"] == 1
    opened = Cache(out)
    failed = {
        k
        for k, f in zip(*(opened.samples[c].to_pylist() for c in ("key", "failure")), strict=True)
        if f
    }
    assert failed == {v.relative_to(images).as_posix() for v in victims[:3]}
    assert len(opened.reader.usable_rows) == 37


def test_a_disk_that_goes_away_stops_the_extraction(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures of a missing disk are not committed, so a resume gives the bytes of a clean run."""
    keys = FolderSource(scene_folder).keys
    gone = {int(i) for i in permuted(40, seed=0, stream="rows")[16:]}
    first = keys[permuted(40, seed=0, stream="rows")[16]]
    real = FolderSource.read
    reads = []

    def read(source: FolderSource, index: int) -> bytes:
        reads.append(index)
        if len(reads) > 40 and index in gone:  # by then the codec's fit has read all 40 images
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return real(source, index)

    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", read)
        result = extract(scene_folder, teacher_dir, out, "--shard-rows", 16)
    reason = f"16 x unreadable: Transport endpoint is not connected (first {first})"
    assert result.exit_code == 1
    assert (
        f"16 of 40 images failed, more than --max-failures 0.01 allows: {reason}. What is "
        f"committed stays" in result.output
    )
    report = inspect(out)
    assert (report["num_done"], report["num_failed"], report["num_missing"]) == (16, 0, 24)
    assert extract(scene_folder, teacher_dir, out, "--shard-rows", 16).exit_code == 0
    assert extract(scene_folder, teacher_dir, tmp_path / "d", "--shard-rows", 16).exit_code == 0
    assert tree(out) == tree(tmp_path / "d")


def test_how_many_failures_are_too_many() -> None:
    """At least ten failures that exceed the allowed share stop an extraction; others do not."""
    failures = [
        FailedSample(row=row, key=f"k{row}", reason="teacher output is not finite at t1/s8")
        for row in range(11)
    ]
    require_few_failures(failures[:9], 9, 0.01)
    require_few_failures(failures[:10], 1000, 0.01)
    require_few_failures(failures, 20, 0.6)
    message = (
        r"^11 of 1000 images failed, .* `max_failures=0\.01` allows: "
        r"11 x teacher output is not finite at t1/s8 \(first k0\)\. What"
    )
    with pytest.raises(ExtractionError, match=message):
        require_few_failures(failures, 1000, 0.01)
    with pytest.raises(ExtractionError, match="10 of 10 images failed"):
        require_few_failures(failures[:10], 10, 0.01)


def test_a_second_writer_is_refused(cache: Path, scene_folder: Path, teacher_dir: Path) -> None:
    """A second extraction into a cache that is being written is refused and changes nothing."""
    before = tree(cache)
    with FolderLock(cache):
        result = extract(scene_folder, teacher_dir, cache)
    assert result.exit_code == 1
    assert "is being written by another process; wait for it or stop it" in result.output
    assert tree(cache) == before


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_who_asks(
    cache: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A second process in another working folder writes the same bytes."""
    out = tmp_path / "c"
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "extract",
        str(scene_folder),
        "--teacher",
        str(teacher_dir),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run(
        [*command, "--out", str(out), *FLAGS],
        check=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert tree(out) == tree(cache)


@pytest.mark.slow
def test_kills_do_not_change_a_byte(
    cache: Path, scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """A run that SIGKILL interrupts at random moments resumes to an uninterrupted run's bytes."""
    out = tmp_path / "c"
    rng = random.Random(0)
    kills = 0
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "extract",
        str(scene_folder),
        "--teacher",
        str(teacher_dir),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(40):
        process = subprocess.Popen(
            [*command, "--out", str(out), *FLAGS],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Wait until this run touches the cache, so that the kill interrupts the work, not the
        # imports.
        stamp = _activity(out)
        deadline = time.monotonic() + 60
        while process.poll() is None and _activity(out) == stamp and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 8:
            break
    subprocess.run(
        [*command, "--out", str(out), *FLAGS], env=environment, check=True, capture_output=True
    )
    assert kills >= 3
    assert tree(out) == tree(cache)


def _activity(out: Path) -> float:
    return max(
        (p.stat().st_mtime_ns for p in [out, *out.glob("*"), *out.glob("commits/*")] if p.exists()),
        default=0,
    )


def test_a_full_disk_is_one_clear_line(
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    """ENOSPC is an error with advice, and a later run of the same command gives the same bytes."""
    from dtcache.store import pending_shard as attempt

    real = attempt.write_temporary
    calls = []

    def full(target: Path, data: bytes, name: str) -> Path:
        calls.append(target)
        if len(calls) == 8:
            from dtcache.atomic_files import _disk_error

            raise _disk_error(target, len(data), OSError(errno.ENOSPC, "No space left on device"))
        return real(target, data, name)

    monkeypatch.setattr(attempt, "write_temporary", full)
    out = tmp_path / "c"
    result = extract(scene_folder, teacher_dir, out)
    assert result.exit_code == 1
    assert (
        "No space left on device; free some space and run the same command again" in result.output
    )
    assert not inspect(out)["complete"]
    assert extract(scene_folder, teacher_dir, out).exit_code == 0
    assert tree(out) == tree(cache)


def test_batches_ahead_change_no_byte(
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    """Prefetched noise and deferred packing, as used with a GPU, change no byte of the cache."""
    from pipelines.extract import shard

    monkeypatch.setattr(shard, "batches_ahead", lambda device: 2)
    assert extract(scene_folder, teacher_dir, tmp_path / "c").exit_code == 0
    assert tree(tmp_path / "c") == tree(cache)


@pytest.mark.slow
def test_a_compiled_cache_is_another_one(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe records --compile, so a resume without --compile is refused with the reason."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    out = tmp_path / "c"
    assert extract(scene_folder, teacher_dir, out, "--compile", "--limit", "8").exit_code == 0
    again = extract(scene_folder, teacher_dir, out, "--limit", "8")
    assert again.exit_code == 2
    assert "teacher.compiled" in again.output
    assert extract(scene_folder, teacher_dir, out, "--compile", "--limit", "8").exit_code == 0


def test_ctrl_c_exits_130_and_resumes(
    scene_folder: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    """Ctrl-C exits with 130 and advice, and the next run finishes to the same bytes."""
    from pipelines.extract import shard_runner as runner

    interrupt(monkeypatch, runner, "packed_rows", call=3)
    out = tmp_path / "c"
    result = extract(scene_folder, teacher_dir, out)
    assert result.exit_code == 130
    assert "run the same command again to resume" in result.output
    report = inspect(out)
    assert (report["complete"], report["num_done"], report["num_missing"]) == (False, 16, 24)
    assert extract(scene_folder, teacher_dir, out).exit_code == 0
    assert tree(out) == tree(cache)


def test_blocks_of_the_decoder_are_cached_by_name(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """Named blocks are cached beside levels, finest first, and a student learns from them."""
    out = tmp_path / "cache"
    result = extract(scene_folder, teacher_dir, out, "--taps", "mid,8,up2layer0", "--limit", 8)
    assert result.exit_code == 0, result.output
    taps = json.loads((out / "manifest.json").read_text())["recipe"]["teacher"]["taps"]
    assert [(tap["name"], tap.get("layer")) for tap in taps] == [
        ("up2layer0", 0),
        ("stride8", None),
        ("mid", 0),
    ]
    assert "layer" not in taps[1]
    flags = words("--taps mid,up2layer0 --student resnet10t --fpn-width 8 --epochs 1")
    flags += words("--batch-size 4 --device cpu --precision fp32 --log-with none")
    trained = run("train", out, *flags, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    held_out = json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]
    regressed = {name.rpartition("/")[2] for name in held_out if name.startswith("mse/")}
    assert regressed == {"mid", "up2layer0"}


def test_a_foreign_folder_is_refused(scene_folder: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """A folder with files that dtcache did not create is refused and left unchanged."""
    (tmp_path / "thesis.tex").write_text("precious")
    result = extract(scene_folder, teacher_dir, tmp_path)
    assert result.exit_code == 2
    assert "is not empty and not a cache: found thesis.tex" in result.output
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--size", "36"), "expected both sides to be multiples of 8"),
        (("--size", "big"), "--size big: expected H or HxW in pixels"),
        (
            ("--taps", "64"),
            "--taps stride64: the teacher has no such map at this size; expected stride1, stride2, "
            "stride4, stride8, mid, up0layer0, up1layer0, up2layer0, up3layer0",
        ),
        (("--timestep", "5000"), "--timestep 5000: this teacher was trained with steps 0 to 999"),
        (("--limit", "0"), "--limit 0: expected at least 1"),
        (("--device", "tpu9"), "--device tpu9"),
    ],
)
def test_bad_options_are_one_clear_line(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    """Invalid options are named with a non-zero exit code, and no cache is begun."""
    result = extract(scene_folder, teacher_dir, tmp_path / "c", *flags)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize("images", ["one image", "no flips", "two timesteps", "wide"])
def test_unusual_caches(scene_folder: Path, teacher_dir: Path, tmp_path: Path, images: str) -> None:
    """One image, one view, several timesteps or a non-square view give a readable cache."""
    flags = {
        "one image": ("--limit", 1),
        "no flips": ("--no-flip", "--limit", 9),
        "two timesteps": ("--timestep", 50, "--timestep", 250, "--limit", 9),
        "wide": ("--size", "16x48", "--limit", 9),
    }[images]
    out = tmp_path / "c"
    result = extract(scene_folder, teacher_dir, out, *flags)
    assert result.exit_code == 0, result.output
    opened = Cache(out)
    report = inspect(out)
    batch = opened.batch([0], [report["num_views"] - 1], opened.names)
    features = opened.decoder(opened.names)(batch.coefficients)
    assert len(features) == len(report["taps"]) == (8 if images == "two timesteps" else 4)
    for tap in report["taps"]:
        got = features[f"t{tap['timestep']}/{tap['name']}"]
        assert tuple(got.shape) == (1, tap["channels"], tap["height"], tap["width"])
        assert torch.isfinite(got).all()


def test_images_are_the_teachers_pixels(cache: Path, scene_folder: Path) -> None:
    """Students read exactly the pixels of the view, mirrored for view 1."""
    opened = Cache(cache)
    source = FolderSource(scene_folder)
    batch = opened.batch([0, 0], [0, 1], [])
    key = opened.samples["key"][0].as_py()
    with Image.open(io.BytesIO(source.read(source.keys.index(key)))) as image:
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert (batch.images_BCHW[0].numpy() == pixels).all()
    assert (batch.images_BCHW[1].numpy() == pixels[:, :, ::-1]).all()


def test_empty_images_are_told(scene_folder: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """Images that show nothing are cached, told in one line, and counted in the log alone.

    The count is that of all runs, although the extraction was interrupted.
    """
    images = tmp_path / "images"
    shutil.copytree(scene_folder, images)
    first, second, third = sorted(images.rglob("*.png"))[:3]
    Image.new("RGB", (32, 32), "white").save(first)
    Image.new("RGB", (32, 32), "white").save(second)
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(third)
    command = ["extract", images, "--teacher", teacher_dir, "--device", "cpu", "--no-flip"]
    command += ["--taps", "8", "--shard-rows", "10", "--quality", "fp16"]
    outputs = []
    for name in ("whole", "resumed"):
        out = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            if name == "resumed":
                interrupt(patch, extract_module, "require_few_failures", 3)
                assert run(*command, "--out", out).exit_code == 130
        result = run(*command, "--out", out)
        assert result.exit_code == 0, result.output
        keys = [path.relative_to(images).as_posix() for path in (first, second, third)]
        assert "3 images surely show nothing: 2 x all white (first " in result.output
        assert f"1 x 12 bits in a 16-bit file (first {keys[2]})" in result.output
        log = json.loads((out / "extraction.log.json").read_bytes())
        assert log["empty_images"] == {"all white": 2, "12 bits in a 16-bit file": 1}
        assert b"12 bits" not in (out / "manifest.json").read_bytes()
        outputs.append((out / "manifest.json").read_bytes())
    assert outputs[0] == outputs[1]
