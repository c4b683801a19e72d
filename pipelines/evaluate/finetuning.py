"""The recipe of finetuning: learning rates, augmentation, and the draws that mirror images."""

import numpy as np
from numpy.typing import NDArray

from dtcache.rng import sample_uniforms
from dtcache.student import Augmentation
from dtcache.student.augmentation import AUGMENTATION_DRAWS

HEAD_LR = 1e-3
WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.1
"""Share of the steps that is linear warm-up."""
BACKBONE_LR = 0.1
"""Ratio of a finetuned backbone's learning rate to the head's."""
SCALE = "0.25,1.0"
COLOR_JITTER = 0.5
"""Random crops and colour jitter of finetuning; images of a frozen backbone are only mirrored."""


def finetuning_augmentation(seed: int) -> Augmentation:
    """Return the crops and the colour jitter of finetuning."""
    return Augmentation(scale=SCALE, color_jitter=COLOR_JITTER, seed=seed)


def mirror_draws(seed: int, step: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return one uniform draw per image (B,): the draw after those of crops and jitter."""
    return sample_uniforms(seed, step, rows, AUGMENTATION_DRAWS + 1)[:, AUGMENTATION_DRAWS]
