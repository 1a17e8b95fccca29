"""Decides which weights and units are kept. Applies nothing."""
