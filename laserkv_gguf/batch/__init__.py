"""A file of questions, answered one after the other or together."""
