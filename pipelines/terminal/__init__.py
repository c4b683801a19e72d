"""What every command shares with a terminal: flags, progress and text."""
