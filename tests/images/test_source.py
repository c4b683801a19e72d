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


@pytest.mark.shared
def test_real_parquet_and_folder_agree(shared_data: Path) -> None:
    """CIFAR-10 opens in both layouts, with ten classes."""
    parquet = open_source(shared_data / "cifar10-test.parquet")
    folder = open_source(shared_data / "cifar10-folder" / "test")
    assert (len(parquet.keys), len(set(parquet.labels or []))) == (10_000, 10)
    assert (len(folder.keys), len(folder.classes or [])) == (500, 10)
