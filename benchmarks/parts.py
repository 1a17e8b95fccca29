"""Where a training step's time goes: each layer, forward and backward, alone on its own input, summed by type."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import harness
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.networks.precision import computing
from structured_tickets.networks.precision import choose_precision
from structured_tickets.runs.setup import choose_device, choose_kernels, prepare_for_speed


IDLE = (Normalize, nn.Identity, nn.Dropout)


def inputs_of_layers(model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What reaches each layer that has no layers inside, and each attention as a whole."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        single = not any(True for _ in module.children()) and not isinstance(module, IDLE)
        if single or hasattr(module, "qkv"):
            hook = lambda m, given, out, name=name: found.update({name: given[0].detach()})  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with computing(model, dtype):
        model(images)
    for handle in handles:
        handle.remove()
    return found


def alone(model: nn.Module, layer: nn.Module, given: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of one layer."""
    with computing(model, dtype), torch.no_grad():
        gradient = torch.ones_like(layer(given))

    def step() -> None:
        with computing(model, dtype):
            out = layer(given.detach().requires_grad_())
        out.backward(gradient)

    return step


def products(layer: nn.Module, given: Tensor) -> int:
    """Multiply-accumulates of a forward pass of a linear layer or convolution; 0 for others."""
    if isinstance(layer, nn.Linear):
        return given.numel() * layer.out_features
    if isinstance(layer, nn.Conv2d):
        with torch.no_grad():
            out = layer(given.to(layer.weight.dtype))
        return out.numel() * layer.weight[0].numel()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["vit_tiny", "res20s"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "auto"), default=["auto"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gpu", type=int, default=0)
    args = parser.parse_args()
    device = choose_device(args.gpu)
    choose_kernels(deterministic=False)
    print(harness.describe_machine(device))
    rows = []
    for arch in args.arch:
        for precision in args.precision:
            rows += parts(arch, choose_precision(precision, device), args.batch_size, args.rounds, device)
    print(harness.table(["model", "type", "part", "layers", "ms", "share", "GFLOP/s"], rows))


def parts(arch: str, dtype: torch.dtype, batch: int, rounds: int, device: torch.device) -> list[list[str]]:
    """Rows of the table for one network."""
    model = build_model(arch, 10, 32).to(device).train()
    prepare_for_speed(model, dtype)
    images = torch.rand(batch, 3, 32, 32, device=device)
    given = inputs_of_layers(model, images, dtype)
    layers = dict(model.named_modules())
    actions = {name: alone(model, layers[name], x, dtype) for name, x in given.items()}
    actions["whole network"] = alone(model, model, images, dtype)
    seconds = {n: statistics.median(s) for n, s in harness.alternate(actions, rounds, device).items()}
    whole = seconds.pop("whole network")
    spent: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    work: dict[str, int] = defaultdict(int)
    for name, x in given.items():
        kind = type(layers[name]).__name__
        inside = [n for n in given if n.startswith(f"{name}.")]
        kind = "Attention without its Linears" if inside else kind
        spent[kind] += seconds[name] - sum(seconds[n] for n in inside)
        count[kind] += 1
        work[kind] += 0 if inside else 6 * products(layers[name], x)
    spent["the rest (residuals, activations, autograd)"] = whole - sum(spent.values())
    label = str(dtype).removeprefix("torch.")
    rows = [
        [
            arch,
            label,
            kind,
            str(count[kind] or ""),
            f"{1e3 * s:.0f}",
            f"{100 * s / whole:.0f} %",
            f"{work[kind] / s / 1e9:.0f}" if work[kind] else "",
        ]
        for kind, s in sorted(spent.items(), key=lambda item: -item[1])
        if s > 0.005 * whole
    ]
    return [*rows, [arch, label, "forward and backward", "", f"{1e3 * whole:.0f}", "100 %", ""]]


if __name__ == "__main__":
    main()
