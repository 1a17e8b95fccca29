"""Features of a network: which numbers of which tensors belong together, found by following them as it runs."""
