"""The Python interface for people's own training loops; its names are those of `structured_tickets` itself."""
