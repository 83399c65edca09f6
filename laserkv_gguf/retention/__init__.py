"""What was kept of a document, and why: as data, and as a page to look at."""
