"""The teacher: making one, loading one safely, noising an image, and tapping its features."""

from dtcache.teacher.encode import Teacher, TeacherBatch, native_size, prepare_teacher
from dtcache.teacher.load import LoadedTeacher, load_teacher
from dtcache.teacher.prompt import Prompt

__all__ = ["LoadedTeacher", "Prompt", "Teacher", "TeacherBatch", "load_teacher", "native_size", "prepare_teacher"]
