"""What labels.py measures of an interpreter and of students before they are finetuned."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtcache.cache.cache import Cache
from dtcache.device import configure_process, resolve_compute
from dtcache.labels import load_interpreter
from dtcache.metrics.segmentation import confusion_matrix, mean_iou
from dtcache.options import EvaluateOptions
from dtcache.student.blocks import resize
from dtcache.student.logit_head import load_head
from pipelines.evaluate.dense_features import open_trunk
from pipelines.evaluate.masked_images import masked_images
from pipelines.evaluate.segmentation import BATCH_SIZE, Segmenter
from pipelines.label.labelled_rows import images_with_masks


@torch.no_grad()
def interpreter_miou(folder: Path, test_cache: Path, options: EvaluateOptions) -> dict[str, float]:
    """Return an interpreter's own `miou` on the teacher's cached features of the test images, per
    cent.
    """
    cache = Cache(test_cache)
    interpreter = load_interpreter(folder)
    assert options.test_masks is not None
    known = images_with_masks(cache, options.test_masks, None, None, options.test)
    names = list(interpreter.spec.shapes)
    decoder = cache.decoder(names)
    classes = len(interpreter.spec.classes)
    counts = np.zeros((classes, classes), np.int64)
    for start in range(0, len(known), 32):
        part = known.take(range(start, min(start + 32, len(known))))
        coefficients, _ = cache.coefficients(part.rows, [0] * len(part), names)
        logits = resize(interpreter.network(decoder(coefficients)), part.truth_NHW.shape[1:])
        counts += confusion_matrix(
            part.truth_NHW.numpy(), logits.argmax(1).numpy(), classes, part.ignore
        )
    return {"miou": 100 * mean_iou(counts)}


def own_miou(run: Path, options: EvaluateOptions) -> dict[str, float]:
    """Return the `miou` of a student that learned labels, by its own head and not finetuned, per
    cent.
    """
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    trunk = open_trunk(str(run / "backbone"), replace(options, finetune=False), BATCH_SIZE, compute)
    _, test = masked_images(options, trunk.view)
    head, spec = load_head(run / "head", trunk.shapes, trunk.input_size)
    segmenter = Segmenter(
        trunk=trunk, head=head.to(compute.device), batch_size=BATCH_SIZE, compute=compute
    )
    counts = segmenter.confusion(test, len(spec.classes))
    return {"miou": 100 * mean_iou(counts)}


def held_out(run: Path) -> dict[str, Any]:
    """Return the losses of a student on the cache's held-out images: `mse`, the mean over taps, and
    `label`.
    """
    found = json.loads((run / "summary.json").read_text())["held_out"]
    mse = [value for name, value in found.items() if name.startswith("mse/")]
    return {"mse": statistics.mean(mse) if mse else None, "label": found.get("label")}
