"""The losses that a student minimises, and the objective that combines them."""

from dtcache.losses.features import at_loss, attention_map, mse_loss
from dtcache.losses.labels import interpreter_loss, label_loss
from dtcache.losses.objective import LABEL_TARGET, Objective, Targets, make_objective

__all__ = [
    "LABEL_TARGET",
    "Objective",
    "Targets",
    "at_loss",
    "attention_map",
    "interpreter_loss",
    "label_loss",
    "make_objective",
    "mse_loss",
]
