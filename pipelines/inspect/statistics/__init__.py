"""Statistics of a cache's features, computed out of core from sums over groups of samples."""

from pipelines.inspect.statistics.compute import cache_statistics

__all__ = ["cache_statistics"]
