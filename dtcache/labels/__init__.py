"""Label distillation: the feature interpreter, its folder, and the decoder of soft labels."""

from dtcache.labels.folder import (
    MAX_CLASSES,
    SCORES,
    Interpreter,
    InterpreterSpec,
    load_interpreter,
    require_serves,
    save_interpreter,
    teacher_identity,
)
from dtcache.labels.interpreter import FeatureInterpreter, logit_grid, require_width

__all__ = [
    "MAX_CLASSES",
    "SCORES",
    "FeatureInterpreter",
    "Interpreter",
    "InterpreterSpec",
    "load_interpreter",
    "logit_grid",
    "require_serves",
    "require_width",
    "save_interpreter",
    "teacher_identity",
]
