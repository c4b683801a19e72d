"""Stage 1: images and a teacher to a sealed cache."""
