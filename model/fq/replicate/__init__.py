"""The original report's experiments, its figures beside ours."""
