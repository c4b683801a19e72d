"""Extraction on Dask workers: cluster, coordinator, and the worker that computes shards."""
