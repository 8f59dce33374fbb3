"""GGUF files: read, found, fetched, written."""
