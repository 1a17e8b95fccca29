"""The training step, its optimizer and RSST's penalty."""
