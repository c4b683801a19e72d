"""The parts that all commands share: click classes, flags, hints, progress and text."""
