"""An open cache: samples, batches, dask arrays and label sets."""
