"""SparseLinear and SparseConv2d against masked dense layers: outputs, gradients, dtypes, states, copies, hosts."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import s2sam.compact.product as product
from s2sam import S2SAM
from s2sam.compact import SparseConv2d, SparseLinear, SparsePattern, sparse_linear

EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}
CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 1), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid", "bias": False},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64).sub(0.5).to(dtype)


def linear(mask, dtype=torch.float32, bias=True):
    """A masked dense layer."""
    layer = nn.Linear(mask.shape[1], mask.shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(random(*mask.shape, dtype=dtype)).mul_(mask)
    return layer


def convolution(dtype=torch.float32, **options):
    layer = nn.Conv2d(8, 12, **options, dtype=dtype)
    mask = random(*layer.weight.shape, seed=1) > 0.2
    with torch.no_grad():
        layer.weight.copy_(random(*mask.shape, dtype=dtype)).mul_(mask)
    return layer, mask


def scattered(rows, cols, density=0.3):
    """A mask with empty rows and columns."""
    mask = random(rows, cols, seed=2) < density - 0.5
    mask[rows // 2] = False
    mask[:, 1] = False
    return mask


def compare(dense, compact, mask, x, block=1):
    """The largest relative differences of output, dx, dW at the pattern, and db."""
    results = []
    for layer in (dense, compact):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        assert y.is_contiguous() and y.dtype == x.dtype
        (y * random(*y.shape, seed=3, dtype=y.dtype)).sum().backward()
        results.append([y, given.grad, layer.bias.grad if layer.bias is not None else torch.ones(1)])
    gradient = copy.deepcopy(compact)
    gradient.values = nn.Parameter(compact.values.grad)
    stored = copy.deepcopy(compact)
    stored.values = nn.Parameter(torch.ones_like(compact.values))
    results[0].append(dense.weight.grad * stored.dense_weight())
    results[1].append(gradient.dense_weight())
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
    pairs = [(a, b) for a, b in zip(*results, strict=True) if a.numel()]
    return max(float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24), (1, 24), (200, 24)], ids=str)
def test_a_linear_layer_computes_what_the_masked_one_does(shape, block, dtype):
    mask = scattered(16, 24)
    dense = linear(mask, dtype, bias=len(shape) != 3)
    compact = SparseLinear.from_dense(dense, mask, block)
    assert compact.values.numel() == mask.sum() if block == 1 else compact.values.shape[1:] == (block, block)
    assert compare(dense, compact, mask, random(*shape, seed=4, dtype=dtype)) < EXACT[dtype]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_computes_what_the_masked_one_does(name, block, dtype):
    dense, mask = convolution(dtype, **CONVOLUTIONS[name])
    compact = SparseConv2d.from_dense(dense, mask, block)
    for shape in ((3, 8, 9, 10), (8, 9, 10), (0, 8, 9, 10)):
        assert compare(dense, compact, mask, random(*shape, seed=4, dtype=dtype)) < EXACT[dtype]


@pytest.mark.parametrize("bias", [True, False])
def test_the_parts_of_a_batch_add_up(bias, monkeypatch):
    monkeypatch.setattr(product, "WORKING_SET", 0)
    monkeypatch.setattr(product, "FEWEST_COLUMNS", 7)
    mask = scattered(16, 24)
    dense = linear(mask, torch.float64, bias=bias)
    compact = SparseLinear.from_dense(dense, mask)
    assert compare(dense, compact, mask, random(31, 24, dtype=torch.float64)) < 1e-12
    dense, mask = convolution(torch.float64, kernel_size=3, bias=bias)
    for block in (1, 4):  # an image has 56 columns, eight parts
        compact = SparseConv2d.from_dense(dense, mask, block)
        assert compare(dense, compact, mask, random(2, 8, 9, 10, dtype=torch.float64)) < 1e-12


def test_gradcheck():
    mask = scattered(6, 8)
    for block in (1, 2):
        layer = SparseLinear.from_dense(linear(mask, torch.float64), mask, block)
        given = random(3, 8, dtype=torch.float64).requires_grad_()
        parameters = (layer.values, layer.bias)
        assert torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x), (given, *parameters))
    for name in ("3x3 strided", "uneven", "1x1 strided"):
        dense, mask = convolution(torch.float64, **CONVOLUTIONS[name])
        layer = SparseConv2d.from_dense(dense, mask & (random(*mask.shape, seed=5) > 0.35))
        given = random(1, 8, 5, 4, dtype=torch.float64).requires_grad_()
        check = lambda x, *_, layer=layer: layer(x)  # noqa: E731
        assert torch.autograd.gradcheck(check, (given, layer.values, layer.bias), fast_mode=True)


@pytest.mark.parametrize("block", [1, 4])
def test_no_active_weight_at_all(block):
    mask = torch.zeros(8, 12, dtype=torch.bool)
    dense = linear(mask)
    compact = SparseLinear.from_dense(dense, mask, block)
    assert compact.values.numel() == 0
    assert compare(dense, compact, mask, random(5, 12)) == 0
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    assert torch.equal(compact.dense_weight(), torch.zeros(8, 12))


def test_a_value_that_is_not_finite_makes_its_own_gradient_no_nan():
    mask = scattered(16, 24)
    compact = SparseLinear.from_dense(linear(mask), mask)
    with torch.no_grad():
        compact.values[0] = torch.nan
    compact(random(5, 24)).sum().backward()
    assert bool(compact.values.grad.isfinite().all())


def test_only_what_is_asked_for_is_computed():
    mask = scattered(16, 24)
    compact = SparseLinear.from_dense(linear(mask), mask)
    compact(random(5, 24)).sum().backward()
    assert compact._perm is None  # no gradient of the input, no transposed pattern
    compact.requires_grad_(False)
    given = random(5, 24).requires_grad_()
    compact(given).sum().backward()
    assert compact._perm is not None and given.grad is not None
    assert not compact(random(5, 24)).requires_grad
    with torch.inference_mode():
        assert compact(random(5, 24)).shape == (5, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers_are_summed_in_float32(dtype):
    mask = scattered(64, 96)
    compact = SparseLinear.from_dense(linear(mask), mask).to(dtype)
    wide = copy.deepcopy(compact).float()
    x = random(5, 96, dtype=dtype)
    assert torch.equal(compact(x), wide(x.float()).to(dtype))
    compact(x).sum().backward()
    assert compact.values.grad.dtype == dtype and compact.crow.dtype == torch.int32


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_autocast_rounds_as_it_does_for_a_dense_layer(kind):
    if kind == "linear":
        mask = scattered(64, 96)
        dense, x = linear(mask), random(5, 96)
        compact = SparseLinear.from_dense(dense, mask)
    else:
        dense, mask = convolution(kernel_size=3)
        compact, x = SparseConv2d.from_dense(dense, mask), random(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = dense(x), compact(x)
        assert y.dtype == z.dtype == torch.bfloat16
        assert float((y - z).detach().abs().max()) <= 0.01 * float(y.detach().abs().max())
        z.float().square().sum().backward()  # inside, where CSR products would be cast and fail
    assert compact.values.grad.dtype == torch.float32
    y.float().square().sum().backward()
    difference = (dense.weight.grad[mask] - compact.values.grad).abs().max()
    assert float(difference) <= 0.02 * float(dense.weight.grad.abs().max())


def test_training_steps_are_those_of_the_masked_layer():
    mask = scattered(16, 24)
    dense = linear(mask, torch.float64)
    compact = SparseLinear.from_dense(dense, mask)
    for layer, kept in ((dense, mask), (compact, None)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        sam = S2SAM(optimizer, model=layer, rho=0.05)
        for step in range(20):
            x = random(8, 24, seed=step, dtype=torch.float64)
            if kept is not None:  # so that the norm is over active weights, as it is for the compact layer by itself
                layer(x).square().mean().backward()
                layer.weight.grad.mul_(kept)
            else:
                layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        sam.restore()
    torch.testing.assert_close(compact.dense_weight(), dense.weight.detach(), rtol=1e-12, atol=1e-13)
    assert optimizer.state[compact.values]["momentum_buffer"].shape == compact.values.shape


def test_a_second_derivative_is_refused():
    compact = sparse_linear(6, 4, 0.5, generator())
    with pytest.raises(RuntimeError, match=r"no second derivative .* s2sam.compact.to_dense\(model\)"):
        torch.autograd.grad(compact(random(2, 6)).square().sum(), compact.values, create_graph=True)


def test_torch_func_computes_with_the_dense_weight():
    compact = sparse_linear(6, 4, 0.5, generator())
    x = random(3, 6)
    torch.testing.assert_close(torch.func.vmap(compact)(x), compact(x))
    parameters = {name: p.detach() for name, p in compact.named_parameters()}
    loss = lambda p: torch.func.functional_call(compact, p, (x,)).square().sum()  # noqa: E731
    compact(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(parameters)["values"], compact.values.grad)
    torch.func.hessian(loss)(parameters)  # twice differentiable


# ------------------------------------------------------------------------------------------------------ dense and back


@pytest.mark.parametrize("block", [1, 4])
def test_conversion_round_trip(block):
    mask = scattered(16, 24)
    dense = linear(mask).eval()
    dense.bias.requires_grad_(False)
    compact = SparseLinear.from_dense(dense, mask, block)
    back = compact.to_dense()
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert back.weight.requires_grad and not back.bias.requires_grad and not back.training
    assert back.weight.data_ptr() != dense.weight.data_ptr() and compact.bias.data_ptr() != dense.bias.data_ptr()
    dense, mask = convolution(**CONVOLUTIONS["uneven"])
    back = SparseConv2d.from_dense(dense, mask, block).to_dense()
    assert torch.equal(back.weight, dense.weight)
    x = random(2, 8, 9, 10)
    assert torch.equal(back(x), dense(x))


def test_without_a_mask_the_zeros_are_pruned_and_with_one_what_is_outside():
    dense = linear(torch.ones(4, 6, dtype=torch.bool))
    mask = scattered(4, 6)
    assert torch.equal(SparseLinear.from_dense(dense, mask).dense_weight(), dense.weight * mask)
    with torch.no_grad():
        dense.weight[1] = 0
    assert SparseLinear.from_dense(dense).values.numel() == 18


def test_states_load_into_the_same_pattern_and_from_dense_layers():
    mask = scattered(16, 24)
    one, two = (SparseLinear.from_dense(linear(mask), mask) for _ in range(2))
    with torch.no_grad():
        one.values.add_(1)
        one.bias.add_(1)
    state = pickle.loads(pickle.dumps(one.state_dict()))
    assert set(state) == {"values", "bias", "crow", "col", "dense_shape"}
    pointer = two.values.data_ptr()
    two.load_state_dict(state)
    assert torch.equal(two.values, one.values) and torch.equal(two.bias, one.bias) and two.values.data_ptr() == pointer
    for block in (1, 4):
        three = SparseLinear.from_dense(linear(mask), mask, block)
        three.load_state_dict(one.to_dense().state_dict())
        assert torch.equal(three.dense_weight(), one.dense_weight())
    net = nn.Sequential(SparseLinear.from_dense(linear(mask), mask))
    net.load_state_dict({"0.weight": one.dense_weight().detach(), "0.bias": one.bias.detach()}, assign=True)
    assert torch.equal(net[0].values, one.values)


def other_states(mask):
    """States that a layer with this mask must not load, and the key that is to be named."""
    moved = mask.roll(1, 0)
    compact = SparseLinear.from_dense(linear(moved), moved).state_dict()
    dense = linear(moved).state_dict()
    beside = SparseLinear.from_dense(linear(mask.roll(1, 1)), mask.roll(1, 1)).state_dict()  # as many in each row
    wide = SparseConv2d.from_dense(nn.Conv2d(24, 16, 1)).state_dict()
    return {
        "moved": (compact, "net.fc.values belong to another sparse pattern"),
        "beside": (beside, r"net.fc.values belong to another sparse pattern .*\(net.fc.col differs\)"),
        "no pattern": ({k: compact[k] for k in ("values", "bias")}, "net.fc.values belong to another sparse pattern"),
        "dense": (dense, r"net.fc.weight, a dense weight of shape \(16, 24\), is of another shape or not 0 outside"),
        "shape": (
            {"weight": torch.zeros(3, 3), "bias": dense["bias"]},
            r"net.fc.weight, a dense weight of shape \(3, 3",
        ),
        "convolution": (wide, "net.fc.values belong to another sparse pattern .*dense_shape differs"),
        "nothing": ({"bias": dense["bias"]}, "Missing key.*net.fc.values"),
    }


@pytest.mark.parametrize("kind", ["moved", "beside", "no pattern", "dense", "shape", "convolution", "nothing"])
def test_a_state_of_another_pattern_is_refused_by_name(kind):
    mask = scattered(16, 24)
    net = nn.ModuleDict({"net": nn.ModuleDict({"fc": SparseLinear.from_dense(linear(mask), mask)})})
    before = copy.deepcopy(net.state_dict())
    state, words = other_states(mask)[kind]
    with pytest.raises(RuntimeError, match=words):
        net.load_state_dict({f"net.fc.{k}": v for k, v in state.items()})
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k != "net.fc.bias")


def test_copies_pickles_and_moves():
    mask = scattered(16, 24)
    compact = SparseLinear.from_dense(linear(mask), mask)
    x = random(5, 24).requires_grad_()
    y = compact(x)
    for other in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
        assert torch.equal(other(x), y) and other.values.data_ptr() != compact.values.data_ptr()
        assert other.pattern.equals(compact.pattern)
    other.double()(x.double()).sum().backward()
    assert other.crow.dtype == torch.int32 and compact.values.dtype == torch.float32
    empty = copy.deepcopy(compact).to("meta")
    assert empty(torch.empty(5, 24, device="meta")).shape == (5, 16)


# --------------------------------------------------------------------------------------------------------------- hosts


def network():
    torch.random.default_generator.manual_seed(3)
    mask = torch.rand(6, 4, 3, 3) > 0.7
    return nn.Sequential(
        SparseConv2d.from_dense(nn.Conv2d(4, 6, 3, padding=1), mask), nn.ReLU(), nn.Flatten(),
        SparseLinear.from_dense(nn.Linear(96, 8), torch.rand(8, 96) > 0.9),
        SparseLinear.from_dense(nn.Linear(8, 4), block=2),
    )  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_compute_densely(strict):
    net, x = network(), random(2, 4, 4, 4)
    program = torch.export.export(net, (x,), strict=strict)
    assert any("conv2d" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), net(x))


def test_traced_modules_compute_densely():
    net, x = network(), random(2, 4, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(net, (x,))
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_holds_a_dense_weight():
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    mask = scattered(16, 24)
    net = nn.Sequential(SparseLinear.from_dense(linear(mask), mask))
    x = random(5, 24)
    model = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
    assert [node.op_type for node in model.graph.node] == ["Gemm"]  # the scattering is folded into the weight
    (y,) = reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach())


def test_a_compiled_model_multiplies_sparsely_between_its_graphs():
    net, x = network(), random(2, 4, 4, 4)
    calls = []
    original = product.multiply
    other = copy.deepcopy(net)
    compiled = torch.compile(other, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s2sam.compact.layers.multiply", lambda *args: (calls.append(1), original(*args))[1])
        y = compiled(x)
    y.sum().backward()
    net(x).sum().backward()
    assert len(calls) == 3
    torch.testing.assert_close(y, net(x))
    torch.testing.assert_close(other[0].values.grad, net[0].values.grad)
    torch._dynamo.reset()  # or dynamo remembers that it gave these functions up
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True"):
        torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)(x)


def test_ddp_averages_the_values():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net, x = network(), random(2, 4, 4, 4)
        alone = copy.deepcopy(net)
        wrapped = DistributedDataParallel(net)
        for _ in range(2):
            wrapped(x).sum().backward()
            alone(x).sum().backward()
        assert torch.equal(net[3].values.grad, alone[3].values.grad)
    finally:
        dist.destroy_process_group()


def test_activation_checkpoints():
    net, x = network(), random(2, 4, 4, 4).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    y.sum().backward()
    kept = x.grad.clone()
    x.grad = None
    net(x).sum().backward()
    torch.testing.assert_close(kept, x.grad)


def test_without_block_products_blocks_are_multiplied_entry_by_entry(monkeypatch):
    """A torch without MKL: it multiplies CSR with a kernel of its own, and refuses BSR."""
    addmm = torch.addmm

    def without_mkl(start, weight, columns, **options):
        if weight.layout == torch.sparse_bsr:
            raise RuntimeError("addmm: computation on CPU is not implemented for Strided + SparseBsr without MKL")
        return addmm(start, weight, columns, **options)

    mask = scattered(16, 24)
    dense = linear(mask)
    compact = SparseLinear.from_dense(dense, mask, 4)
    product._multiplies_blocks.cache_clear()
    monkeypatch.setattr(torch, "addmm", without_mkl)
    with pytest.warns(RuntimeWarning, match="no product of block-sparse tensors on cpu") as caught:
        assert compare(dense, compact, mask, random(5, 24)) < 1e-6
    assert len(caught) == 1
    product._multiplies_blocks.cache_clear()


# ------------------------------------------------------------------------------------------------- creation, bad input


def test_a_new_layer_has_the_initial_weights_of_the_library():
    layer = sparse_linear(500, 400, 0.9, generator())
    assert layer.values.numel() == 20_000 and layer.sparsity == pytest.approx(0.9)
    assert float(layer.values.detach().std()) == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    assert float(layer.values.detach().mean()) == pytest.approx(0, abs=1e-3)
    assert not layer.bias.any()
    again = sparse_linear(500, 400, 0.9, generator())
    assert torch.equal(again.values, layer.values) and again.pattern.equals(layer.pattern)
    assert sparse_linear(5, 4, 0.0, generator(), bias=False).bias is None


PATTERN = SparsePattern.from_mask(torch.eye(2, 3).bool())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SparseLinear(PATTERN, torch.ones(3)), "a pattern of 2 entries takes as many real values"),
        (lambda: SparseLinear(PATTERN, torch.ones(2, dtype=torch.int64)), "takes as many real values"),
        (lambda: SparseLinear(PATTERN, torch.ones(2, dtype=torch.complex64)), "takes as many real values"),
        (lambda: SparseLinear(PATTERN, torch.ones(2, 2, 3)), "blocks must be square"),
        (lambda: SparseLinear(PATTERN, torch.ones(2), torch.ones(3)), "the bias must be a row of 2 torch.float32"),
        (lambda: SparseConv2d(PATTERN, torch.ones(2), kernel_size=(2, 2)), r"no weight of shape \(2, 0, 2, 2\)"),
        (lambda: SparseLinear.from_dense(nn.Conv2d(2, 2, 1)), "cannot become a SparseLinear: its class is Conv2d"),
        (lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 1, groups=2)), "it has 2 groups"),
        (lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 3, padding_mode="reflect")), "it pads with 'reflect'"),
        (lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 2, padding="same")), "it pads one side more"),
        (lambda: SparseConv2d.from_dense(nn.ConvTranspose2d(2, 2, 1)), "its class is ConvTranspose2d"),
        (lambda: SparseLinear.from_dense(nn.Linear(2, 2), torch.ones(2, 2)), "the mask must be a bool tensor"),
        (lambda: SparseLinear.from_dense(nn.Linear(2, 2), torch.ones(2, 3).bool()), "of the weight's shape"),
        (lambda: SparseLinear.from_dense(nn.Linear(2, 6), block=4), "blocks of side 4 do not divide a weight of 6 x 2"),
        (lambda: sparse_linear(4, 4, 1.0, generator()), "sparsity must be from 0 to below 1, got 1.0"),
        (lambda: sparse_linear(4, 4, 0.99, generator()), "leaves none of 16 weights; give at most 0.9375"),
        (lambda: sparse_linear(0, 4, 0.5, generator()), "in_features must be a positive whole number, got 0"),
        (lambda: sparse_linear(4, 4, 0.5, None), "drawn from a torch.Generator on the CPU, got None"),
        (lambda: sparse_linear(4, 3, 0.5, generator())(torch.ones(2, 5)), "takes inputs of 4 features, got shape"),
        (lambda: sparse_linear(4, 3, 0.5, generator())(torch.ones(2, 4).double()), "got an input of torch.float64"),
        (lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 3))(torch.ones(1, 3, 9, 9)), "takes images of 2 channels"),
        (
            lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 3))(torch.ones(1, 2, 2, 9)),
            "smaller than this layer's kernel",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(build, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_dense_functional_forms_agree():
    layer = sparse_linear(6, 4, 0.5, generator())
    x = random(3, 6)
    torch.testing.assert_close(F.linear(x, layer.dense_weight(), layer.bias), layer(x))
