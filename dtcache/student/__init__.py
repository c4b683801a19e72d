"""The student: a backbone, its augmented input, and the regressor of teacher features."""

from dtcache.student.augmentation import Augmentation
from dtcache.student.backbone import Backbone, MapsModule, student_input
from dtcache.student.backbone_io import load_backbone, save_backbone
from dtcache.student.batch_norm import (
    fresh_batch_norms,
    recalibrate_batch_norm,
    synchronise_batch_norm,
)
from dtcache.student.regressor import FeatureRegressor
from dtcache.student.student import Student, build_student, probe_maps
from dtcache.student.timm_backbone import make_backbone

__all__ = [
    "Augmentation",
    "Backbone",
    "FeatureRegressor",
    "MapsModule",
    "Student",
    "build_student",
    "fresh_batch_norms",
    "load_backbone",
    "make_backbone",
    "probe_maps",
    "recalibrate_batch_norm",
    "save_backbone",
    "student_input",
    "synchronise_batch_norm",
]
