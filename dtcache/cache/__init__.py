"""A cache opened for reading: samples, batches, dask arrays and label sets."""
