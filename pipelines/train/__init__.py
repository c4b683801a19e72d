"""Stage 2: train a student on the features of a teacher."""
