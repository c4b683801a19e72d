"""The classes of images, compared with those that a teacher is conditioned on."""

from collections.abc import Mapping, Sequence

from dtcache.class_names import misnumbered, numbered
from dtcache.errors import ImagesError
from dtcache.images import ImageSource
from dtcache.names import normal_form, shown
from dtcache.teacher import Teacher
from pipelines.terminal.output import say


def require_teacher_classes(teacher: Teacher, source: ImageSource) -> None:
    """Check the classes of images whose labels condition the teacher.

    Raises ImagesError if the classes are named by numbers other than their labels, or like other
    classes of the teacher. Warns on stderr if the images and the teacher have different numbers of
    classes, or if no class has a name that the teacher records.
    """
    classes = teacher.conditioned_classes
    if classes is None or source.classes is None:
        return
    other = misnumbered(source.classes)
    if other is not None:
        name, label = other
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
    names = tuple(source.classes)
    if names != numbered(len(names)) and not all(name.isdecimal() for name in names):
        _require_same_names(names, teacher.class_names)


def _require_same_names(classes: Sequence[str], recorded: Mapping[int, Sequence[str]]) -> None:
    """Compare the names of classes by number with those that a teacher's files record.

    Case, underscores and the Unicode form do not count. Several classes of a teacher may have one
    name.
    """
    numbers: dict[str, set[int]] = {}
    for number, names in recorded.items():
        for name in names:
            numbers.setdefault(_plain(name), set()).add(number)
    known = [(label, name) for label, name in enumerate(classes) if _plain(name) in numbers]
    for label, name in known:
        others = numbers[_plain(name)]
        if label not in others:
            own = shown(", ".join(recorded.get(label, ("no class",))))
            raise ImagesError(
                f"`condition='label'`: class {shown(name)} has label {label}, which is {own} to "
                f"the teacher; its {shown(name)} is class {min(others)}. Labels are positions in "
                "the sorted class names: pass images of all classes in the teacher's order, or a "
                "different `condition`"
            )
    if recorded and not known:
        say(
            f"warning: no class of the images ({shown(classes[0])}, ...) has a name that the "
            f"teacher records ({shown(', '.join(next(iter(recorded.values()))))}, ...): the names "
            "cannot be compared; make sure that both number their classes alike"
        )


def _plain(name: str) -> str:
    return normal_form(name).replace("_", " ").casefold().strip()
