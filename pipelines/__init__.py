"""The stages: each module is one command's work, readable top to bottom."""
