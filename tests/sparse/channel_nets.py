"""Networks whose channels are coupled in every way that is supported. Not a test file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sam.models import create_model


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, concatenation, PReLU, a linear layer after flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(12, 10, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dw(torch.sigmoid(self.bn(self.a(x)))))
        x = F.relu(self.bn2(self.grouped(torch.cat([self.left(x), self.right(x)], 1))))
        return self.fc(x.flatten(1))


class Dense(nn.Module):
    """Concatenation of what came before, as in DenseNet: BatchNorm over channels of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.three = nn.Conv2d(10, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = self.bn(torch.cat([x, self.two(F.relu(x))], 1))
        return self.fc(F.relu(self.three(x)).mean((2, 3)))


SHAPES = {"resnet8": (3, 8, 8), "resnet20": (3, 8, 8), "vgg19": (3, 8, 8), "mlp": (1, 4, 4)}
NAMES = [*SHAPES, "mixed", "dense"]


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network with random BatchNorm, in float32, and a batch for it."""
    g = torch.Generator().manual_seed(seed)
    shape = SHAPES.get(name, (3, 4, 4))
    if name in SHAPES:
        net: nn.Module = create_model(
            name,
            num_classes=4,
            in_channels=shape[0],
            image_size=shape[1:],
            generator=g,
            width=0.25 if name != "mlp" else 0.1,
        )
    else:
        with torch.random.fork_rng([]):
            torch.random.default_generator.manual_seed(seed)
            net = Mixed() if name == "mixed" else Dense()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=g))
                module.bias.copy_(torch.randn(module.bias.shape, generator=g) * 0.3)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=g) * 0.3)
                module.running_var.copy_(0.5 + torch.rand(module.bias.shape, generator=g))
    return net, torch.randn(6, *shape, generator=g)
