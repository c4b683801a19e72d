"""Self-contained HTML pages of a cache and of a student's run: no script, no request, every picture inside."""
