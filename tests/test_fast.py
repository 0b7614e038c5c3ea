"""fast.py: each stand-in against the function of torch whose name it has; quantized weights."""

import copy
import math

import pytest
import torch
from test_model import SHAPES, make, replace, tokens
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fast


class Operators(TorchDispatchMode):
    """The names of the operators that run inside a `with` block, in `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(p, dtype):
    """Its rate, its mean, its gradient, any shape; bits of one number must be unrelated."""
    torch.manual_seed(0)
    x = (torch.rand(3, 333, 335) + 1).to(dtype).requires_grad_()
    y = fast.dropout(x, p, True)
    assert y.shape == x.shape and y.dtype == dtype
    dropped = y == 0
    assert abs(dropped.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / x.numel()) + 1e-5
    torch.testing.assert_close(y[~dropped], (x / (1 - p))[~dropped], atol=0, rtol=0.02)
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped)
    torch.testing.assert_close(y, x * x.grad)
    assert torch.equal(fast.dropout(x, p, False), x)
    if p == 0.5:
        for distance in range(1, 9):
            same = (dropped[..., distance:] == dropped[..., :-distance]).float().mean()
            assert abs(same - 0.5) < 0.01
        assert not torch.equal(fast.dropout(x, p, True) == 0, dropped)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (3, 1)])
def test_attention(heads):
    """With dropout it is written out: the scale, the triangle and the order of shared heads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, 7, 10, requires_grad=True) for n in (*heads, heads[1]))
    options = dict(is_causal=True, enable_gqa=heads[0] != heads[1])
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    almost = fast.scaled_dot_product_attention(q, k, v, dropout_p=1e-9, **options)
    torch.testing.assert_close(almost, wanted, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v), retain_graph=True)
                              for y in (almost, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    for gradients in (False, True):  # in bf16 without dropout, too, but only for training
        with Operators() as operators, torch.set_grad_enabled(gradients):
            y = fast.scaled_dot_product_attention(*halves, **options)
        assert y.dtype == torch.bfloat16
        assert any("flash" in name for name in operators.seen) != gradients
    q0, *rest = (x[:, :1] for x in halves)
    fewer = q0[:, :, :3], *rest  # queries than keys: left to torch
    assert torch.equal(*(function(*fewer, dropout_p=0.0, is_causal=True) for function in (
        fast.scaled_dot_product_attention, F.scaled_dot_product_attention)))
    if heads == (6, 2):
        with pytest.raises(RuntimeError):
            fast.scaled_dot_product_attention(*halves, is_causal=True)
    torch.testing.assert_close(y.float(), wanted, atol=0.03, rtol=0.03)
    gradients = torch.autograd.grad(y.float().square().sum(), halves)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted.square().sum(), (q, k, v)),
                            strict=True):
        assert (mine.float() - theirs).norm() < 0.03 * theirs.norm()
    with torch.no_grad():
        dropped = [fast.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **options)
                   for _ in range(2000)]
    deviation = torch.stack(dropped).std(0) / math.sqrt(2000)
    assert ((sum(dropped) / 2000 - wanted).abs() < 5 * deviation + 1e-3).all()  # no bias
    mask = torch.rand(7, 7) < 0.7
    mask.fill_diagonal_(True)
    masked = fast.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                               enable_gqa=options["enable_gqa"])
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=options["enable_gqa"])
    assert torch.equal(masked, wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    """fp32 goes through oneDNN, without gradients only; everything else is torch's."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    torch.manual_seed(0)
    mine = fast.Linear(33, 7, bias=bias)
    theirs = torch.nn.Linear(33, 7, bias=bias)
    theirs.load_state_dict(mine.state_dict())
    rows = torch.randn(3, 5, 66)[..., ::2]  # not contiguous
    for x in (rows, rows[:1, :1], rows[0, :1], rows[0, 0], rows[:0]):
        with torch.no_grad():
            with Operators() as operators:
                y = mine(x)
            assert any("mkldnn" in name for name in operators.seen) == (x.numel() > 0)
            torch.testing.assert_close(y, theirs(x))
            assert y.shape == (*x.shape[:-1], 7) and y.dtype == torch.float32
    row = rows[0, :1].clone().requires_grad_()
    mine(row).sum().backward()
    torch.testing.assert_close(row.grad, mine.weight.detach().sum(0, keepdim=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert mine(row).dtype == torch.bfloat16
    seen = []  # by torch.compile, which cannot make code for this product of oneDNN's

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mine, backend=backend)(rows), theirs(rows))
    assert seen and not any("mkldnn" in target for target in seen)
    if bias:  # read as if it were contiguous
        mine.bias = torch.nn.Parameter(torch.randn(14)[::2])
        with torch.no_grad():
            torch.testing.assert_close(mine(rows), F.linear(rows, mine.weight, mine.bias))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mine(rows[..., :-1])
    double = fast.Linear(33, 7, bias=bias).double()
    with torch.no_grad():
        assert double(rows[0, :1].double()).dtype == torch.float64


# ---------------------------------------------------------------------------------------------
# Muon


def parameters():
    """A tall, a wide and a square matrix."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size)) for size in ((17, 5), (6, 19), (8, 8))]


def updates(optimizer, count=3, seed=1):
    """The parameters' changes in `count` updates with the same random gradients every time."""
    generator = torch.Generator().manual_seed(seed)
    matrices = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in matrices]
    for _ in range(count):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return torch.cat([(p - b).detach().flatten() for p, b in zip(matrices, before, strict=True)])


@pytest.fixture
def slow_bf16(monkeypatch):
    """A CPU without bf16 instructions, whatever this one has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


OURS = dict(lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")


def test_muon(slow_bf16):
    """torch.optim.Muon up to bf16's rounding; and a run may go from one to the other."""
    mine, theirs = fast.Muon(parameters(), **OURS), torch.optim.Muon(parameters(), **OURS)
    a, b = updates(mine), updates(theirs)
    assert 0 < (a - b).norm() < 0.03 * b.norm()
    assert str(mine.state_dict()["param_groups"]) == str(theirs.state_dict()["param_groups"])
    for state, other in zip(mine.state.values(), theirs.state.values(), strict=True):
        assert state.keys() == other.keys() == {"momentum_buffer"}
        assert torch.equal(state["momentum_buffer"], other["momentum_buffer"])
    for kind, source in ((torch.optim.Muon, mine), (fast.Muon, theirs)):
        here, forgetful = (kind(copy.deepcopy(source.param_groups[0]["params"]), **OURS | {"lr": 1})
                           for _ in range(2))
        here.load_state_dict(copy.deepcopy(source.state_dict()))
        forgetful.param_groups[0]["lr"] = OURS["lr"]
        c, d, e = (updates(optimizer, seed=2) for optimizer in (here, source, forgetful))
        assert (c - d).norm() < 0.02 * d.norm() < 0.1 * (e - d).norm()


@pytest.mark.parametrize("settings, known", [
    (dict(nesterov=False), False), (dict(adjust_lr_fn=None), False), (dict(ns_steps=3), True),
    (dict(ns_coefficients=(2.0, -1.5, 0.5)), True), (dict(eps=10.0), True),
])
def test_muon_with_other_settings(slow_bf16, settings, known):
    """What it does not know it leaves to torch's own; what it knows it does."""
    settings = OURS | settings
    a, b = (updates(kind(parameters(), **settings)) for kind in (fast.Muon, torch.optim.Muon))
    assert (a - b).norm() < 0.02 * b.norm()
    assert torch.equal(a, b) != known


def test_muon_without_gradients(slow_bf16, monkeypatch):
    """A frozen parameter has none; a closure is called; bf16 instructions are used."""
    p, q, _ = parameters()
    before = q.clone()
    optimizer = fast.Muon([p, q], **OURS)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    closure()
    optimizer.step()
    assert torch.equal(q, before) and q not in optimizer.state
    wanted = p.square().sum().item()
    assert optimizer.step(closure).item() == wanted > p.square().sum()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    a, b = (updates(kind(parameters(), **OURS)) for kind in (fast.Muon, torch.optim.Muon))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# quantized weights

@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("inputs, outputs", [
    (24, 50), (40, 13), (50, 24), (100, 40), (33, 65), (1, 1), (16, 130), (64, 64), (300, 200),
])
def test_quantized_layer(kind, inputs, outputs):
    """Half a step is the largest error of a weight. The kernels read past widths that do not suit
    them: segfaults at 24, 40, 50, 100."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs)
    layer.weight.data[-1] *= 100  # an output of another size must not cost the others
    layer.weight.data[0, : inputs // 2] = 0.0
    packed = fast.QuantizedLinear(layer, kind)
    held = (packed(torch.eye(inputs)) - layer.bias).T
    size = 32 if kind == "int4" else inputs  # weights that share a step
    groups = F.pad(layer.weight, (0, -inputs % size)).unflatten(1, (-1, size))
    largest = groups.abs().amax(2)
    step = {"bf16": 0 * largest, "int8": largest / 127,
            "int4": (groups.amax(2) - groups.amin(2)) / 15}[kind]
    bound = (step / 2 + largest / 128).repeat_interleave(size, dim=1) + 1e-7  # / 128: bf16
    assert ((held - layer.weight).abs() <= bound[:, :inputs]).all()
    batch, strided = torch.randn(3, 2, inputs), torch.randn(inputs, 50)
    batch[0, 0] *= 1000  # a row of another size must not cost the others either
    for x in (batch[0, :1], batch.transpose(0, 1), strided.T):
        mine, wanted = packed(x), F.linear(x, held, layer.bias)
        assert mine.shape == wanted.shape and mine.dtype == x.dtype
        scale = x.norm(dim=-1, keepdim=True) * held.norm(dim=1) + 1e-7
        assert ((mine - wanted).abs() / scale).max() < 0.01
    empty = torch.nn.Linear(inputs, outputs)
    torch.nn.init.zeros_(empty.weight)
    torch.testing.assert_close(fast.QuantizedLinear(empty, kind)(x), empty(x), atol=1e-5, rtol=0)


def test_bf16_without_its_kernel(monkeypatch):
    """A PyTorch without oneDNN gives the same numbers."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(33, 17), torch.randn(2, 3, 33)
    here = fast.QuantizedLinear(layer, "bf16")(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(fast.QuantizedLinear(layer, "bf16")(x), here, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind, error, share", [("bf16", 0.02, 0.5), ("int8", 0.06, 0.3),
                                                ("int4", 0.35, 0.3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_model(shape, kind, error, share):
    """A scale on the wrong side would be noise; embeddings, norms and biases stay as they are."""
    config = replace(SHAPES[shape], n_embd=66, n_inner=256, n_layer=3)
    ours, packed, idx = make(config, spread=0.1), make(config, spread=0.1), tokens(3, 7)
    assert fast.quantize(packed, kind) is packed
    a, b = ours(idx)[0], packed(idx)[0]
    assert 0 < (a - b).norm() / a.norm() < error
    state = packed.state_dict()
    kept = [k for k, v in ours.state_dict().items() if v.dim() == 1 or "wte" in k or "wpe" in k]
    assert all(torch.equal(state[k], ours.state_dict()[k]) for k in kept)
    layers = [name for name, module in ours.named_modules() if isinstance(module, torch.nn.Linear)]
    assert "lm_head" in layers and len(layers) == 1 + 3 * (5 if config.swiglu else 4)
    big = [name for name in layers if name.endswith(("c_fc", "mlp.c_proj"))]
    if kind == "int8":
        held = [torch.ops.quantized.linear_unpack(packed.get_submodule(name).packed)[0]
                for name in big]
        size = sum(w.int_repr().nbytes + 4 * len(w) for w in held)  # and their scales
    elif kind == "bf16":
        held = [packed.get_submodule(name).packed for name in big]
        size = sum(w.numel() * w.element_size() for w in held)
    else:
        size = sum(state[f"{name}.{part}"].nbytes for name in big for part in ("weight", "scale"))
    assert kind == "int4" or not any(f"{name}.weight" in state for name in layers)
    assert size <= share * sum(ours.state_dict()[f"{name}.weight"].nbytes for name in big)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_of_the_largest_sums(dtype):
    """Without AVX512-VNNI two products of 8 bits do not fit into the kernel's 16."""
    layer = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    torch.nn.init.ones_(layer.weight)
    packed = fast.QuantizedLinear(layer, "int8")
    for rows in (1, 3):
        y = packed(torch.ones(rows, 64, dtype=dtype))
        assert y.dtype == dtype and (y - 64).abs().max() < 0.5
