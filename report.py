#!/usr/bin/env python3
"""A page about a run, a sweep or a folder of runs, with its figures and tables as files."""

import sys

from structured_tickets.programs.report import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
