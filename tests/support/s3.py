"""An S3 server on this machine (moto), and buckets in it."""

import http.client
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from dtcache.storage.object_store import ObjectStore

_numbers = itertools.count()


@contextmanager
def s3_server() -> Iterator[str]:
    """Run a server; yield its address, such as http://127.0.0.1:4711."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(server: str) -> str:
    """Create an empty bucket and return its name."""
    name = f"bucket-{next(_numbers)}"
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=20)
    connection.request("PUT", f"/{name}")
    response = connection.getresponse()
    response.read()
    connection.close()
    assert response.status == 200
    return name


class Bucket(ObjectStore):
    """A folder of an object store that tests write."""

    def put(self, name: str, content: bytes) -> None:
        """Write an object, in place of one of the same name."""
        self._obstore.put(self._store, name, content)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""
        self._obstore.delete(self._store, list(names))


def upload(folder: Path, store: Bucket) -> None:
    """Write every file of a folder as an object."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())


def environment(server: str) -> dict[str, str]:
    """Return the environment variables by which a client finds the server."""
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
