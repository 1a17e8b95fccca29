#!/usr/bin/env python3
"""Many runs: a grid, a file of settings, or a search; on this machine, Ray or Slurm."""

import sys

from structured_tickets.programs.sweep import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
