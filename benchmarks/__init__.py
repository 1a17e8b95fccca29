"""Measurements; run them from the project's folder, such as `python -m benchmarks.step`."""
