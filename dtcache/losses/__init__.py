"""The losses that a student minimises, and the objective that combines them."""
