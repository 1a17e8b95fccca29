"""The network of its own that document 004 writes, as a user would put it into `models/`."""

from __future__ import annotations

CUSTOM_MODEL = """
import torch.nn as nn

class MyCustomModel(nn.Module):
    def __init__(self, num_classes=100):
        super(MyCustomModel, self).__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))
"""
