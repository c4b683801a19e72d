"""Every verb that makes a folder leaves none if its start fails."""

from pathlib import Path

import pytest
from support.cli import run, words

import pipelines.export
import pipelines.extract.open_writer
import pipelines.label.fit_interpreter
import pipelines.sweep.sweep
from dtcache.errors import ClusterError, CodecError, DiskError
from pipelines.label.label_writer import LabelWriter


def fail(error: Exception) -> object:
    """Return a function that raises this error."""

    def failing(*arguments: object, **options: object) -> None:
        raise error

    return failing


def require_nothing_left(out: Path, message: str, *command: object) -> None:
    """Run a command; it must end in this line, and neither `out` nor its parent may be there."""
    result = run(*command)
    assert result.exit_code not in (0, 130), result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not out.parent.exists()


def test_extract(
    scene_folder: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """extract leaves no folder if it fails after the fit of the codec, before the manifest."""
    error = CodecError("the teacher's features are all zero")
    monkeypatch.setattr(pipelines.extract.open_writer, "measure", fail(error))
    out = tmp_path / "new" / "cache"
    flags = words("--device cpu --precision fp32 --batch-size 4 --taps 8 --timestep 150 --limit 8")
    command = ("extract", scene_folder, "--teacher", teacher_dir, "--out", out, *flags)
    require_nothing_left(out, "features are all zero", *command)


def test_teacher_train(tmp_path: Path) -> None:
    """teacher train leaves no folder if no image of the first batch can be read."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no image")
    out = tmp_path / "new" / "teacher"
    flags = words("--size 16 --channels 16,16 --layers 1 --steps 2 --batch-size 4 --device cpu")
    message = "no image of a whole batch could be read"
    command = ("teacher", "train", tmp_path / "images", "--out", out, *flags)
    require_nothing_left(out, message, *command)


def test_label_fit(
    scene_folder: Path, scene_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """label fit leaves no folder if the disk is full when the interpreter is written."""
    error = DiskError("cannot write: No space left on device")
    monkeypatch.setattr(pipelines.label.fit_interpreter, "save_interpreter", fail(error))
    out = tmp_path / "new" / "interpreter"
    flags = words("--width 32 --epochs 1 --warmup-epochs 0 --device cpu --limit 8 --masks")
    command = ("label", "fit", scene_cache, "--out", out, *flags, scene_folder.parent / "masks")
    require_nothing_left(out, "No space left on device", *command)


def test_label_write(scene_cache: Path, interpreter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """label write leaves the cache without a folder of labels if their codec cannot be fitted."""
    monkeypatch.setattr(LabelWriter, "_fitted", fail(CodecError("nothing to fit")))
    out = scene_cache / "labels" / "parts"
    command = ("label", "write", scene_cache, interpreter, "--name", "parts")
    require_nothing_left(out, "nothing to fit", *command)


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """export leaves no folder if the exported network's outputs differ."""
    from dtcache.recipe import ViewSpec
    from dtcache.student import make_backbone, save_backbone

    backbone = make_backbone("test_resnet", init=None, seed=0, size=(32, 32))
    view = ViewSpec(height=32, width=32)
    save_backbone(backbone, tmp_path / "backbone", input_size=(32, 32), view=view)
    monkeypatch.setattr(pipelines.export, "compare", lambda *nets: (1.0, 1.0))
    out = tmp_path / "new" / "exported"
    command = ("export", tmp_path / "backbone", "--to", "timm", "--out", out)
    require_nothing_left(out, "nothing was exported", *command)


def test_sweep(scene_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sweep leaves no folder if the workers cannot be started."""
    error = ClusterError("no scheduler at tcp://nowhere:1")
    monkeypatch.setattr(pipelines.sweep.sweep, "start_workers", fail(error))
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'seeds = [0]\n[[cache]]\nname = "c"\npath = "{scene_cache}"\n'
        '[[arm]]\nname = "a"\ncache = "c"\n'
        '[arm.train]\nstudent = "test_resnet"\nepochs = 1\nbatch_size = 8\ndevice = "cpu"\n'
        "fpn_width = 8\n"
    )
    out = tmp_path / "new" / "sweep"
    require_nothing_left(out, "no scheduler at tcp://nowhere:1", "sweep", file, "--out", out)
