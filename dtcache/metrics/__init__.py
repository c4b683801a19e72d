"""Accuracy of features and of segmentations."""
