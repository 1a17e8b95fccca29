"""A library wandb that tests watch."""

from __future__ import annotations

import sys
import types


def fake_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.Settings = lambda **kwargs: kwargs
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


class FakeRun:
    def __init__(self):
        self.rows, self.metrics, self.finished = [], [], False

    def define_metric(self, name, **kwargs):
        self.metrics.append((name, kwargs))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True
