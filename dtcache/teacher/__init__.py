"""The teacher: safe loading, the encoding of images, and decoder features at its taps."""

from dtcache.teacher.load import load_teacher
from dtcache.teacher.loaded_teacher import LoadedTeacher
from dtcache.teacher.module_teacher import CallableTeacher
from dtcache.teacher.prompt import Prompt
from dtcache.teacher.teacher import (
    Teacher,
    TeacherBatch,
    TeacherInput,
    TeacherSettings,
    native_size,
    prepare_teacher,
)

__all__ = [
    "CallableTeacher",
    "LoadedTeacher",
    "Prompt",
    "Teacher",
    "TeacherBatch",
    "TeacherInput",
    "TeacherSettings",
    "load_teacher",
    "native_size",
    "prepare_teacher",
]
