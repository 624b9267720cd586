"""Seeded damage to records that only one command reads: surfaces, official corrupted images, summary.csv."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from s2sam.analysis.surface_file import Surface, SurfaceSettings, load_surface
from s2sam.data.corrupted_files import CifarFiles

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import damaged

SETTINGS = SurfaceSettings(points=5, pairs=1)


def tried(read):
    """What it read, and what it said if it refused; any other error than a ValueError fails the test."""
    try:
        return read(), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_surface_is_refused_with_its_name_or_holds_numbers_of_its_shape(tmp_path, seed):
    draw, path = random.Random(seed), tmp_path / "surface.npz"
    whole = Surface.empty("a run", SETTINGS, {})
    whole.loss[:], whole.top1[:], whole.done[:] = 1.5, 0.5, True
    whole.save(path)
    content, refused = path.read_bytes(), 0
    for _ in range(60):
        path.write_bytes(damaged(content, draw))
        for read in (load_surface, Surface.empty("a run", SETTINGS, {}).resume):
            found, said = tried(lambda read=read: read(path))
            refused += bool(said)
            assert not said or (str(path) in said and "\n" not in said)
            if found is not None:
                assert found.loss.shape == found.settings.shape and found.done.dtype == bool
    assert refused > 40


@pytest.mark.parametrize("seed", range(4))
def test_damaged_official_arrays_are_refused_with_their_names_or_hold_images(tmp_path, seed):
    draw, labels = random.Random(seed), torch.arange(6)
    files = {
        "labels": np.tile(labels.numpy(), 5),
        "gaussian_noise": np.full((30, 4, 4, 3), 7, dtype=np.uint8),
    }
    content = {}
    for name, array in files.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        content[name] = buffer.getvalue()
    refused = 0
    for turn in range(80):
        broken = list(files)[turn % 2]
        for name, whole in content.items():
            head = damaged(whole[:140], draw) + whole[140:] if name == broken and turn % 4 < 2 else None
            (tmp_path / f"{name}.npy").write_bytes(
                whole if name != broken else head if head is not None else damaged(whole, draw)
            )
        images, said = tried(
            lambda: next(CifarFiles(tmp_path, labels, (3, 4, 4)).batches("gaussian_noise", 2, torch.arange(6), 6))
        )
        refused += bool(said)
        assert f"{broken}.npy" in said and "\n" not in said if said else images.shape == (6, 3, 4, 4)
    assert refused > 20
