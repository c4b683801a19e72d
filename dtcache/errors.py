"""Every failure that a user can meet.

A message names the problem, what was expected, what was found and how to fix it.
"""

AGAIN = "run dtcache verify on the cache: it lists the damage and how to repair it"
"""The fix that every message about a damaged cache ends with."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an exception's text on one line of at most `limit` characters, or its type's name."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class DtcacheError(Exception):
    """Root of all failures that dtcache raises on purpose; the command line prints one line."""


class ConfigError(DtcacheError, ValueError):
    """An option, or a combination of options, that cannot work."""


class ImagesError(DtcacheError, ValueError):
    """An image source that cannot be used: empty, with ambiguous keys or with wrong columns."""


class ImagesNotFoundError(ImagesError, FileNotFoundError):
    """A path that does not exist or holds no images."""


class BadImageError(DtcacheError, ValueError):
    """One image that cannot be decoded. It is recorded with its sample and does not end the run."""


class TeacherError(DtcacheError, ValueError):
    """A teacher that cannot be used safely or faithfully."""


class TeacherNotFoundError(TeacherError, FileNotFoundError):
    """A path or a name of the hub that holds no teacher."""


class WeightsError(DtcacheError, ValueError):
    """Weights of a backbone, head or interpreter, or their configuration, that cannot be read."""


class CodecError(DtcacheError, ValueError):
    """A codec that cannot be fitted, or a payload that does not decode."""


class PayloadError(CodecError):
    """One payload of a batch that does not decode."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index
        """The payload's index in the batch."""


class CacheError(DtcacheError):
    """Anything wrong with a feature cache."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """A path that does not exist or holds no cache."""


class CacheFormatError(CacheError, NotImplementedError):
    """A cache in a format that this version of dtcache does not read."""


class CacheMismatchError(CacheError, ValueError):
    """A cache that was made with a different recipe than the requested one."""


class CacheDamagedError(CacheError, OSError):
    """Bytes of a cache that are missing, or differ from the bytes that were written."""


class CacheIncompleteError(CacheError, ValueError):
    """A cache whose extraction has not written every shard yet."""


class UnknownSampleError(CacheError, LookupError):
    """A sample that a cache does not have, or that has no features."""


class UnknownIndexError(UnknownSampleError, IndexError):
    """An index outside the usable samples of a cache."""


class UnknownLabelsError(CacheError, LookupError):
    """A label set that a cache does not have."""


class CacheBusyError(CacheError, OSError):
    """A cache, run or teacher that another process is writing."""


class DiskError(DtcacheError, OSError):
    """The disk refused a write: it is full, read-only or failing."""


class StorageError(DtcacheError, OSError):
    """An object store that refuses a request, fails or cannot be reached."""


class StorageNotFoundError(StorageError, FileNotFoundError):
    """An object that an object store does not have."""


class NoLocksWarning(UserWarning):
    """A folder that is written without a lock, because its file system has none."""


class DeviceMemoryError(DtcacheError, MemoryError):
    """A batch that does not fit into the memory of its device."""


class ExtractionError(DtcacheError, RuntimeError):
    """An extraction that must stop, for example because too many of its images fail."""


class ClusterError(DtcacheError, RuntimeError):
    """A cluster that cannot compute: it is unreachable, or its workers cannot do a task."""


class TrainingError(DtcacheError, RuntimeError):
    """A training run that must stop, for example because its loss is not finite."""


class ExportError(DtcacheError, RuntimeError):
    """An exported network whose outputs differ from the original's."""
