"""Sources: which kind a path holds, and the order in which its images are taken."""

from pathlib import Path

import pytest

from dtcache.errors import ImagesNotFoundError
from dtcache.images import open_source, permuted


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    """A path that is not there is named."""
    with pytest.raises(ImagesNotFoundError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_permuted_is_a_permutation_of_its_seed() -> None:
    """The order depends on count, seed and stream, and on nothing else."""
    first = permuted(100, seed=1, stream="rows")
    assert sorted(first) == list(range(100))
    assert (first == permuted(100, seed=1, stream="rows")).all()
    assert (first != permuted(100, seed=2, stream="rows")).any()
    assert (first != permuted(100, seed=1, stream="other")).any()


def test_permuted_is_the_order_of_every_cache_and_run_so_far() -> None:
    """The order is that of the NumPy that format 1 came with.

    NumPy keeps the bits of Philox for ever, but does not promise what `Generator.permutation` makes of them. Where this
    fails, a NumPy has changed it: caches begun before refuse to be resumed (their sample list is in another order), a
    resumed training run would serve some samples twice and others never in its epoch, and committed results are no
    longer those of their command. Do not write new numbers here: spell the old shuffle out in `permuted`.
    """
    assert permuted(12, seed=1, stream="rows").tolist() == [10, 3, 0, 11, 7, 4, 2, 9, 5, 8, 6, 1]
    assert permuted(12, seed=0, stream="epoch-0").tolist() == [1, 8, 6, 4, 5, 3, 7, 9, 2, 10, 11, 0]


@pytest.mark.shared
def test_real_parquet_and_folder_agree(shared_data: Path) -> None:
    """CIFAR-10 opens in both layouts, with ten classes."""
    parquet = open_source(shared_data / "cifar10-test.parquet")
    folder = open_source(shared_data / "cifar10-folder" / "test")
    assert (len(parquet.keys), len(set(parquet.labels or []))) == (10_000, 10)
    assert (len(folder.keys), len(folder.classes or [])) == (500, 10)
