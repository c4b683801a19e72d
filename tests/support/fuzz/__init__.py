"""Fuzz tests: hostile caches, runs, interpreters and teachers, each opened in its own process."""
