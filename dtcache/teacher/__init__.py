"""The teacher: making one, loading one safely, noising an image, and tapping decoder features."""

from dtcache.teacher.encode import Teacher, TeacherBatch, TeacherInput, native_size, prepare_teacher
from dtcache.teacher.load import LoadedTeacher, load_teacher

__all__ = ["LoadedTeacher", "Teacher", "TeacherBatch", "TeacherInput", "load_teacher", "native_size", "prepare_teacher"]
