"""A kept sweep as one HTML page: its words, its charts, its tables."""
