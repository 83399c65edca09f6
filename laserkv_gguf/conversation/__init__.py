"""Documents and turns over the cells of a context."""
