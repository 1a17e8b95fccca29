"""RSST's penalty: the schedules of its strength, and the pruner that holds and applies it."""
