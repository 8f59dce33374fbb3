"""Architectures: hyper-parameters and the graph, before any data exists."""
