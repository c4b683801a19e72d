"""What a cache or a run holds, as tables and as a page."""
