"""Files that are whole on disk, or not there."""
