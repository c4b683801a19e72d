"""The cache on disk: layout, manifest, writer and reader. Imports no torch."""
