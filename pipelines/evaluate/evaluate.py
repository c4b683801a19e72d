"""`dtcache evaluate`: the accuracy of a model's features, by classification or segmentation."""

from typing import Protocol

from rich.table import Table

from dtcache.options import EvaluateOptions
from dtcache.recipe import Json
from pipelines.evaluate.classification import classify
from pipelines.evaluate.segmentation import segment


class Evaluation(Protocol):
    """Result of one task."""

    def to_json(self) -> Json:
        """Return the result as JSON values."""

    def to_table(self, model: str) -> Table:
        """Return the result as a table."""


def evaluate(model: str, options: EvaluateOptions) -> Evaluation:
    """Evaluate a backbone folder, a timm name, a cache or `pixels` on a task.

    `options.task` chooses the task. Raises ConfigError for options of another task, and what
    `classify` and `segment` raise.
    """
    return segment(model, options) if options.task == "segmentation" else classify(model, options)
