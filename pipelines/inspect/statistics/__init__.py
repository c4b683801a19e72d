"""Statistics of a cache's features, out of core: sums over groups of samples, and what follows from them."""

from pipelines.inspect.statistics.compute import cache_statistics

__all__ = ["cache_statistics"]
