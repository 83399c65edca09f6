"""An OpenAI-compatible server of documents of any length (extra `serve`)."""
