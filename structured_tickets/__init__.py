"""Structured lottery tickets: find, in a network, the smaller one that trains as well."""

__version__ = "0.2.0"
