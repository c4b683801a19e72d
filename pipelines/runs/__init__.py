"""The contents of a run folder: options, checkpoint, metrics and plots."""
