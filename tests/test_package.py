"""What importing costs: invariant 9."""

import json
import subprocess
import sys

import pytest

EXTRAS = ("rich", "jsonargparse", "matplotlib", "PIL", "sklearn", "pyarrow", "safetensors", "yaml", "scipy")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100).stdout


def test_import_s2sam_loads_the_standard_library_only():
    out = run(
        "import sys, json; before = set(sys.modules); import s2sam; s2sam.__version__;"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    assert set(json.loads(out)) <= set(sys.stdlib_module_names) | {"s2sam"}


def test_the_core_needs_torch_and_numpy_only():
    out = run(
        f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
import torch, s2sam
net = torch.nn.Linear(20, 10)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
sparsifier = s2sam.sparsify(net, optimizer, method='rigl', sparsity=0.9, total_steps=100, delta_t=2)
s2sam.S2SAM(optimizer, model=net)
for _ in range(5):
    net(torch.ones(3, 20)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(int((net.weight != 0).sum()) <= 20, round(sparsifier.sparsity(), 3))
"""
    )
    assert out.split() == ["True", "0.9"]


def test_every_public_name_exists_and_unknown_ones_are_refused():
    import s2sam

    for name in s2sam.__all__:
        assert getattr(s2sam, name) is not None
    assert set(dir(s2sam)) == set(s2sam.__all__)
    with pytest.raises(AttributeError, match="S3SAM"):
        s2sam.S3SAM  # noqa: B018
