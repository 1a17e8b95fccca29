"""What is done for speed changes no result."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from models import MODELS, build_model
from models.vit import frugal
from training import computing


def logits_and_gradients(model, images, labels):
    model.zero_grad()
    logits = model(images)
    cross_entropy(logits, labels).backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small"])
def test_the_class_token_alone_gives_the_logits_and_gradients_of_all_tokens(arch, images_and_labels):
    images, labels = images_and_labels
    model = build_model(arch, 10, 32).double()
    whole = logits_and_gradients(model, images.double(), labels)
    with frugal(model):
        lean = logits_and_gradients(model, images.double(), labels)
    for ours, theirs in zip(lean, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", MODELS)
def test_training_is_frugal_and_leaves_the_model_whole(arch, images_and_labels):
    model = build_model(arch, 10, 32)
    seen = {}
    last = [m for n, m in model.named_modules() if n.endswith("mlp.fc1")][-1:]
    for module in last:
        module.register_forward_hook(lambda m, inputs, output: seen.update(tokens=output.shape[1]))
    with computing(model):
        model(images_and_labels[0])
    assert seen.get("tokens", 1) == 1
    model(images_and_labels[0])
    assert seen.get("tokens", 65) == 65
