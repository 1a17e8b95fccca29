"""Units: the channels, heads, neurons and blocks of a network, and what belongs to each."""
