"""Measures what rounding changes, and how sure that is."""
