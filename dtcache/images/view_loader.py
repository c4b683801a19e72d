"""Loading the views of many images, decoded ahead in threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from dtcache.errors import BadImageError
from dtcache.images.decode import decode_fully
from dtcache.images.source import ImageSource
from dtcache.recipe import ViewSpec

LOOKAHEAD = 256
"""Views that may be decoded ahead, which bounds memory if the consumer is slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedView:
    """One image in the view's geometry, or the reason why it failed."""

    index: int
    """Index in the source."""
    pixels_CHW: NDArray[np.uint8] | None
    """uint8 RGB; None if the image failed."""
    source: bytes
    """The encoded bytes from the source."""
    unchanged: bool
    """Whether `source` decodes to exactly `pixels_CHW`, so that a cache can store it unchanged."""
    failure: str | None
    """Why the image cannot be used; None if it can."""
    emptiness: str | None = None
    """Why an image that decodes shows nothing, such as `all white`, or None."""


def load_views(
    source: ImageSource, indices: Iterable[int], view: ViewSpec, *, threads: int
) -> Generator[LoadedView, None, None]:
    """Load views in the order of `indices`, decoding ahead in threads (Pillow releases the GIL)."""

    def load(index: int, fetch: Callable[[], bytes]) -> LoadedView:
        try:
            data = fetch()
            decoded = decode_fully(data, view, stored=False)
        except (OSError, BadImageError) as error:
            reason = (
                str(error)
                if isinstance(error, BadImageError)
                else f"unreadable: {error.strerror or error}"
            )
            return LoadedView(
                index=index, pixels_CHW=None, source=b"", unchanged=False, failure=reason
            )
        return LoadedView(
            index=index,
            pixels_CHW=decoded.pixels_CHW,
            source=data,
            unchanged=decoded.unchanged,
            failure=None,
            emptiness=decoded.emptiness,
        )

    todo = source.fetches(indices)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[LoadedView]] = deque(
            pool.submit(load, *one) for one in islice(todo, LOOKAHEAD)
        )
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(load, *one) for one in islice(todo, 1))
        finally:
            for future in waiting:
                future.cancel()
