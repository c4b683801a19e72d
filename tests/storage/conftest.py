"""A folder of an object store on this machine."""

import pytest
from support.s3 import environment, new_bucket

from dtcache.storage.object_store import ObjectStore


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A folder of an empty bucket."""
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    return ObjectStore(f"s3://{new_bucket(s3)}/some/folder")
