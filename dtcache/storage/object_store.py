"""One folder of an object store: S3, Google Cloud Storage, Azure, or a server that speaks S3.

Credentials, region and endpoint come from the environment, as for the store's own tools
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME,
...). See https://developmentseed.org/obstore/latest/authentication/.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

from dtcache.errors import ConfigError, StorageError, StorageNotFoundError

SCHEMES = ("s3", "gs", "az")
"""Schemes of the addresses that are taken wherever a cache's path is."""
RETRIES = 6
"""A request that fails with a server error or at the network is repeated this many times."""
RETRY_SECONDS = 120
"""No request is repeated after this time."""
MAX_OBJECTS = 10_000_000
"""Most objects of one folder that are listed."""
PART_BYTES = 1 << 20
"""Bytes of an object that are taken from the network at a time."""
_REASON = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")


class ObjectStore:
    """The objects below one address. Safe to share between threads; picklable."""

    def __init__(self, address: str) -> None:
        """Open `address`, such as s3://bucket/folder. No request is sent.

        Raises ConfigError for an address of another form or if obstore is not installed.
        """
        scheme, _, rest = address.partition("://")
        bucket = rest.partition("/")[0]
        if scheme not in SCHEMES or not bucket or re.search(r"[?#\x00-\x20]", rest):
            raise ConfigError(
                f"{address}: expected an address such as s3://bucket/folder, gs://bucket/folder or "
                "az://container/folder"
            )
        self.address = address.rstrip("/")
        self._obstore = _imported("obstore")
        options: dict[str, Any] = {
            "retry_config": {
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_SECONDS),
            }
        }
        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            # The user named this endpoint; obstore would refuse it with "builder error".
            options["client_options"] = {"allow_http": True}
        try:
            self._store = _imported("obstore.store").from_url(self.address, **options)
        except self._obstore.exceptions.BaseError as error:
            raise ConfigError(f"{address}: {_first_line(error)}") from error

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str]]:
        """Pickle as the address: the other process takes credentials from its own environment."""
        return ObjectStore, (self.address,)

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of an object.

        Raises StorageNotFoundError, and StorageError if it has more than `limit` bytes, before
        memory is taken for them, or if the store fails.
        """
        with self._errors(name):
            got = self._obstore.get(self._store, name)
            size = int(got.meta["size"])
            if size > limit:
                raise StorageError(
                    f"{self.address}/{name}: expected at most {limit} bytes, got {size}"
                )
            content = bytes(got.bytes().to_bytes())
        if len(content) != size:
            raise StorageError(
                f"{self.address}/{name}: expected {size} bytes, got {len(content)}; try again"
            )
        return content

    def stream(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of an object in parts of at least 1 MiB (the last may be smaller).

        Raises StorageNotFoundError, and StorageError if the store fails; the parts may then be
        fewer than the object has.
        """
        with self._errors(name):
            for part in self._obstore.get(self._store, name).stream(min_chunk_size=PART_BYTES):
                yield bytes(part)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes of every object whose name begins with the folder `prefix`.

        Raises StorageError if the store fails, or for more than MAX_OBJECTS objects.
        """
        sizes: dict[str, int] = {}
        with self._errors(prefix):
            for page in self._obstore.list(self._store, prefix=prefix or None):
                sizes |= {str(entry["path"]): int(entry["size"]) for entry in page}
                if len(sizes) > MAX_OBJECTS:
                    raise StorageError(
                        f"{self.address}/{prefix}: expected at most {MAX_OBJECTS} objects, got "
                        "more; pass the address of a cache"
                    )
        return sizes

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn the errors of obstore into one line that names the object and a fix."""
        exceptions = self._obstore.exceptions
        place = f"{self.address}/{name}".rstrip("/")
        try:
            yield
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise StorageError(f"{place}: the bucket does not exist") from error
            raise StorageNotFoundError(f"{place}: no such object") from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StorageError(
                f"{place}: the store refuses these credentials{_code_in_brackets(error)}; check "
                "them and their permissions"
            ) from error
        except (exceptions.BaseError, OSError) as error:
            code = _code(error)
            if code == "NoSuchBucket":
                raise StorageError(f"{place}: the bucket does not exist") from error
            if code == "RequestTimeTooSkewed":
                raise StorageError(
                    f"{place}: the store refuses the request's time; set this machine's clock"
                ) from error
            raise StorageError(f"{place}: {_first_line(error)}") from error


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "caches in object stores need obstore; run: pip install 'dtcache[cloud]'"
        ) from error


def _code(error: Exception) -> str | None:
    """Return the code of the store's answer, such as NoSuchBucket, if it has one."""
    match = _REASON.search(str(error))
    return match[1] if match else None


def _code_in_brackets(error: Exception) -> str:
    code = _code(error)
    return f" ({code})" if code else ""


def _first_line(error: Exception) -> str:
    """Return the text of an error without obstore's debug lines."""
    return " ".join(str(error).partition("Debug source")[0].split())[:300]
