"""The documents' import path of RSST's penalty: see `structured_tickets.training.penalty`."""
