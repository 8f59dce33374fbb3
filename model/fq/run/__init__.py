"""Runs a graph: weights, contexts, generation, traces."""
