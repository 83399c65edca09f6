"""Documents and conversations in files."""
