"""A folder of an object store on this machine."""

import pytest
from support.s3 import Bucket, environment, new_bucket


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A folder of an empty bucket."""
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    return Bucket(f"s3://{new_bucket(s3)}/some/folder")
