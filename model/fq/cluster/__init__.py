"""A sweep on the workers of a cluster: what they run, and who gives it to them."""
