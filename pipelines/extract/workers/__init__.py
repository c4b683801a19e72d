"""Extraction on Dask workers: a cluster, the coordinator that hands out shards, and the worker that computes them."""
