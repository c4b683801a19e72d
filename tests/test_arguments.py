"""Checks of arguments from Python."""

import pytest

from dtcache.arguments import is_address, path_of
from dtcache.errors import ConfigError


def test_addresses_are_told_from_paths() -> None:
    """Only a text with a scheme is an address."""
    assert is_address("s3://bucket/x")
    assert is_address("ftp://x")
    assert not is_address("C:/x")
    assert not is_address("some/s3://x")
    assert not is_address(None)


def test_an_address_is_no_path() -> None:
    """An address is never read as the local path that Path would make of it."""
    with pytest.raises(ConfigError, match=r"^`out` s3://b/c: expected a path on this machine, got"):
        path_of("out", "s3://b/c")
