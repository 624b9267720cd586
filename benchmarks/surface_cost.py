"""What does a loss surface cost, beside the forward passes that it needs?

    python benchmarks/surface_cost.py                          # ResNet-32, 21 x 21 points, 1,000 images, this CPU
    python benchmarks/surface_cost.py --device cuda --width 2
    python benchmarks/surface_cost.py --quick                  # a smoke test: tiny, its numbers mean nothing

surface    `s2sam.analysis.surface_run.measure` as `s2sam surface` calls it: directions, moving the weights, normalising
           images, forward passes, loss and accuracy, saving the file as it grows.
pure       as many forward passes of the same network on the same images, already normalised, in as large batches, in
           eval mode without gradients; their outputs are thrown away.

After every row of the grid its pure forwards follow, so that drift hits both alike. What happens before the first point
and after the last one counts for the surface. The bar: surface / pure <= 1.15, for 21 x 21 points. With fewer points
what happens once weighs more, so that their ratio is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _environment import ROOT, environment, slug
from _timing import bootstrap
from s2sam.analysis.surface import Landscape, SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.analysis.surface_run import measure
from s2sam.data.augment import Augment
from s2sam.models import create_model
from s2sam.train.evaluate import BATCH

BAR = 1.15
CLASSES = 10


class Rows:
    """Times a surface row by row, and pure forwards of each row after it."""

    def __init__(self, model: nn.Module, prepared: Tensor, points: int) -> None:
        self.model, self.batches, self.points = model, prepared.split(BATCH), points
        self.surface: list[float] = []  #: seconds of each row
        self.pure: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, done: int) -> None:
        """After each point."""
        if done == 0 or done % self.points:
            return
        self.surface.append(time.perf_counter() - self.start)
        begin = time.perf_counter()
        self.forwards(self.points)
        self.pure.append(time.perf_counter() - begin)
        self.start = time.perf_counter()

    def finish(self) -> None:
        """What the surface did after its last point belongs to the last row."""
        self.surface[-1] += time.perf_counter() - self.start

    @torch.no_grad()
    def forwards(self, times: int) -> None:
        """All images, `times` times; returns when they are done."""
        self.model.eval()
        for _ in range(times):
            for batch in self.batches:
                self.model(batch)
        if self.batches[0].device.type == "cuda":
            torch.cuda.synchronize()


def timed(options: argparse.Namespace, path: Path) -> Rows:
    """One surface of one pair, on random images (what they show costs no time)."""
    device, generator = torch.device(options.device), torch.Generator().manual_seed(0)
    model = create_model(options.network, num_classes=CLASSES, generator=generator, width=options.width).to(device)
    x = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    y = torch.randint(0, CLASSES, (options.images,), generator=generator).to(device)
    prepare = Augment(torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device), "none")
    settings = SurfaceSettings(points=options.points)
    landscape = Landscape(model, x, y, prepare, settings)
    rows = Rows(model, prepare(x), options.points)
    rows.forwards(2)  # warm-up: allocations, kernels
    rows.start = time.perf_counter()
    measure(landscape, Surface.empty("benchmark", settings, {}), path, on_point=rows)
    rows.finish()
    return rows


def ratio_of_sums(surface: Any, pure: Any) -> Any:
    """sum surface / sum pure along the last axis."""
    return surface.sum(axis=-1) / pure.sum(axis=-1)


def main(argv: list[str] | None = None) -> Path:
    """Measure, print a line, write the JSON and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--network", default="resnet32")
    parser.add_argument("--width", type=float, default=1, help="of the network; the paper's ResNet-32 has 2")
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/surface_cost_<hardware>.json")
    parser.add_argument("--quick", action="store_true", help="a tiny network, 5 x 5 points, 8 images")
    options = parser.parse_args(argv)
    if options.quick:
        options.network, options.width, options.points, options.images = "resnet8", 0.25, 5, 8
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = timed(options, Path(folder) / "surface.npz")
    device = torch.device(options.device)
    ratio = bootstrap(ratio_of_sums, rows.surface, rows.pure)
    whole = options.network == "resnet32" and options.points <= 21 and options.images == 1000
    result = {
        "question": (__doc__ or "").partition("\n")[0],
        **environment(device),
        "quick": options.quick,
        "settings": {name: getattr(options, name) for name in ("network", "width", "points", "images")}
        | {"interval": "95 % percentile bootstrap over rows of the grid"},
        "seconds": {"surface": sum(rows.surface), "pure": sum(rows.pure)},
        "points_measured": options.points**2,
        "bars": [{"bar": "surface / pure", **ratio, "limit": BAR, "holds": ratio["value"] <= BAR if whole else None}],
    }
    out: Path = options.out or ROOT / "benchmarks" / "results" / f"surface_cost_{slug(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    word = {True: "holds", False: "FAILS", None: "no bar"}[result["bars"][0]["holds"]]
    low, high = ratio["interval"]
    print(f"{word}  surface / pure, {options.network}: {ratio['value']:.3f} [{low:.3f}, {high:.3f}] (limit {BAR})")
    return out


if __name__ == "__main__":
    main()
