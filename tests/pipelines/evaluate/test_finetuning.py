"""Finetuned classification: accuracy, resume, balanced fractions, and options that are refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError
from dtcache.options import EvaluateOptions
from pipelines.evaluate.classification import ClassificationResult
from pipelines.evaluate.evaluate import evaluate
from pipelines.evaluate.finetuned_classifier import Classifier, ClassifierTraining
from pipelines.evaluate.image_split import EvaluatedImages
from pipelines.evaluate.labelled_images import split_labelled
from pipelines.evaluate.pooled_features import NetworkFeatures, open_network
from pipelines.terminal.open_images import open_images

SIZE = 32
TINY = "test_resnet"
COUNTS = {"blue": 6, "green": 6, "red": 12}


def write_images(root: Path, counts: dict[str, int], *, seed: int) -> Path:
    """Write random images whose brightest channel is that of their class."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 150, (SIZE, SIZE, 3)).astype(np.uint8)
            pixels[:, :, ("red", "green", "blue").index(name)] += 100
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test images of three classes."""
    root = tmp_path_factory.mktemp("finetune")
    write_images(root / "train", COUNTS, seed=1)
    write_images(root / "test", {name: 3 for name in COUNTS}, seed=2)
    return root


def options_for(root: Path, **changes: object) -> EvaluateOptions:
    """Return options for a folder with train/ and test/."""
    plain = EvaluateOptions(
        train=root / "train",
        test=root / "test",
        k=3,
        size=str(SIZE),
        batch_size=8,
        device="cpu",
        precision="fp32",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_finetuning_learns_and_stands_beside_the_probes(shelf: Path, tmp_path: Path) -> None:
    """Top-1 stands beside the probes' scores, which do not change, and a rerun repeats it."""
    options = options_for(shelf, finetune=True, epochs=15, lr=1e-2, out=tmp_path / "out")
    result = evaluate(TINY, options)
    assert isinstance(result, ClassificationResult) and result.finetuned is not None
    assert result.finetuned.top1 > 70 and result.finetuned.top5 is None
    values = result.to_json()
    assert values["finetuned_top1"] == result.finetuned.top1 and values["finetuned_top5"] is None
    assert values.keys() >= {*options.scores} > {"knn_top1"}
    probes = evaluate(TINY, options_for(shelf))
    assert isinstance(probes, ClassificationResult)
    assert probes.rows == result.rows and "finetuned_top1" not in probes.to_json()
    assert torch.load(tmp_path / "out/checkpoint.pt")["step"] == 45
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == values
    assert evaluate(TINY, options).to_json() == values


def test_top_5_counts_the_five_best_scores(tmp_path: Path) -> None:
    """With six classes, top-5 misses the images whose class has the lowest score."""
    names = [f"class-{number}" for number in range(6)]
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (SIZE, SIZE), "white").save(tmp_path / name / "1.png")
    options = options_for(tmp_path, train=tmp_path, test=None)
    source = open_images(tmp_path, options.reading)
    images = EvaluatedImages(title="test images", source=source, indices=list(range(6)))
    evaluated = open_network(TINY, options)
    network = Classifier(evaluated.backbone, evaluated.backbone.channels[-1], 6).eval()
    torch.nn.init.zeros_(network.score.weight)
    network.score.bias.data = torch.tensor([1.0, 6, 2, 3, 4, 5])
    compute = resolve_compute("cpu", "fp32")
    training = ClassifierTraining(
        network=network,
        optimization=None,  # type: ignore[arg-type]
        features=NetworkFeatures(evaluated, 4, compute),
        images=images,
        seed=0,
        compute=compute,
    )
    accuracy = training.accuracy(images, 4)
    assert accuracy.top1 == pytest.approx(100 / 6) and accuracy.top5 == pytest.approx(500 / 6)


def test_a_fraction_has_equally_many_images_per_class_and_is_nested(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each class has the same number of images, one at least; a class with fewer gives all."""
    chosen = {}
    for fraction, per_class in ((0.01, 1), (0.5, 4), (1.0, 8)):
        train, test = split_labelled(options_for(shelf, label_fraction=fraction))
        counts = Counter(train.source.keys[index].split("/")[0] for index in train.indices)
        assert counts == {name: min(per_class, count) for name, count in COUNTS.items()}
        chosen[fraction] = set(train.indices)
        assert len(test.indices) == 9
    assert chosen[0.01] < chosen[0.5] < chosen[1.0]
    error = capsys.readouterr().err
    assert "3 of 24 training images are used, 1 per class\n" in error
    assert "20 of 24 training images are used, 8 per class; 2 classes have fewer" in error


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (TINY, {"epochs": 3}, r"`epochs`: only finetuning uses it.*pass `finetune=True` too"),
        (TINY, {"out": Path("x")}, r"`out`: only finetuning uses it"),
        (TINY, {"masks": True}, r"`masks`: not an option of `task='classification'`"),
        ("pixels", {"finetune": True}, r"pixels: expected a backbone folder or a timm name.*with"),
    ],
)
def test_options_without_effect_are_refused(
    shelf: Path, model: str, changes: dict[str, object], message: str
) -> None:
    """Options of finetuning need it, and only a network can be finetuned."""
    with pytest.raises(ConfigError, match=message):
        evaluate(model, options_for(shelf, **changes))
