"""Foundations that know nothing of pruning: errors, console, files, processes, machine."""
