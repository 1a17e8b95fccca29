"""Flags: what they are, which go together, and what they say."""
