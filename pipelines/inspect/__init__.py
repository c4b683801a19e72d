"""Describe a cache or a run: as JSON values, as tables and as a page."""
