"""What knows nothing of pruning: errors, console, files, processes, machine."""
