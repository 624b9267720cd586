"""S2-SAM and RigL in a plain training loop: 90 % of the weights stay exactly zero, one gradient a step.

python examples/minimal.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sam import S2SAM, sparsify
from s2sam.data import load_data

EPOCHS, BATCH = 15, 64


def main() -> None:
    """Train on scikit-learn's digits and print what came out."""
    data = load_data("digits")
    x, x_test = ((images.float() / 255 - 0.5) / 0.3 for images in (data.train_x, data.test_x))
    generator = torch.Generator().manual_seed(0)

    model = network(generator)
    steps = EPOCHS * (len(x) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparsifier = sparsify(
        model, optimizer, method="rigl", sparsity=0.9, total_steps=steps, delta_t=20, generator=generator
    )
    sam = S2SAM(optimizer, model=model, rho=0.05, stats_every=1)

    for _ in range(EPOCHS):  # an ordinary loop from here on
        order = torch.randperm(len(x), generator=generator)
        for batch in order[: len(x) // BATCH * BATCH].split(BATCH):
            F.cross_entropy(model(x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    print(f"test accuracy      {accuracy(model, x_test, data.test_y):.3f} ({len(x_test)} images)")
    print(f"sparsity           {sparsifier.sparsity():.4f} of the prunable weights are exactly 0")
    print(f"displacement       {sam.stats['displacement']:.4f} = ||x - w|| in the last step")
    print(f"topology updates   {sparsifier.updates}")


def network(generator: torch.Generator) -> nn.Module:
    """A small convolutional network for 8x8 images; its initial weights depend on `generator` alone."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(64 * 4 * 4, 10),
    )
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.kaiming_normal_(p, generator=generator)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
