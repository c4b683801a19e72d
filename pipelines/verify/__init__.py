"""Check every byte of a cache, and repair it."""
