"""Stage 1: compute a sealed cache from images and a teacher."""
