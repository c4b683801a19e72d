"""The losses that a student minimises, and the objective that combines them."""

from dtcache.losses.features import at_loss, attention_map, mse_loss
from dtcache.losses.labels import interpreter_loss, label_loss
from dtcache.losses.objective import LABEL_TARGET, Objective, Targets, make_objective
from dtcache.losses.teachers import TeachersObjective, TeacherTargets, make_teachers_objective

__all__ = [
    "LABEL_TARGET",
    "Objective",
    "Targets",
    "TeacherTargets",
    "TeachersObjective",
    "at_loss",
    "attention_map",
    "interpreter_loss",
    "label_loss",
    "make_objective",
    "make_teachers_objective",
    "mse_loss",
]
