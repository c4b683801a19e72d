"""Latent, class-conditional and transformer teachers on the command line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file
from support.cli import run
from support.files import flip
from teacher.batches import batch_of
from teacher.kinds import (
    TEXT_CHANNELS,
    TOKENS,
    edit,
    save_class_unet,
    save_dit,
    save_ldm,
    save_stable_diffusion,
)
from teacher.test_prompt import save_text_encoder

from dtcache.cache.cache import Cache
from dtcache.device import resolve_compute
from dtcache.images import FolderSource, decode_view
from dtcache.recipe import array_of
from dtcache.store.manifest import read_manifest
from dtcache.teacher import Prompt
from dtcache.teacher.prompt import embed_prompt
from dtcache.whitening import whiten
from pipelines.make_teacher import cache_teacher

FLAGS = (
    "--precision",
    "fp32",
    "--device",
    "cpu",
    "--batch-size",
    4,
    "--shard-rows",
    8,
    "--limit",
    16,
)


def extract(images: Path, teacher: Path, out: Path, *more: object) -> Result:
    """Extract 16 images with small constants."""
    return run("extract", images, "--teacher", teacher, "--out", out, *FLAGS, *more)


def succeeded(result: Result) -> Result:
    """Return the result of a command that must succeed."""
    assert result.exit_code == 0, result.output
    return result


def tree(root: Path) -> dict[str, bytes]:
    """Return a cache's files without the volatile files."""
    files = (
        p
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name not in {"extraction.log.json", ".lock"}
    )
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts given to a stand-in text encoder, whose embedding is a function of the text."""
    prompts: list[str] = []

    def embed(root: Path, text: str) -> Prompt:
        prompts.append(text)
        rng = np.random.default_rng(list(text.encode()))
        return Prompt(
            text=text, embedding_LD=rng.normal(size=(TOKENS, TEXT_CHANNELS)).astype(np.float32)
        )

    monkeypatch.setattr("dtcache.teacher.load.require_text_encoder", lambda root: None)
    monkeypatch.setattr("dtcache.teacher.load.embed_prompt", embed)
    yield prompts


def require_whole_and_mendable(root: Path, images: Path, teacher: Path) -> None:
    """Verify a cache, then delete a shard of its features and require the repair's equal bytes."""
    wanted = tree(root)
    name = array_of(Cache(root).names[-1])
    (root / "data.zarr" / name / "c.1.0.0").unlink()
    result = run("verify", root, "--repair", "--images", images, "--teacher", teacher, "--json")
    repairs = json.loads(succeeded(result).stdout)["repair"]
    assert [(r["path"], r["outcome"]) for r in repairs] == [
        (f"data.zarr/{name}/c.1.0.0", "repaired")
    ]
    assert tree(root) == wanted
    succeeded(run("verify", root))


def require_the_teachers(root: Path, images: Path, teacher: Path, labels: bool = False) -> None:
    """Compare one image's float16 features, both views, with the teacher built from the recipe."""
    cache = Cache(root)
    source = FolderSource(images)
    row = 3
    made = cache_teacher(root, read_manifest(root), str(teacher))
    key = cache.samples["key"][row].as_py()
    pixels = decode_view(source.read(source.keys.index(key)), cache.view)[0]
    told = [cache.samples["label"][row].as_py()] * 2 if labels else None
    (raw,) = made.features(
        batch_of(made, [pixels] * 2, [key] * 2, [False, True], seed=0, draws=[0], labels=told)
    )
    coefficients, _ = cache.coefficients([row, row], [0, 1], cache.names)
    for name, maps in cache.decoder(cache.names)(coefficients).items():
        np.testing.assert_allclose(maps, whiten(raw[name])[0], atol=4e-3)


def test_stable_diffusion(scene_folder: Path, tmp_path: Path, embedded: list[str]) -> None:
    """The prompt is embedded once, and resume, repair and evaluate read it from the cache."""
    teacher = tmp_path / "sd"
    out = tmp_path / "cache"
    save_stable_diffusion(teacher)
    asked = ("--prompt", "a cat [small]", "--quality", "fp16")
    succeeded(extract(scene_folder, teacher, out, *asked))
    assert embedded == ["a cat [small]"]
    stored = load_file(out / "prompt.safetensors")["embedding"]
    assert stored.shape == (TOKENS, TEXT_CHANNELS)
    report = json.loads(succeeded(run("inspect", out, "--json")).stdout)
    condition = Prompt(text="a cat [small]", embedding_LD=stored)
    assert report["recipe"]["teacher"]["condition"] == {
        "kind": "prompt",
        "prompt": condition.text,
        "embedding_sha256": condition.sha256,
    }
    assert [t["stride"] for t in report["taps"]] == [4, 8, 16]
    assert "prompt 'a cat [small]'" in succeeded(run("inspect", out)).output
    succeeded(extract(scene_folder, teacher, out, *asked))
    require_whole_and_mendable(out, scene_folder, teacher)
    require_the_teachers(out, scene_folder, teacher)
    evaluated = run(
        "evaluate", out, "--train", scene_folder, "--teacher", teacher, "--device", "cpu", "--json"
    )
    assert {row["name"] for row in json.loads(succeeded(evaluated).stdout)["rows"]} >= {
        "t150/stride4",
        "t150/stride16",
    }
    assert embedded == ["a cat [small]"]
    refused = extract(scene_folder, teacher, out, "--prompt", "a dog", "--quality", "fp16")
    assert refused.exit_code == 2
    assert (
        'teacher.condition.prompt is "a cat [small]" in the cache, "a dog" in this run'
        in refused.output
    )


def test_stable_diffusion_with_its_own_text_encoder(scene_folder: Path, tmp_path: Path) -> None:
    """A directory with text encoder and tokenizer suffices, and later runs need neither."""
    pytest.importorskip("transformers")
    teacher = tmp_path / "sd"
    out = tmp_path / "cache"
    save_stable_diffusion(teacher)
    save_text_encoder(teacher)
    asked = ("--prompt", "a cat", "--taps", "16", "--quality", "fp16")
    succeeded(extract(scene_folder, teacher, out, *asked))
    embedding_LD = load_file(out / "prompt.safetensors")["embedding"]
    assert np.array_equal(embedding_LD, embed_prompt(teacher, "a cat").embedding_LD)
    shutil.rmtree(teacher / "text_encoder")
    shutil.rmtree(teacher / "tokenizer")
    succeeded(extract(scene_folder, teacher, out, *asked))
    require_whole_and_mendable(out, scene_folder, teacher)


def test_a_damaged_embedding_is_never_used(
    scene_folder: Path, tmp_path: Path, embedded: list[str]
) -> None:
    """verify names a damaged prompt embedding, and resume and repair refuse it."""
    teacher = tmp_path / "sd"
    out = tmp_path / "cache"
    save_stable_diffusion(teacher)
    succeeded(extract(scene_folder, teacher, out))
    path = out / "prompt.safetensors"
    flip(path, -1, 64)
    damage = json.loads(run("verify", out, "--json").stdout)["damage"]
    assert [(d["path"], d["remedy"][:27]) for d in damage] == [
        ("prompt.safetensors", "restore it from a copy, or ")
    ]
    refused = extract(scene_folder, teacher, out)
    assert refused.exit_code == 1
    assert (
        "the stored embedding of the prompt does not have the SHA-256 of the recipe"
        in refused.output
    )
    (out / "data.zarr/t150/c.1.0.0").unlink()
    repair = run(
        "verify", out, "--repair", "--images", scene_folder, "--teacher", teacher, "--json"
    )
    assert repair.exit_code == 1
    assert (
        "the stored embedding of the prompt does not have the SHA-256 of the recipe"
        in repair.stderr
    )
    path.write_bytes(b"x" * 100)
    assert "not the embedding of a prompt" in extract(scene_folder, teacher, out).output


def test_an_unconditional_latent_teacher(scene_folder: Path, tmp_path: Path) -> None:
    """A latent teacher's strides are relative to the view, and its recipe has no condition."""
    teacher = tmp_path / "ldm"
    out = tmp_path / "cache"
    save_ldm(teacher)
    asked = ("--quality", "fp16", "--taps", "4,8", "--timestep", 50)
    done = succeeded(extract(scene_folder, teacher, out, *asked))
    assert (
        "the VQ autoencoder's scaling_factor is 0.18215, which save_pretrained writes"
        in done.stderr
    )
    edit(teacher / "vqvae" / "config.json", lambda c: c.update(scaling_factor=1.0))
    shutil.rmtree(out)
    assert "scaling_factor" not in succeeded(extract(scene_folder, teacher, out, *asked)).stderr
    report = json.loads(succeeded(run("inspect", out, "--json")).stdout)
    assert "condition" not in report["recipe"]["teacher"]
    assert [(t["name"], t["height"]) for t in report["taps"]] == [("stride4", 8), ("stride8", 4)]
    require_whole_and_mendable(out, scene_folder, teacher)
    require_the_teachers(out, scene_folder, teacher)


def test_a_transformer_and_its_student(scene_folder: Path, tmp_path: Path) -> None:
    """Blocks are cached by name at one stride, and a student trains on some or on all of them."""
    teacher = tmp_path / "dit"
    out = tmp_path / "cache"
    save_dit(teacher)
    succeeded(extract(scene_folder, teacher, out, "--bytes-per-image", 900))
    report = json.loads(succeeded(run("inspect", out, "--json")).stdout)
    assert report["recipe"]["teacher"]["condition"] == {"kind": "null"}
    assert [(t["name"], t["stride"]) for t in report["taps"]] == [
        (f"block{n}", 8) for n in (0, 1, 3, 4)
    ]
    assert "no class (null)" in succeeded(run("inspect", out)).output
    require_whole_and_mendable(out, scene_folder, teacher)
    trained = (
        "--student",
        "resnet10t",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--fpn-width",
        8,
        "--device",
        "cpu",
    )
    for number, (taps, wanted) in enumerate(
        (((), (0, 1, 3, 4)), (("--taps", "block3,block1"), (1, 3)))
    ):
        succeeded(run("train", out, "--out", tmp_path / f"run{number}", *trained, *taps))
        held_out = json.loads((tmp_path / f"run{number}" / "summary.json").read_text())["held_out"]
        assert {name for name in held_out if name.startswith("mse/")} == {
            f"mse/t150/block{n}" for n in wanted
        }
        assert all(np.isfinite(value) for value in held_out.values())
    refused = run("train", out, "--out", tmp_path / "none", *trained, "--taps", "16")
    assert (
        "--taps stride16: the cache has block0, block1, block3, block4; pass one of these"
        in refused.output
    )


def test_a_transformer_that_is_told_classes(scene_folder: Path, tmp_path: Path) -> None:
    """One class serves all images, and a label out of the teacher's range is refused by image."""
    teacher = tmp_path / "dit"
    out = tmp_path / "cache"
    save_dit(teacher)
    taps = ("--taps", "block2", "--quality", "fp16")
    refused = extract(scene_folder, teacher, out, *taps, "--condition", "label")
    assert refused.exit_code == 1
    assert "expected a label from 0 to 2, the teacher's classes" in refused.output
    assert not out.exists()
    succeeded(extract(scene_folder, teacher, out, *taps, "--condition", 2))
    assert read_manifest(out).recipe["teacher"]["condition"] == {"kind": "class", "number": 2}
    assert "class 2 for every image" in succeeded(run("inspect", out)).output
    require_whole_and_mendable(out, scene_folder, teacher)
    require_the_teachers(out, scene_folder, teacher)
    again = extract(scene_folder, teacher, out, *taps)
    assert 'teacher.condition.kind is "class" in the cache, "null" in this run' in again.output


def test_a_class_conditional_unet_is_told_labels(scene_folder: Path, tmp_path: Path) -> None:
    """Extraction, repair and evaluation pass each image's own label to the teacher."""
    teacher = tmp_path / "adm"
    out = tmp_path / "cache"
    save_class_unet(teacher)
    refused = extract(scene_folder, teacher, out)
    assert "conditioned on one of 8 classes; pass --condition label" in refused.output
    asked = ("--condition", "label", "--taps", "2,4", "--quality", "fp16")
    succeeded(extract(scene_folder, teacher, out, *asked))
    assert read_manifest(out).recipe["teacher"]["condition"] == {"kind": "label"}
    assert "the label of each image" in succeeded(run("inspect", out)).output
    require_whole_and_mendable(out, scene_folder, teacher)
    require_the_teachers(out, scene_folder, teacher, labels=True)
    evaluate = ("evaluate", out, "--teacher", teacher, "--device", "cpu", "--json", "--train")
    done = succeeded(run(*evaluate, scene_folder))
    assert (
        "was conditioned on each image's label; a probe may read the label from the features"
        in done.stderr
    )
    renamed = Path(shutil.copytree(scene_folder, tmp_path / "images"))
    first = sorted(p for p in renamed.iterdir() if p.is_dir())[0]
    first.rename(renamed / "zebra")
    refused = run(*evaluate, renamed)
    assert refused.exit_code == 1
    assert "expected the classes of" in refused.output


def test_images_without_labels_cannot_be_told(scene_folder: Path, tmp_path: Path) -> None:
    """Label conditioning of a flat folder without classes is refused."""
    save_class_unet(tmp_path / "adm")
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(next(scene_folder.rglob("*.png")), flat)
    refused = extract(flat, tmp_path / "adm", tmp_path / "cache", "--condition", "label")
    assert "--condition label: the images have no labels; pass a folder with" in refused.output


def test_classes_named_by_other_numbers_are_refused(scene_folder: Path, tmp_path: Path) -> None:
    """A folder 7 whose label is 1 would condition on another class; 0 and 1 get a warning."""
    save_class_unet(tmp_path / "adm")
    image = next(scene_folder.rglob("*.png"))
    for name in ("0", "7"):
        (tmp_path / "images" / name).mkdir(parents=True)
        shutil.copy(image, tmp_path / "images" / name)
    asked = ("--condition", "label", "--taps", "2,4", "--quality", "fp16", "--dry-run")
    refused = extract(tmp_path / "images", tmp_path / "adm", tmp_path / "cache", *asked)
    assert refused.exit_code == 1
    assert "Error: --condition label: class 7 has label 1: labels are positions" in refused.output
    (tmp_path / "images" / "7").rename(tmp_path / "images" / "1")
    told = succeeded(extract(tmp_path / "images", tmp_path / "adm", tmp_path / "cache", *asked))
    assert "warning: the images have 2 classes, the teacher 8: the teacher is" in told.stderr


def test_class_names_of_the_teacher_are_compared(scene_folder: Path, tmp_path: Path) -> None:
    """An `id2label` names the teacher's classes, each by one or several names.

    A class of the images that the teacher has under another number is refused; names that the
    teacher does not record get a warning; equal names, in any case, get none.
    """
    save_class_unet(tmp_path / "adm")
    image = next(scene_folder.rglob("*.png"))
    for name in ("cat", "sea_lion"):
        (tmp_path / "images" / name).mkdir(parents=True)
        shutil.copy(image, tmp_path / "images" / name)
    asked = ("--condition", "label", "--taps", "2,4", "--quality", "fp16", "--dry-run")
    for names, message in (
        (
            ("airplane", "Cat, tomcat"),
            "class cat has label 0, which is airplane to the teacher; its "
            "cat is class 1. Labels are positions in the sorted class names",
        ),
        (
            ("ship", "truck"),
            "warning: no class of the images (cat, ...) has a name that the teacher "
            "records (ship, ...): the names cannot be compared",
        ),
        (("tomcat, Cat", "Sea lion"), ""),
    ):
        recorded = {str(number): name for number, name in enumerate(names)}
        index = {"_class_name": "DiTPipeline", "id2label": recorded}
        (tmp_path / "adm" / "model_index.json").write_text(json.dumps(index))
        result = extract(tmp_path / "images", tmp_path / "adm", tmp_path / "cache", *asked)
        assert (result.exit_code == 0) == ("label 0" not in message), result.output
        said = " ".join(result.output.split())
        assert message in said
        assert message or "record" not in said


def test_the_recipe_of_an_unconditional_teacher_is_the_one_it_was() -> None:
    """An unconditional recipe has no later field, so its hash is the golden cache's."""
    from store.builders import tiny_plan

    golden = read_manifest(Path(__file__).parents[2] / "golden" / "format2" / "cache")
    recipe = tiny_plan().recipe.to_json()
    assert set(recipe["teacher"]) == set(golden.recipe["teacher"])
    assert set(recipe) == set(golden.recipe)


def test_a_recipe_tells_its_teacher_device_apart(scene_folder: Path, tmp_path: Path) -> None:
    """cache_teacher accepts another device, and refuses another teacher with the difference."""
    save_dit(tmp_path / "dit")
    out = tmp_path / "cache"
    succeeded(extract(scene_folder, tmp_path / "dit", out, "--taps", "block0", "--quality", "fp16"))
    manifest = read_manifest(out)
    compute = resolve_compute("cpu", "fp32")
    assert (
        cache_teacher(out, manifest, str(tmp_path / "dit"), "cpu").spec.device_type
        == compute.device.type
    )
    config = tmp_path / "dit" / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.5"))
    result = run(
        "evaluate", out, "--train", scene_folder, "--teacher", tmp_path / "dit", "--device", "cpu"
    )
    assert result.exit_code == 2
    assert "not the teacher of" in result.output
    assert "expected configuration" in result.output
