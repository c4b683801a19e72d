"""Object stores, and local copies of the caches in them; obstore is imported here alone."""
