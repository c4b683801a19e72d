"""Begun caches: folders that are one, and inputs that differ from those of the cache."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from store.builders import ROWS, begin, tiny_plan

from dtcache.errors import CacheMismatchError, ConfigError
from dtcache.samples import SampleList
from pipelines.extract.begun_cache import (
    BegunCache,
    find_begun_cache,
    require_same_classes,
    require_same_recipe,
)

PLAN = tiny_plan()
KEYS = [sample.key for sample in PLAN.samples]
LABELS = [sample.label for sample in PLAN.samples]


@pytest.fixture
def begun(tmp_path: Path, no_fsync: None) -> BegunCache:
    """A cache of ten rows without a shard."""
    begin(tmp_path / "cache", PLAN)
    found = find_begun_cache(tmp_path / "cache")
    assert found is not None
    return found


def test_a_begun_cache_has_its_own_recipe(begun: BegunCache) -> None:
    """A cache without a shard is found, and the recipe that it was begun with is accepted."""
    assert begun.manifest.recipe["num_samples"] == ROWS
    samples = SampleList(KEYS, LABELS, np.arange(ROWS))
    require_same_recipe(begun, PLAN.recipe.to_json(), samples)


def test_folders_without_a_cache(tmp_path: Path) -> None:
    """A missing or empty folder has no cache; a file and other files are refused."""
    assert find_begun_cache(tmp_path / "missing") is None
    assert find_begun_cache(tmp_path) is None
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CacheMismatchError, match=r"is not empty and not a cache: found thesis.tex"):
        find_begun_cache(tmp_path)
    with pytest.raises(ConfigError, match=r"thesis.tex: expected a folder, got a file; pass"):
        find_begun_cache(tmp_path / "thesis.tex")


def test_an_option_is_named_before_the_images(begun: BegunCache) -> None:
    """If a field and the images differ, the field is named, as it may be the cause."""
    samples = SampleList(KEYS, LABELS, np.arange(8))
    fixed = {**PLAN.recipe.to_json(), "num_samples": 8}
    with pytest.raises(CacheMismatchError, match=r"seed is 3 in the cache, 7 in this run"):
        require_same_recipe(begun, {**fixed, "seed": 7}, samples)
    with pytest.raises(
        CacheMismatchError, match=r"of other images: the cache has 10 of the images, 8 are selected"
    ):
        require_same_recipe(begun, fixed, samples)


def test_other_class_names_are_refused(begun: BegunCache) -> None:
    """Images with other class names are refused; images without names are accepted."""
    require_same_classes(begun, SimpleNamespace(classes=["red", "green", "blue"]))
    require_same_classes(begun, SimpleNamespace(classes=None))
    with pytest.raises(
        CacheMismatchError, match=r"other classes, the first list, .*only the first has blue"
    ):
        require_same_classes(begun, SimpleNamespace(classes=["red", "green", "pink"]))
