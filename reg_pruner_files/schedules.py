"""The documents' import path of lambda's schedules: see `structured_tickets.training.penalty.schedules`."""

from structured_tickets.training.penalty.schedules import SCHEDULES, Clock, Schedule, clock_from

__all__ = ["SCHEDULES", "Clock", "Schedule", "clock_from"]
