"""Networks without their pruned units, and what they cost."""
