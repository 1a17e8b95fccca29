"""Memory of a CUDA device that this process may still take."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had: of those that nobody has, and of this process's share of the device.

    Memory that the allocator keeps for later is free.
    """
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - allocated
    share_of = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.7 or newer
    share = share_of(device) if share_of else 1.0
    return int(min(free + kept, share * total - allocated))


def take_only(share: float) -> None:
    """Let this process have no more than a share of the memory of each CUDA device that it sees, in (0, 1].

    What CUDA itself needs for a process comes on top of it.
    """
    for k in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(share, k)
