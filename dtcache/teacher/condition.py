"""The condition of a teacher: its image's class, a fixed class, the null class, or a prompt."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dtcache.errors import ConfigError, ImagesError
from dtcache.recipe import ConditionSpec
from dtcache.teacher.denoiser import Denoiser
from dtcache.teacher.prompt import Prompt


def choose_condition(
    denoiser: Denoiser, prompt: Prompt | None, requested: str | None
) -> ConditionSpec | None:
    """Return the condition that `requested` (label, null or a class number) names, or the default.

    The default is null if the teacher was trained with a null class. Raises ConfigError if the
    teacher does not support the condition, or if there is no default.
    """
    classes = denoiser.num_classes
    if prompt is not None:
        if requested is not None:
            raise ConfigError(
                f"`condition` {requested}: this teacher is conditioned on text; pass `prompt` "
                "instead"
            )
        return ConditionSpec(kind="prompt", prompt=prompt.text, embedding_sha256=prompt.sha256)
    if classes is None:
        if requested is not None:
            raise ConfigError(
                f"`condition` {requested}: this teacher is not class-conditional; leave "
                "`condition` out"
            )
        return None
    if requested is None and denoiser.null_class is None:
        raise ConfigError(
            f"this teacher is conditioned on one of {classes} classes; pass `condition='label'` "
            f"(the class of each image) or the number of a class, 0 to {classes - 1}"
        )
    if requested == "label":
        return ConditionSpec(kind="label")
    if requested in (None, "null"):
        if denoiser.null_class is None:
            raise ConfigError(
                f"`condition='null'`: this teacher's configuration has {classes} classes and does "
                "not say whether one of them is a null class; pass the number of the null class "
                "if you know it, or `condition='label'`"
            )
        return ConditionSpec(kind="null")
    if not re.fullmatch(r"[0-9]{1,9}", str(requested)) or int(str(requested)) >= classes:
        raise ConfigError(
            f"`condition` {requested}: expected label, null or a class number from 0 to "
            f"{classes - 1}"
        )
    return ConditionSpec(kind="class", number=int(str(requested)))


def require_labels(
    keys: Iterable[str], labels: Iterable[int | None] | None, num_classes: int
) -> None:
    """Check that every image has a label of the teacher's classes.

    Raises ConfigError without any labels, and ImagesError naming the first image with another one.
    """
    if labels is None:
        raise ConfigError(
            "`condition='label'`: the images have no labels; pass a folder with one sub-folder "
            "per class, a Parquet file with a label column, or a different `condition`"
        )
    for key, label in zip(keys, labels, strict=True):
        if label is None or not 0 <= label < num_classes:
            raise ImagesError(
                f"`condition='label'`: image {key}: expected a label from 0 to {num_classes - 1}, "
                f"the teacher's classes, got {label}; pass images of these classes, or a different "
                "`condition`"
            )


def class_names(configs: Iterable[Mapping[str, Any]]) -> dict[int, tuple[str, ...]]:
    """Return the names of a teacher's classes by number, from the first `id2label` of `configs`.

    As in diffusers' DiTPipeline, an entry has one or several names, separated by commas. Empty if
    there is no such record.
    """
    for config in configs:
        recorded = config.get("id2label")
        if isinstance(recorded, dict) and recorded:
            return {
                int(number): tuple(name.strip() for name in names.split(","))
                for number, names in recorded.items()
                if re.fullmatch(r"[0-9]{1,9}", number) and isinstance(names, str)
            }
    return {}
