"""Batches of cached features for a GPU, tested without a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from store.builders import tiny_plan, write_cache
from torch import Tensor, nn

from dtcache.cache.cache import Cache
from dtcache.cache.loader import Batching, EpochLoader
from dtcache.device import Compute
from dtcache.distributed import Processes
from dtcache.options import TrainOptions
from dtcache.store.reader import CacheReader
from pipelines.train.cached_batches import CachedSource


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_batches_for_a_gpu_are_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: str
) -> None:
    """Every tensor of a GPU batch is pinned under either shuffle, in unchanged order.

    The block shuffle announces the served rows through `will_need`.
    """
    root = write_cache(tmp_path / "cache", tiny_plan())
    pinned: list[Tensor] = []
    told: list[int] = []

    def pin(values: Tensor) -> Tensor:
        there = values.clone()
        pinned.append(there)
        return there

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    monkeypatch.setattr(CacheReader, "will_need", lambda self, name, rows: told.extend(rows))
    options = TrainOptions(student="resnet10t", batch_size=2, shuffle=shuffle)
    source = CachedSource(
        [root], options, Compute(device=torch.device("cuda"), precision="fp32"), Processes()
    )
    batches = list(source._loader.epoch(1))
    tensors = [
        x for b in batches for x in (b.images_BCHW, *b.coefficients.values(), *b.scalars.values())
    ]
    assert tensors and {id(x) for x in tensors} <= {id(x) for x in pinned}
    served = np.concatenate([batch.rows for batch in batches]).tolist()
    assert set(served) <= set(told) if shuffle == "block" else not told
    plain = EpochLoader(
        Cache(root),
        source._loader._rows,
        source.names,
        Batching(batch_size=2, seed=options.seed, threads=1, shuffle=shuffle),
    )
    assert served == plain.order(1).between(0, len(served))[0].tolist()
