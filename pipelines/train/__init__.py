"""Stage 2: a student is trained on the features of a teacher."""
