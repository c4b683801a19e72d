"""`dtcache sweep`: many students from one file, trained, evaluated and compared."""
