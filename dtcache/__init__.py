"""dtcache: cache a diffusion teacher's features once, train any number of students from them."""

from dtcache._version import __version__

__all__ = ["__version__"]
