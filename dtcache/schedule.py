"""The learning-rate schedule of both training stages."""

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the factor of the peak rate at a step: linear warm-up over `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
