"""What every run folder holds: options, checkpoint, metrics and plots."""
