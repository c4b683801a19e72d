"""A source's kind follows from what its path holds."""

from pathlib import Path

import pytest

from dtcache.errors import ImagesNotFoundError
from dtcache.images import open_source


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    """A missing path is refused by name."""
    with pytest.raises(ImagesNotFoundError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


@pytest.mark.shared
def test_real_parquet_and_folder_agree(shared_data: Path) -> None:
    """CIFAR-10 opens in both layouts, with ten classes."""
    parquet = open_source(shared_data / "cifar10-test.parquet")
    folder = open_source(shared_data / "cifar10-folder" / "test")
    assert (len(parquet.keys), len(set(parquet.labels or []))) == (10_000, 10)
    assert (len(folder.keys), len(folder.classes or [])) == (500, 10)
