"""`dtcache evaluate`: how good a model's features are for a task."""

from collections.abc import Callable, Mapping
from typing import Protocol

from rich.table import Table

from dtcache.options import EvaluateOptions
from dtcache.recipe import Json
from pipelines.evaluate.classification import classify
from pipelines.evaluate.detection import detect
from pipelines.evaluate.segmentation import segment


class Evaluation(Protocol):
    """Result of one task."""

    def to_json(self) -> Json:
        """Return the result as JSON values; the scores of the task's spec are among them."""

    def to_table(self, model: str) -> Table:
        """Return the result as a table."""


RUN: Mapping[str, Callable[[str, EvaluateOptions], Evaluation]] = {
    "classification": classify,
    "segmentation": segment,
    "detection": detect,
}
"""By task of `dtcache.options.evaluate.TASKS`: prepares its data and model, trains and scores."""


def evaluate(model: str, options: EvaluateOptions) -> Evaluation:
    """Evaluate a backbone folder, a timm name, a cache or `pixels` on a task.

    `options.task` chooses the task. Raises ConfigError for options of another task, and what the
    task raises.
    """
    return RUN[options.task](model, options)
