"""Self-contained HTML pages of caches and runs: no scripts, no requests, pictures inline."""
