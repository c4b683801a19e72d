"""Every failure that a user can meet. A message says what, where, expected, got and what to do next."""

AGAIN = "run dtcache verify on the cache: it says what is damaged and whether --repair can mend it"
"""What to do about a damaged cache."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an exception's text on one line, at most `limit` characters; its type if it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class DtcacheError(Exception):
    """Root of all failures that dtcache raises on purpose; the command line prints them as one line."""


class ConfigError(DtcacheError, ValueError):
    """An option, or a combination of options, that cannot work."""


class ImagesError(DtcacheError, ValueError):
    """An image source that cannot be used: empty, ambiguous keys, wrong columns."""


class ImagesNotFoundError(ImagesError, FileNotFoundError):
    """A path that holds no images."""


class BadImageError(DtcacheError, ValueError):
    """One image that cannot be decoded; recorded with its sample, never fatal to a run."""


class TeacherError(DtcacheError, ValueError):
    """A teacher that cannot be used safely or faithfully."""


class TeacherNotFoundError(TeacherError, FileNotFoundError):
    """A teacher directory, or a part of it, that is not there."""


class CodecError(DtcacheError, ValueError):
    """A codec that cannot be fitted, or a payload that does not decode."""


class PayloadError(CodecError):
    """A payload of a batch that does not decode."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place
        """Which one of the batch."""


class CacheError(DtcacheError):
    """Anything wrong with a feature cache."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """A path that holds no cache."""


class CacheFormatError(CacheError, NotImplementedError):
    """A cache of a format that this dtcache does not read."""


class CacheMismatchError(CacheError, ValueError):
    """A cache made by another recipe than the one asked for."""


class CacheDamagedError(CacheError, OSError):
    """Bytes in a cache that are missing or are not the ones written."""


class CacheIncompleteError(CacheError, ValueError):
    """A cache that still lacks shards."""


class UnknownSampleError(CacheError, LookupError):
    """A sample that a cache does not have, or has no features of."""


class UnknownLabelsError(CacheError, LookupError):
    """A label set that a cache does not have."""


class CacheBusyError(CacheError, OSError):
    """A cache, run or teacher that another process is writing."""


class DiskError(DtcacheError, OSError):
    """The disk refused a write (full, read-only, failing)."""


class DeviceMemoryError(DtcacheError, MemoryError):
    """A batch does not fit into the memory of its device."""


class ExtractionError(DtcacheError, RuntimeError):
    """An extraction that should not go on, such as one of which too many images fail."""


class ClusterError(DtcacheError, RuntimeError):
    """A cluster that cannot do the work: out of reach, or with workers that fail or are not fit for it."""


class TrainingError(DtcacheError, RuntimeError):
    """A training run that cannot go on, such as a loss that is not finite."""


class ExportError(DtcacheError, RuntimeError):
    """An exported network that is not the original."""
