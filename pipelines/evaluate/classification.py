"""Classification accuracy: k-NN and a linear probe on pooled features of labelled images.

N images, B images per batch, D values per feature.
"""

from dataclasses import dataclass

from rich.table import Table

from dtcache.atomic_files import write_file
from dtcache.device import resolve_compute
from dtcache.device_memory import memory_errors
from dtcache.metrics.probes import (
    C_GRID,
    TEMPERATURE,
    Neighbours,
    at_edge,
    knn_predict,
    linear_predict,
)
from dtcache.options import EvaluateOptions
from dtcache.process_settings import configure_process
from dtcache.recipe import Json
from pipelines.evaluate.evaluation_folder import RESULT, result_file
from pipelines.evaluate.finetuned_classifier import FinetunedAccuracy, finetune_classifier
from pipelines.evaluate.labelled_images import split_labelled
from pipelines.evaluate.pooled_features import (
    ALL_TAPS,
    BATCH_SIZE,
    open_model,
    open_network,
    pooled_features,
)
from pipelines.terminal.output import say
from pipelines.terminal.progress import track


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """Accuracy of both probes on one set of features."""

    name: str
    """The backbone, `pixels`, a tap's array such as t150/stride8, or `all` for all taps.

    The name of a backbone is that of `EvaluatedBackbone`.
    """
    knn_top1: float
    """Test images that k-NN classifies correctly, per cent."""
    linear_top1: float
    """Test images that the linear probe classifies correctly, per cent."""
    num_train: int
    num_test: int
    feature_dim: int
    linear_c: float
    """Inverse strength of the linear probe's L2 penalty, chosen on training images."""

    def to_json(self) -> Json:
        """Return the result as JSON values."""
        return {
            "name": self.name,
            "knn_top1": self.knn_top1,
            "linear_top1": self.linear_top1,
            "num_train": self.num_train,
            "num_test": self.num_test,
            "feature_dim": self.feature_dim,
            "linear_C": self.linear_c,
            "linear_C_at_edge": at_edge(self.linear_c),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationResult:
    """Accuracy of a model's features."""

    rows: tuple[ProbeResult, ...]
    """One row, or for a cache one per tap and one for all taps together."""
    finetuned: FinetunedAccuracy | None = None
    """Accuracy after finetuning; None if the backbone was not finetuned."""

    @property
    def best(self) -> ProbeResult:
        """The row with the best linear probe; all taps together do not count."""
        return max((r for r in self.rows if r.name != ALL_TAPS), key=lambda r: r.linear_top1)

    def to_json(self) -> Json:
        """Return the fields of the best row, its name as `best`, and all `rows`.

        If the backbone was finetuned, `finetuned_top1` and `finetuned_top5` are among them.
        """
        best = self.best.to_json()
        finetuned = (
            {}
            if self.finetuned is None
            else {"finetuned_top1": self.finetuned.top1, "finetuned_top5": self.finetuned.top5}
        )
        return {
            "best": best.pop("name"),
            **best,
            **finetuned,
            "rows": [row.to_json() for row in self.rows],
        }

    def to_table(self, model: str) -> Table:
        """Return the result as a table; the best of several rows is bold."""
        first = self.rows[0]
        table = Table(title=f"{model}: {first.num_train} training, {first.num_test} test images")
        for heading in ("features", "dims", "k-NN top-1 %", "linear top-1 %", "C"):
            table.add_column(heading, justify="left" if heading == "features" else "right")
        for row in self.rows:
            style = "bold" if len(self.rows) > 1 and row is self.best else ""
            cells = (f"{row.knn_top1:.2f}", f"{row.linear_top1:.2f}", f"{row.linear_c:g}")
            table.add_row(row.name, str(row.feature_dim), *cells, style=style)
        if self.finetuned is not None:
            top5 = self.finetuned.top5
            shown = f"top-1 {self.finetuned.top1:.2f} %" + (
                "" if top5 is None else f", top-5 {top5:.2f} %"
            )
            table.caption = f"finetuned: {shown}"
        return table


def classify(model: str, options: EvaluateOptions) -> ClassificationResult:
    """Probe the pooled features of a backbone folder, a timm name, a cache or `pixels`.

    A timm name without a tag gives random weights. Every row is measured on the same images, which
    are a pure function of keys, options and seed. Warns on stderr if the C of a linear probe is the
    smallest or the largest candidate. With `finetune`, the backbone is then finetuned on the same
    images. Raises ConfigError for an unknown kind of model, ImagesError for images without labels
    or of too few classes, and what opening the model and finetuning raise.
    """
    options.require_task("classification")
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    batch_size = options.batch_size or BATCH_SIZE
    train, test = split_labelled(options)
    evaluated = open_network(model, options) if options.finetune else None
    extractor = open_model(model, options, compute)
    extractor.prepare(train, test)
    with memory_errors(batch_size, "pass a smaller `batch_size`"):
        train_features, train_labels = pooled_features(extractor, train, batch_size)
        test_features, test_labels = pooled_features(extractor, test, batch_size)
    neighbours = Neighbours(
        k=options.k, temperature=TEMPERATURE if options.knn_votes == "weighted" else None
    )
    rows = []
    with track("probe", len(train_features)) as progress:
        for name, train_ND in train_features.items():
            test_MD = test_features[name]
            knn = knn_predict(train_ND, train_labels, test_MD, neighbours, compute.device)
            linear, c = linear_predict(train_ND, train_labels, test_MD)
            rows.append(
                ProbeResult(
                    name=name,
                    knn_top1=100 * int((knn == test_labels).sum()) / len(test_labels),
                    linear_top1=100 * int((linear == test_labels).sum()) / len(test_labels),
                    num_train=len(train_ND),
                    num_test=len(test_MD),
                    feature_dim=train_ND.shape[1],
                    linear_c=c,
                )
            )
            progress.advance(1, name)
    for row in rows:
        if at_edge(row.linear_c):
            say(
                f"{row.name}: the linear probe chose C = {row.linear_c:g}, an edge of its grid of "
                f"{C_GRID[0]:g} to {C_GRID[-1]:g}; a value beyond may be better"
            )
    if evaluated is None:
        return ClassificationResult(rows=tuple(rows))
    finetuned = finetune_classifier(model, options, evaluated, train, test, compute)
    result = ClassificationResult(rows=tuple(rows), finetuned=finetuned)
    if options.out is not None:
        write_file(options.out / RESULT, result_file(result.to_json()))
    return result
