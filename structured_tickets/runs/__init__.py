"""A run: its folder, its state, and the loop that carries it out."""
