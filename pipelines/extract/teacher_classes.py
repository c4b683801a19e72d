"""The classes of images, compared with those that a teacher is conditioned on."""

from dtcache.class_names import misnumbered
from dtcache.errors import ImagesError
from dtcache.images import ImageSource
from dtcache.teacher import Teacher
from pipelines.terminal.output import say


def require_teacher_classes(teacher: Teacher, source: ImageSource) -> None:
    """Check the classes of images whose labels condition the teacher.

    Raises ImagesError if the classes are named by numbers other than their labels. Warns on stderr
    if the images and the teacher have different numbers of classes.
    """
    classes = teacher.conditioned_classes
    if classes is None or source.classes is None:
        return
    numbered = misnumbered(source.classes)
    if numbered is not None:
        name, label = numbered
        raise ImagesError(
            f"`condition='label'`: class {name} has label {label}: labels are positions in the "
            "sorted class names, so the teacher would be conditioned on another class; pad the "
            "names with zeros, with one name for each of the teacher's classes, or pass a "
            "different `condition`"
        )
    if len(source.classes) != classes:
        say(
            f"warning: the images have {len(source.classes)} classes, the teacher {classes}: the "
            f"teacher is conditioned on class 0 for {source.classes[0]}, and so on; make sure "
            "that both number their classes alike"
        )
