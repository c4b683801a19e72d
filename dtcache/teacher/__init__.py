"""The teacher: making one, loading one safely, noising an image, and tapping decoder features."""

from dtcache.teacher.encode import Teacher, native_size, noise_batch, prepare_teacher
from dtcache.teacher.load import LoadedTeacher, load_teacher

__all__ = ["LoadedTeacher", "Teacher", "load_teacher", "native_size", "noise_batch", "prepare_teacher"]
