#!/usr/bin/env python3
"""Write the ticket of a run at its real size: model.safetensors and config.json, ONNX, torch.export."""

import sys

from structured_tickets.programs.export import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
