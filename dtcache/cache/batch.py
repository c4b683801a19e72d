"""Batches of cached samples, as a loader yields them: entropy-decoded, not yet dequantised.

Shape suffixes: B batch, C channels, H rows, W columns, N coefficients.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtcache.codec import FeatureDecoder, TapCodec
from dtcache.errors import ConfigError
from dtcache.store.sample_index import SampleIndex
from dtcache.whitening import unwhiten

Rows = NDArray[np.int64]
NO_LABEL = -1
"""The label of an image without a class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelBatch:
    """The soft labels of one batch, entropy-decoded. A LabelDecoder turns them into logits."""

    coefficients_BN: Tensor
    """int16: the coefficients of all views of each row."""
    scalars_B2: Tensor
    """fp32 (sigma, mu): raw = whitened * sigma + mu."""
    views_B: Tensor
    """int64: the view of each row that the batch shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """One batch, entropy-decoded. A FeatureDecoder turns its coefficients into targets."""

    rows: Rows
    """(B,) int64: rows of the cache."""
    images_BCHW: Tensor
    """uint8 RGB, mirrored if the view is."""
    coefficients: dict[str, Tensor]
    """By array: int16 (B, N), or fp16 for float16 features.

    If a teacher runs in the loop: its features by array, fp32 (B, C, H, W).
    """
    scalars: dict[str, Tensor]
    """By array: fp32 (B, 2), (sigma, mu): raw = whitened * sigma + mu."""
    labels: LabelBatch | None = None
    """Soft labels, if they are distilled too."""
    positions: dict[str, Tensor] = field(default_factory=dict)
    """By key of `coefficients`: the M positions in the batch of its rows, int64 (M,).

    Empty if every array has coefficients of all B rows, from one cache.
    """

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TrainBatch":
        """Return the batch with `change` applied to every tensor."""
        return TrainBatch(
            rows=self.rows,
            images_BCHW=change(self.images_BCHW),
            coefficients={name: change(values) for name, values in self.coefficients.items()},
            scalars={name: change(values) for name, values in self.scalars.items()},
            labels=self.labels
            and LabelBatch(
                **{f.name: change(getattr(self.labels, f.name)) for f in fields(self.labels)}
            ),
            positions={name: change(values) for name, values in self.positions.items()},
        )


class BatchContext:
    """The keys and the decoders, one per device, that all batches of a loader share. Thread-safe.

    Copying returns the same object.
    """

    def __init__(self, samples: SampleIndex, fit: Mapping[str, TapCodec], whitened: bool) -> None:
        """Take the sample index, the codecs of the loader's arrays, and the targets' scale."""
        self._samples = samples
        self._fit = dict(fit)
        self._whitened = whitened
        self._lock = threading.Lock()
        self._decoders: dict[torch.device, FeatureDecoder] = {}

    def __reduce__(self) -> tuple[type["BatchContext"], tuple[object, ...]]:
        """Pickle without the decoders."""
        return BatchContext, (self._samples, self._fit, self._whitened)

    def __deepcopy__(self, memo: object) -> "BatchContext":
        """Return the context itself: Lightning copies the batches that it converts."""
        return self

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Return the keys of rows."""
        return self._samples.keys(rows)

    def whitened(self, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whitened features by array, fp32 (B, C, H, W), on the coefficients' device."""
        if not coefficients:
            return {}
        device = next(iter(coefficients.values())).device
        with self._lock:
            if device not in self._decoders:
                self._decoders[device] = FeatureDecoder(self._fit).to(device)
        features: dict[str, Tensor] = self._decoders[device](coefficients)
        return features

    def targets(
        self, coefficients: Mapping[str, Tensor], scalars: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return targets by array in the scale of the loader's argument `whitened`."""
        features = self.whitened(coefficients)
        if self._whitened:
            return features
        return {name: unwhiten(x_BCHW, scalars[name]) for name, x_BCHW in features.items()}


# Not frozen, because Lightning copies a batch and assigns its fields (`apply_to_collection`).
@dataclass(kw_only=True, eq=False, repr=False)
class Batch:
    """B samples of a cache, each in one view, as `cache.loader` yields them.

    The features stay compressed until `targets` is read; they are then decoded on the device that
    the batch lies on. `to` and `pin_memory` are the methods that Lightning, accelerate and torch
    call on a batch.
    """

    images_BCHW: Tensor
    """uint8 RGB in 0..255, (B, 3, H, W), mirrored if the view is."""
    coefficients: dict[str, Tensor]
    """By array: what the cache stores, int16 (B, N), or fp16 for float16 features."""
    scalars: dict[str, Tensor]
    """By array: fp32 (B, 2), (sigma, mu): raw = whitened * sigma + mu."""
    labels: Tensor
    """Class numbers, int64 (B,); -1 for an image without a class."""
    views: Tensor
    """int64 (B,): the view of each sample. Odd views are mirrored if the cache has flips."""
    rows: Tensor
    """int64 (B,): rows of `cache.samples`. Rows are permuted: pair samples by `keys`."""
    context: InitVar[BatchContext]

    def __post_init__(self, context: BatchContext) -> None:
        self._context = context

    def __len__(self) -> int:
        """Return B."""
        return len(self.rows)

    def __repr__(self) -> str:
        """Return one line: number of samples, arrays and device."""
        arrays = ", ".join(self.coefficients)
        return f"Batch of {len(self)} samples on {self.images_BCHW.device}: {arrays}"

    @functools.cached_property
    def keys(self) -> list[str]:
        """The B keys, such as `cats/1.jpg`: paths or names inside the image source."""
        return self._context.keys(self.rows.tolist())

    @functools.cached_property
    def targets(self) -> dict[str, Tensor]:
        """The teacher's features by array, fp32 (B, C, H, W), on the device of the batch.

        They are in the teacher's own scale, or whitened per sample, (raw - mu) / sigma, if the
        loader was made with `whitened=True`.
        """
        return self._context.targets(self.coefficients, self.scalars)

    @property
    def whitened(self) -> dict[str, Tensor]:
        """The features by array, whitened per sample, with either scale of the loader.

        fp32 (B, C, H, W). Each read decodes them.
        """
        return self._context.whitened(self.coefficients)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device. Raises ConfigError if this machine does not have it."""
        there = device_here(device)
        return self.changed(lambda x: x.to(there, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which a GPU copies while it computes."""
        return self.changed(Tensor.pin_memory)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `change` applied to every tensor."""
        return Batch(
            images_BCHW=change(self.images_BCHW),
            coefficients={name: change(values) for name, values in self.coefficients.items()},
            scalars={name: change(values) for name, values in self.scalars.items()},
            labels=change(self.labels),
            views=change(self.views),
            rows=change(self.rows),
            context=self._context,
        )


def device_here(device: torch.device | str | int) -> torch.device:
    """Return a device of this machine. Raises ConfigError if there is no such device."""
    try:
        if device is not None:  # torch takes None for the default device
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError):
        pass
    raise ConfigError(
        f"`device` {device!r}: expected a device of this machine; pass one, such as cpu or cuda"
    )
