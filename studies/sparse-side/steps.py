"""The steps of HAM and SparseOpt for many networks at once, in the runner of studies/control.

tests/studies/test_sparse_side.py holds them equal to the hooks on the library's own loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batched import Arm, Extra, Networks, Run
from hooks import LARGEST_NORM, multiplied


@dataclass(frozen=True)
class SideArm(Arm):
    """An arm that may have HAM, SparseOpt or both.

    Args:
        ham: HAM after the step; the third number of a trial, `Run.rho`, is its alpha.
        beta: of HAM.
        sparseopt: SparseOpt before the step.
    """

    ham: bool = False
    beta: float = 1e-3
    sparseopt: bool = False

    def extra(self, networks: Networks, runs: Sequence[Run]) -> Extra | None:
        """The two, if there is one of them."""
        return Side(self, networks, runs) if self.ham or self.sparseopt else None


class Side(Extra):
    """HAM and SparseOpt in the steps of R networks."""

    def __init__(self, arm: SideArm, networks: Networks, runs: Sequence[Run]) -> None:
        self.arm, self.networks = arm, networks
        self.alpha = torch.tensor([run.rho for run in runs], dtype=networks.w.dtype)[:, None]
        tensors, neurons, fan_in = [], [], []  # of each place: its tensor and its neuron; of each neuron: its weights
        for i, (_, shape) in enumerate(networks.layout):
            matrix = len(shape) > 1
            rows, columns = (shape[0], shape[1:].numel()) if matrix else (1, shape.numel())
            tensors.append(torch.full((shape.numel(),), i if matrix else -1))
            neurons.append(torch.arange(rows).repeat_interleave(columns) + len(fan_in))
            fan_in += [(columns, i if matrix else -1)] * rows
        self.tensor_of, self.neuron_of = torch.cat(tensors), torch.cat(neurons)
        self.fan_in = torch.tensor([n for n, _ in fan_in], dtype=networks.w.dtype)
        self.layer_of = torch.tensor([i for _, i in fan_in])
        self.active = torch.zeros(0, dtype=torch.long)
        self.follow_masks()

    def follow_masks(self) -> None:
        """Work out again which weights are in matrices, and the factor of each, if masks have changed."""
        active = self.networks.active
        if torch.equal(self.active, active):
            return
        self.active = active.clone()
        self.tensors = self.tensor_of[active]
        neurons = self.neuron_of[active]
        counts = torch.zeros(len(active), len(self.fan_in), dtype=self.networks.w.dtype)
        counts.scatter_add_(1, neurons, torch.ones_like(self.networks.w))
        factors, density = torch.ones_like(counts), counts / self.fan_in
        for i in self.layer_of.unique().tolist():
            if i >= 0:
                here = self.layer_of == i
                factors[:, here] = (density[:, here] / density[:, here].mean(dim=1, keepdim=True)).sqrt()
        self.factors = factors.gather(1, neurons)

    def before(self, g: Tensor) -> Tensor:
        """The gradient, scaled neuron by neuron."""
        if not self.arm.sparseopt:
            return g
        self.follow_masks()
        return g * self.factors

    def after(self, w: Tensor, g: Tensor, lr: Tensor) -> None:
        """HAM's factor, and its limit as in the authors' code; what is not finite stays so, and counts as chance."""
        if not self.arm.ham:
            return
        self.follow_masks()
        new = torch.where(self.tensors >= 0, multiplied(w, g, lr, self.alpha, self.arm.beta), w)
        if bool((torch.linalg.vector_norm(new, dim=1) > LARGEST_NORM).any()):
            places = self.tensors + 1  # 0: in no matrix
            sizes = new.new_zeros(len(new), len(self.networks.layout) + 1).scatter_add_(1, places, new.square()).sqrt()
            scales = (LARGEST_NORM / sizes).clamp(max=1.0)
            scales[:, 0] = 1.0
            new = new * scales.gather(1, places)
        w.copy_(new)
