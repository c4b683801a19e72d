"""What a conditional teacher is told of an image beside its noisy pixels: its class, another one,
none, or a prompt.
"""

import re
from collections.abc import Iterable

from dtcache.errors import ConfigError, ImagesError
from dtcache.recipe import ConditionSpec
from dtcache.teacher.denoiser import Denoiser
from dtcache.teacher.prompt import Prompt


def choose_condition(
    denoiser: Denoiser, prompt: Prompt | None, asked: str | None
) -> ConditionSpec | None:
    """Return the condition that `asked` names (label, null, or a class number), or a default.

    The default is null where the teacher was trained with a null class. Raises ConfigError where
    the teacher cannot be conditioned so, or where it must be chosen.
    """
    classes = denoiser.num_classes
    if prompt is not None:
        if asked is not None:
            raise ConfigError(
                f"--condition {asked}: this teacher is conditioned on text; use --prompt instead"
            )
        return ConditionSpec(kind="prompt", prompt=prompt.text, embedding_sha256=prompt.sha256)
    if classes is None:
        if asked is not None:
            raise ConfigError(
                f"--condition {asked}: this teacher is not class-conditional; leave --condition out"
            )
        return None
    if asked is None and denoiser.null_class is None:
        raise ConfigError(
            f"this teacher is conditioned on one of {classes} classes: choose --condition label "
            f"(that of each image) or the number of a class, 0 to {classes - 1}"
        )
    if asked == "label":
        return ConditionSpec(kind="label")
    if asked in (None, "null"):
        if denoiser.null_class is None:
            raise ConfigError(
                f"--condition null: this teacher's configuration has {classes} classes and does "
                "not say whether one of them stands for no class; give that one's number if you "
                "know it, or --condition label"
            )
        return ConditionSpec(kind="null")
    if not re.fullmatch(r"[0-9]{1,9}", str(asked)) or int(str(asked)) >= classes:
        raise ConfigError(
            f"--condition {asked}: expected label, null or a class number from 0 to {classes - 1}"
        )
    return ConditionSpec(kind="class", number=int(str(asked)))


def require_labels(
    keys: Iterable[str], labels: Iterable[int | None] | None, num_classes: int
) -> None:
    """Raise ImagesError naming the first image whose label is none of the teacher's classes."""
    if labels is None:
        raise ImagesError(
            "--condition label: the images have no labels; give a folder with one sub-folder a "
            "class, or a Parquet file with a label column, or another --condition"
        )
    for key, label in zip(keys, labels, strict=True):
        if label is None or not 0 <= label < num_classes:
            raise ImagesError(
                f"--condition label: image {key} has the label {label}, but the teacher knows "
                f"classes 0 to {num_classes - 1}; give the images of its classes, or another "
                "--condition"
            )
