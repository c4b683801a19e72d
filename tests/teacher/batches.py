"""Several views as one batch for a teacher."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtcache.teacher import Teacher, TeacherBatch


def batch_of(
    teacher: Teacher,
    pixels: Sequence[NDArray[np.uint8]],
    keys: Sequence[str],
    flips: Sequence[bool],
    *,
    seed: int = 0,
    draws: Sequence[int] = (0,),
    labels: Sequence[int] | None = None,
) -> TeacherBatch:
    """Return uint8 views (3, H, W), mirrored where their flip says so, with their noise."""
    told = labels if labels is not None else [None] * len(keys)
    return teacher.batch(
        [
            teacher.input(p, key, flip, seed=seed, draws=draws, label=label)
            for p, key, flip, label in zip(pixels, keys, flips, told, strict=True)
        ]
    )
