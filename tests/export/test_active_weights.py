"""A file of active weights: what is written comes back bit for bit, it holds no pruned weight, and damage is named."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from s2sam import sparsify
from s2sam.export.active_weights import load_active, save_active


def network(dtype=torch.float32, sparsity=0.9):
    """A small network with BatchNorm at this sparsity: its tensors and masks."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 5)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, optimizer, method="static", sparsity=sparsity, generator=generator)
    model(torch.randn(8, 16, generator=generator).to(dtype)).sum().backward()
    optimizer.step()
    return model.state_dict(), sparsifier.masks


def data_bytes(path):
    """Bytes of a safetensors file after its header."""
    content = path.read_bytes()
    return len(content) - 8 - struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, dtype, sparsity):
    tensors, masks = network(dtype, sparsity)
    size = save_active(tmp_path / "a.safetensors", tensors, masks)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    found, found_masks = load_active(tmp_path / "a.safetensors")
    assert list(found) == list(tensors)
    assert found_masks.keys() == masks.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert all(torch.equal(found_masks[name], mask) for name, mask in masks.items())


def test_it_holds_the_active_weights_and_a_bit_for_each_place(tmp_path):
    tensors, masks = network()
    save_active(tmp_path / "a.safetensors", tensors, masks)
    active = sum(int(mask.sum()) for mask in masks.values())
    bits = sum(-(-mask.numel() // 8) for mask in masks.values())
    whole = sum(t.numel() * t.element_size() for name, t in tensors.items() if name not in masks)
    assert active == round(0.1 * sum(mask.numel() for mask in masks.values()))
    assert data_bytes(tmp_path / "a.safetensors") == 4 * active + bits + whole


def test_without_masks_it_is_a_plain_file_of_tensors(tmp_path):
    tensors, _ = network()
    save_active(tmp_path / "a.safetensors", tensors, {})
    found, masks = load_active(tmp_path / "a.safetensors")
    assert masks == {}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_active_weights_that_are_zero_stay_active(tmp_path):
    mask = torch.tensor([[True, False, True]])
    save_active(tmp_path / "a.safetensors", {"w": torch.tensor([[0.0, 0.0, 2.0]])}, {"w": mask})
    found, masks = load_active(tmp_path / "a.safetensors")
    assert found["w"].tolist() == [[0.0, 0.0, 2.0]]
    assert torch.equal(masks["w"], mask)


@pytest.mark.parametrize(
    ("tensors", "masks", "sentence"),
    [
        ({"w": torch.ones(2)}, {"w": torch.tensor([True, False])}, "'w' is not 0 in 1 places that its mask prunes"),
        ({"w": torch.ones(2)}, {"v": torch.tensor([True, True])}, "a mask of 'v', and no such tensor"),
        ({"w": torch.ones(2)}, {"w": torch.tensor([[True, True]])}, r"the mask of 'w' has shape \(1, 2\)"),
        ({"w": torch.ones(2)}, {"w": torch.ones(2)}, "the mask of 'w' is of torch.float32, not bool"),
        ({"w": torch.ones(2), "w:mask": torch.ones(1)}, {}, "'w:mask' ends like a part of another tensor"),
    ],
)
def test_what_would_lose_something_is_refused(tmp_path, tensors, masks, sentence):
    with pytest.raises(ValueError, match=sentence):
        save_active(tmp_path / "a.safetensors", tensors, masks)
    assert not list(tmp_path.iterdir())


def spoil(path, change):
    """Change the metadata of a file, or its parts."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta, parts = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(meta, parts)
    save_file(parts, path, meta)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, parts: meta.update(format="pt"),
        lambda meta, parts: meta.update(shapes="{"),
        lambda meta, parts: meta.update(shapes=json.dumps({"w": [3, 3]})),
        lambda meta, parts: meta.update(shapes=json.dumps({"w": [-2, 2]})),
        lambda meta, parts: meta.update(shapes=json.dumps({})),
        lambda meta, parts: meta.pop("shapes"),
        lambda meta, parts: parts.pop("w:mask"),
        lambda meta, parts: parts.pop("w:values"),
        lambda meta, parts: parts.update({"w:values": torch.ones(1)}),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, change):
    path = tmp_path / "a.safetensors"
    save_active(path, {"w": torch.tensor([[1.0, 0.0], [2.0, 3.0]])}, {"w": torch.tensor([[True, False], [True, True]])})
    spoil(path, change)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or no file of active weights .*; write it again"):
        load_active(path)


def test_a_torn_file_is_refused_and_a_missing_one_is_missing(tmp_path):
    path = tmp_path / "a.safetensors"
    save_active(path, *network())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged or no file of active weights"):
        load_active(path)
    with pytest.raises(FileNotFoundError):
        load_active(tmp_path / "none.safetensors")
