"""Evaluation: splits, features of backbones, caches and pixels, and results."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from cli import main
from dtcache.cache.cache import Cache
from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, ImagesError, ImagesNotFoundError, WeightsError
from dtcache.images import FolderSource, load_views
from dtcache.metrics.probes import Neighbours
from dtcache.options import EvaluateOptions, ExtractOptions
from dtcache.recipe import Sample, ViewSpec
from dtcache.student import fresh_batch_norms, make_backbone, save_backbone
from dtcache.teacher.ddpm import build_unet, save_teacher
from pipelines.evaluate.classification import ClassificationResult, ProbeResult, classify
from pipelines.evaluate.evaluate import evaluate
from pipelines.evaluate.image_split import EvaluatedImages
from pipelines.evaluate.labelled_images import split_labelled
from pipelines.evaluate.pooled_features import (
    ALL_TAPS,
    CacheFeatures,
    EvaluatedBackbone,
    NetworkFeatures,
    open_model,
    pooled_features,
)
from pipelines.extract.extract import extract

CPU = resolve_compute("cpu", "fp32")
SIZE = 16


def write_images(
    root: Path, count: int, *, seed: int, classes: tuple[str, ...] = ("blue", "red")
) -> Path:
    """Write `count` random PNG files per class; the classes differ in hue."""
    rng = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 120, (SIZE, SIZE, 3)).astype(np.uint8)
            pixels[:, :, 2 * (1 - place)] += 100
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two image folders, a tiny teacher, and the cache of the first folder's images."""
    root = tmp_path_factory.mktemp("evaluate")
    write_images(root / "train", 20, seed=1)
    write_images(root / "test", 6, seed=2)
    torch.manual_seed(0)
    save_teacher(build_unet(SIZE, SIZE, (8, 16, 16), 1, 0), root / "teacher", torch.float32)
    taken = ExtractOptions(
        teacher=str(root / "teacher"),
        taps="2,4",
        timestep=(50,),
        bytes_per_image=1700.0,
        batch_size=8,
        device="cpu",
        precision="fp32",
    )
    extract(root / "train", root / "cache", taken)
    return root


def options_for(root: Path, **changes: object) -> EvaluateOptions:
    """Return options for a folder with train/ and test/."""
    plain = EvaluateOptions(
        train=root / "train", test=root / "test", k=3, device="cpu", precision="fp32"
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# Images and splits.


def test_splits_depend_on_keys_options_and_seed_alone(shelf: Path) -> None:
    """The split is a function of keys, options and seed, and its held-out fifth is disjoint."""
    train, test = split_labelled(options_for(shelf))
    assert sorted(train.indices) == list(range(40))
    assert sorted(test.indices) == list(range(12))
    short, few = split_labelled(options_for(shelf, limit_train=7, limit_test=5))
    assert (short.indices, few.indices) == (train.indices[:7], test.indices[:5])
    assert split_labelled(options_for(shelf, seed=1))[0].indices != train.indices


def test_without_test_images_a_fifth_is_held_out(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without test images the last fifth of the permuted training images is held out."""
    whole, _ = split_labelled(options_for(shelf))
    train, test = split_labelled(options_for(shelf, test=None, limit_test=3))
    assert train.indices == whole.indices[:32]
    assert test.indices == whole.indices[32:35]
    assert "no test images given: 8 of 40 training images are held out" in capsys.readouterr().err


def test_images_without_labels_are_refused(shelf: Path, tmp_path: Path) -> None:
    """Images without labels, or with classes that differ between the sets, stop the evaluation."""
    with pytest.raises(
        ImagesError, match=r"red: expected a label for every image.*one sub-folder per class"
    ):
        split_labelled(options_for(shelf, train=shelf / "train" / "red"))
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "PNG")
    image = pa.array([{"bytes": sink.getvalue(), "path": f"{i}"} for i in range(2)])
    for labels in ([0, None], [0, -1]):
        pq.write_table(
            pa.table({"image": image, "label": pa.array(labels, pa.int64())}),
            tmp_path / "some.parquet",
        )
        with pytest.raises(ImagesError, match=r"some\.parquet: expected a label for every image"):
            split_labelled(options_for(shelf, test=tmp_path / "some.parquet"))
    other = write_images(tmp_path / "other", 1, seed=0, classes=("blue", "grey"))
    with pytest.raises(
        ImagesError,
        match=(
            r"other: expected the classes of .*train, the first list, got others: only the first "
            r"has red and only the second has grey\. Labels"
        ),
    ):
        split_labelled(options_for(shelf, test=other))
    with pytest.raises(ImagesNotFoundError, match=r"nowhere does not exist"):
        split_labelled(options_for(shelf, test=tmp_path / "nowhere"))


def test_class_names_of_both_sets_are_compared(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names recorded in Parquet are compared with folders; a warning if only one side has names."""
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "PNG")
    image = pa.array([{"bytes": sink.getvalue(), "path": f"{i}"} for i in range(2)])
    table = pa.table({"image": image, "label": [0, 1]})
    for names, message in (
        (["red", "blue"], r"both have the same names in another order: blue is class 0 in one an"),
        (["blue", "red", "grey"], r"got others: only the second has grey\. Labels are numbers"),
    ):
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "test.parquet")
        with pytest.raises(ImagesError, match=message):
            split_labelled(options_for(shelf, test=tmp_path / "test.parquet"))
    pq.write_table(table, tmp_path / "test.parquet")
    _, test = split_labelled(options_for(shelf, test=tmp_path / "test.parquet"))
    assert len(test.indices) == 2
    assert (
        "test.parquet names no classes: its labels are taken as numbers of the classes of "
        in capsys.readouterr().err
    )


def test_each_set_has_its_own_split(tmp_path: Path) -> None:
    """The options split and test_split choose the files of the training and the test images."""
    for split in ("train", "test"):
        image = pa.array([{"bytes": b"1", "path": split}])
        pq.write_table(pa.table({"image": image, "label": [0]}), tmp_path / f"{split}.parquet")
    options = EvaluateOptions(train=tmp_path, test=tmp_path, split="train", test_split="test")
    train, test = split_labelled(options)
    assert (list(train.source.keys), list(test.source.keys)) == (["train"], ["test"])
    with pytest.raises(ConfigError, match=r"`test_split` test: expected `test` with it; pass bo"):
        EvaluateOptions(train=tmp_path, test_split="test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ""}, "`train`: expected labelled training images"),
        ({"limit_train": 0}, "`limit_train` 0: expected at least 1"),
        ({"limit_test": -1}, "`limit_test` -1: expected at least 1"),
        ({"batch_size": 0}, "`batch_size` 0: expected at least 1"),
        ({"size": "big"}, "`size` big: expected H or HxW"),
        ({"k": 41}, "`k` 41: expected 1 to 40"),
    ],
)
def test_options_that_cannot_work_are_refused(
    shelf: Path, changes: dict[str, object], message: str
) -> None:
    """An option out of its range raises an error with the option's name and the expected range."""
    with pytest.raises(ConfigError, match=message):
        classify("pixels", options_for(shelf, **changes))


def test_bad_images_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Undecodable images are skipped and counted; an error is raised if no image decodes."""
    write_images(tmp_path / "train", 5, seed=0)
    write_images(tmp_path / "test", 2, seed=1)
    (tmp_path / "train" / "blue" / "000.png").write_bytes(b"no image")
    (result,) = classify("pixels", options_for(tmp_path)).rows
    assert (result.num_train, result.num_test) == (9, 4)
    assert "1 of 10 training images left out (cannot identify image file" in capsys.readouterr().err
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        ImagesError, match=r"expected test images that .* got none; all failed \(empty file\)"
    ):
        classify("pixels", options_for(tmp_path))


# Features.


def test_pixels_are_the_views_pixels(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pixel baseline's features are the view's values divided by 255.

    Every C separates these classes: the smallest is chosen, and stderr says that it is an edge.
    """
    train, _ = split_labelled(options_for(shelf))
    features, labels = pooled_features(
        open_model("pixels", options_for(shelf, size="16"), CPU), train, 16
    )
    for place in (0, 39):
        path = shelf / "train" / train.source.keys[train.indices[place]]
        expected = np.asarray(Image.open(path), np.float32).transpose(2, 0, 1).reshape(-1) / 255
        np.testing.assert_allclose(features["pixels"][place], expected, rtol=1e-6)
        assert labels[place] == ["blue", "red"].index(path.parent.name)
    (result,) = classify("pixels", options_for(shelf, size="16")).rows
    assert (result.feature_dim, result.knn_top1, result.linear_top1) == (768, 100.0, 100.0)
    assert result.to_json()["linear_C_at_edge"] is True
    assert (
        "pixels: the linear probe chose C = 1e-05, an edge of its grid of 1e-05 to 100; a value "
        "beyond may be better" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("votes", "temperature"), [("weighted", 0.07), ("plain", None)])
def test_neighbours_vote_as_the_option_says(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, votes: str, temperature: float | None
) -> None:
    """Votes are weighted at temperature 0.07 by default; `knn_votes='plain'` weights none."""
    from pipelines.evaluate import classification

    seen = []
    real = classification.knn_predict

    def spy(*arguments: object) -> object:
        seen.append(arguments[3])
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(classification, "knn_predict", spy)
    classify("pixels", options_for(shelf, size="4", knn_votes=votes))
    assert seen == [Neighbours(k=3, temperature=temperature)]
    assert options_for(shelf).knn_votes == "weighted"


def test_a_backbone_folder_is_probed_as_timm_would_run_it(shelf: Path, tmp_path: Path) -> None:
    """A backbone's features equal those of timm's own local-dir model on the same resized view."""
    backbone = make_backbone("resnet10t", init=None, seed=0)
    backbone.train().pooled(torch.randn(8, 3, 32, 32))
    save_backbone(
        backbone,
        tmp_path,
        input_size=(32, 48),
        view=ViewSpec(height=8, width=12, resize_mode="stretch"),
    )
    extractor = open_model(str(tmp_path), options_for(shelf), CPU)
    train, test = split_labelled(options_for(shelf))
    extractor.prepare(train, test)
    features, _ = pooled_features(extractor, test, 5)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    for place, index in enumerate(test.indices[:3]):
        small = Image.open(shelf / "test" / test.source.keys[index]).resize(
            (12, 8), Image.Resampling.BICUBIC
        )
        planes = [
            plane.convert("F").resize((48, 32), Image.Resampling.BILINEAR)
            for plane in small.split()
        ]
        x_CHW = np.stack([np.asarray(plane) for plane in planes]) / 255
        x_CHW = (x_CHW - np.reshape(backbone.mean, (3, 1, 1))) / np.reshape(backbone.std, (3, 1, 1))
        with torch.no_grad():
            expected = model(torch.from_numpy(x_CHW[None]).float())
        np.testing.assert_allclose(features["resnet10t"][place], expected[0], rtol=1e-3, atol=1e-4)


def test_random_networks_are_calibrated_and_trained_ones_are_not(shelf: Path) -> None:
    """Batch norms of an untrained network are calibrated on training images, once and only then."""
    train, test = split_labelled(options_for(shelf))
    backbone = make_backbone("resnet10t", init=None, seed=0)
    evaluated = EvaluatedBackbone(
        name="resnet10t",
        backbone=backbone,
        view=ViewSpec(height=16, width=16),
        input_size=(32, 32),
    )
    extractor = NetworkFeatures(evaluated, 16, CPU)
    assert len(fresh_batch_norms(backbone)) > 5
    extractor.prepare(train, test)
    assert fresh_batch_norms(backbone) == []
    # 40 images make two full batches of 16; the shorter third batch is not used.
    assert {
        int(v) for k, v in backbone.state_dict().items() if k.endswith("num_batches_tracked")
    } == {2}
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    extractor.prepare(train, test)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_a_timm_name_repeats_and_takes_a_size(shelf: Path) -> None:
    """A timm name, seed and size give repeatable results; the row says that weights are random."""
    first = classify("resnet10t", options_for(shelf, size="32"))
    assert first == classify("resnet10t", options_for(shelf, size="32"))
    (row,) = first.rows
    assert (row.name, row.feature_dim) == ("resnet10t (random weights)", 512)
    assert (row.num_train, row.num_test) == (40, 12)
    assert first.to_json()["best"] == "resnet10t (random weights)"


def test_a_tag_means_pretrained_weights(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm name with a tag is built with timm's weights; without a connection it is refused."""
    called = []

    def offline(name: str, **options: object) -> None:
        called.append((name, options["pretrained"]))
        raise OSError("cannot reach huggingface.co\nin any way")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        WeightsError,
        match=r"^timm cannot make resnet18\.a1_in1k with pretrained weights at 32x32 pixels "
        r"\(cannot reach huggingface\.co in any way\); check the name's tag and the connection to "
        r"the hub, or use resnet18 with random weights$",
    ):
        classify("resnet18.a1_in1k", options_for(shelf, size="32"))
    assert called == [("resnet18.a1_in1k", True)]


def test_patches_that_do_not_divide_the_size_are_refused(shelf: Path) -> None:
    """Pooled and dense evaluation refuse a size of which a ViT would leave out the border."""
    plain = EvaluateOptions(train=shelf / "train", size="40", device="cpu")
    for options in (plain, replace(plain, task="segmentation", train_masks=shelf)):
        with pytest.raises(
            ConfigError,
            match=r"test_vit: .*do not divide images of 40x40.*pass `size` 32x32 or 48x48",
        ):
            evaluate("test_vit", options)


def test_models_of_no_kind_are_refused_with_a_hint(shelf: Path, tmp_path: Path) -> None:
    """A model that is no backbone is refused with a hint at the run's backbone or similar names."""
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError,
        match=r"expected a cache .* or a backbone folder .*; did you mean .*/backbone\?",
    ):
        classify(str(tmp_path), options_for(shelf))
    with pytest.raises(ConfigError, match=r"resnet1O: timm .* has no network of this name"):
        classify("resnet1O", options_for(shelf))


# Features of a cache.


def test_cached_taps_are_means_of_decoded_features(shelf: Path) -> None:
    """Cached features are the spatial means of view 0, per tap and concatenated over all taps."""
    cache = Cache(shelf / "cache")
    extractor = CacheFeatures(cache, None, CPU)
    source = FolderSource(shelf / "train")
    batch = list(load_views(source, [3, 21, 8], extractor.view, threads=1))
    got = extractor(batch, [Sample(index=0, key="renamed")] * 3)
    keys = cache.samples["key"].to_pylist()
    rows = [keys.index(source.keys[i]) for i in (3, 21, 8)]
    assert list(got) == ["t50/stride2", "t50/stride4", ALL_TAPS]
    for name in cache.names:
        coefficients = cache.batch(rows, [0, 0, 0], [name]).coefficients
        maps = cache.decoder([name])(coefficients)[name].numpy()
        assert maps.shape[2:] == ((8, 8) if name.endswith("2") else (4, 4))
        np.testing.assert_allclose(got[name], maps.mean((2, 3)), atol=1e-5)
    np.testing.assert_array_equal(got[ALL_TAPS], torch.cat([got[name] for name in cache.names], 1))


def test_the_teacher_recomputes_what_the_cache_holds(shelf: Path) -> None:
    """For an image outside the cache the teacher computes what extract would have cached."""
    train, _ = split_labelled(options_for(shelf, limit_train=13))
    cached, _ = pooled_features(CacheFeatures(Cache(shelf / "cache"), None, CPU), train, 13)
    blind = CacheFeatures(Cache(shelf / "cache"), str(shelf / "teacher"), CPU)
    blind.maps._row_of = {}
    fresh, _ = pooled_features(blind, train, 13)
    renamed = EvaluatedImages(
        title="renamed", source=_Renamed(shelf / "train"), indices=train.indices
    )
    other, _ = pooled_features(blind, renamed, 13)
    for name in cached:
        # The batches differ in composition, so a coefficient near a rounding boundary may round the
        # other way.
        scale = np.abs(cached[name]).mean()
        assert np.abs(fresh[name] - cached[name]).mean() < 0.01 * scale
        assert np.abs(other[name] - cached[name]).mean() > 0.01 * scale


class _Renamed(FolderSource):
    """The same images under other keys, and therefore with other noise."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._paths = self.keys
        self.keys = [f"other/{key}" for key in self.keys]

    def read(self, index: int) -> bytes:
        return (self.root / self._paths[index]).read_bytes()


def test_a_cache_is_probed_tap_by_tap(shelf: Path) -> None:
    """A cache with its teacher gives one row per tap and one for all taps, for any test images."""
    results = classify(str(shelf / "cache"), options_for(shelf, teacher=str(shelf / "teacher")))
    assert [(r.name, r.feature_dim) for r in results.rows] == [
        ("t50/stride2", 16),
        ("t50/stride4", 16),
        ("all", 32),
    ]
    assert {(r.num_train, r.num_test) for r in results.rows} == {(40, 12)}
    alone = classify(str(shelf / "cache"), options_for(shelf, test=None))
    assert {(r.num_train, r.num_test) for r in alone.rows} == {(32, 8)}


def test_images_outside_the_cache_need_the_teacher(shelf: Path, tmp_path: Path) -> None:
    """Images outside the cache are refused without the teacher, or with a different teacher."""
    with pytest.raises(
        ConfigError,
        match=r"cache: 12 of 52 images are not in the cache; pass the cache's `teacher`",
    ):
        classify(str(shelf / "cache"), options_for(shelf))
    torch.manual_seed(1)
    save_teacher(build_unet(SIZE, SIZE, (8, 16, 16), 1, 0), tmp_path / "other", torch.float32)
    wanted = Cache(shelf / "cache").reader.manifest.recipe["teacher"]["weights_sha256"]
    with pytest.raises(
        ConfigError,
        match=rf"other: not the teacher .*expected weights {wanted}, got [0-9a-f]{{64}}",
    ):
        classify(str(shelf / "cache"), options_for(shelf, teacher=str(tmp_path / "other")))


def test_a_teacher_with_another_noise_schedule_is_refused(shelf: Path, tmp_path: Path) -> None:
    """A teacher with equal weights and a different noise schedule is a different teacher."""
    save_teacher(build_unet(SIZE, SIZE, (8, 16, 16), 1, 0), tmp_path / "bent", torch.float32)
    weights = "unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "bent" / weights).write_bytes((shelf / "teacher" / weights).read_bytes())
    schedule = tmp_path / "bent" / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), "beta_end": 0.01}))
    with pytest.raises(
        ConfigError, match=r"bent: not the teacher of .*expected noise levels \[0\.9.*got \[0\.9"
    ):
        classify(str(shelf / "cache"), options_for(shelf, teacher=str(tmp_path / "bent")))


def test_features_that_are_not_finite_are_left_out(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image whose features are not finite is skipped, and the other images are kept."""
    extractor = CacheFeatures(Cache(shelf / "cache"), str(shelf / "teacher"), CPU)
    plain = extractor.maps._raw_draws

    def overflowing(batch, samples, flips):  # type: ignore[no-untyped-def]
        draws = [
            {name: raw.clone() for name, raw in draw.items()}
            for draw in plain(batch, samples, flips)
        ]
        draws[0]["t50/stride4"][0, 0, 0, 0] = torch.inf
        return draws

    extractor.maps._raw_draws = overflowing  # type: ignore[method-assign]
    _, test = split_labelled(options_for(shelf))
    features, labels = pooled_features(extractor, test, 12)
    # Twelve images in passes of eight: the first of either pass overflows.
    assert {len(x) for x in features.values()} == {len(labels)} == {10}
    assert "2 of 12 test images left out (features that are not finite)" in capsys.readouterr().err


# Command line.


def test_json_puts_the_best_single_row_on_top() -> None:
    """The JSON's top level repeats the best single tap by linear probe, never the concatenation."""
    row = ProbeResult(
        name="a",
        knn_top1=1.0,
        linear_top1=2.0,
        num_train=3,
        num_test=4,
        feature_dim=5,
        linear_c=0.1,
    )
    rows = [
        row,
        replace(row, name="b", linear_top1=9.0),
        replace(row, name=ALL_TAPS, linear_top1=99.0),
    ]
    value = ClassificationResult(rows=tuple(rows)).to_json()
    assert (value["best"], value["linear_top1"], value["linear_C"]) == ("b", 9.0, 0.1)
    assert value["linear_C_at_edge"] is False
    assert [r["name"] for r in value["rows"]] == ["a", "b", "all"]
    assert {"knn_top1", "linear_top1", "num_train", "num_test", "feature_dim"} <= set(value)


def test_stdout_is_json_and_nothing_else(shelf: Path) -> None:
    """Stdout is pure JSON with --json and a table without --json, and --train is required."""
    flags = [
        "evaluate",
        "pixels",
        "--train",
        str(shelf / "train"),
        "--k",
        "3",
        "--size",
        "8",
    ]
    done = CliRunner().invoke(main, [*flags, "--json"])
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert (value["model"], value["num_train"], value["num_test"]) == ("pixels", 32, 8)
    assert "no test images given" in done.stderr
    assert "linear top-1 %" in CliRunner().invoke(main, flags).stdout
    assert "Missing option '--train'" in CliRunner().invoke(main, ["evaluate", "pixels"]).output
