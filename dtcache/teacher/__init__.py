"""The teacher: making one, loading one safely, encoding an image, and tapping decoder features."""

from dtcache.teacher.callable import CallableTeacher
from dtcache.teacher.encode import Teacher, TeacherBatch, TeacherInput, native_size, prepare_teacher
from dtcache.teacher.load import LoadedTeacher, load_teacher
from dtcache.teacher.prompt import Prompt

__all__ = [
    "CallableTeacher",
    "LoadedTeacher",
    "Prompt",
    "Teacher",
    "TeacherBatch",
    "TeacherInput",
    "load_teacher",
    "native_size",
    "prepare_teacher",
]
