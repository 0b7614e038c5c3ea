"""model.py: against written-out formulas; its initial weights and gradients; alone in a folder."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import model
from model import GPT, GPTConfig, RMSNorm, rotate

SIZE = dict(block_size=7, vocab_size=13, n_layer=2)
GPT2 = GPTConfig(**SIZE, n_head=3, n_embd=18)
BOOK = replace(GPT2, qkv_bias=False, tie_weights=False, init="torch")
LLAMA = GPTConfig(**SIZE, n_head=3, n_kv_head=1, head_dim=10, n_embd=15, rope_theta=1e4,
                  rms_norm=True, swiglu=True, bias=False, qkv_bias=False, tie_weights=False)
QWEN3 = GPTConfig(**SIZE, n_head=6, n_kv_head=2, head_dim=6, n_embd=20, n_inner=23, rope_theta=1e6,
                  rms_norm=True, swiglu=True, bias=False, qkv_bias=False, qk_norm=True,
                  norm_eps=1e-6)
SHAPES = {"gpt2": GPT2, "book": BOOK, "bare": replace(GPT2, bias=False, qkv_bias=False),
          "llama": LLAMA, "qwen3": QWEN3}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def make(config=GPT2, seed=0, spread=0.3):
    """A GPT in eval mode whose weights, biases included, are far from zero."""
    torch.manual_seed(seed)
    gpt = GPT(config)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=spread)
    return gpt.eval()


def tokens(rows, length, seed=1, vocab_size=13):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, length), generator=generator)


# ---------------------------------------------------------------------------------------------
# against the publications


def book_logits(w, idx, config):
    """The model of the book's chapter 4 from a dict of its matrices, every formula written out."""

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    future = torch.ones(idx.size(1), idx.size(1)).triu(1).bool()
    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.size(1)]
    for i in range(config.n_layer):
        n = f"h.{i}."
        y, heads = norm(x, n + "ln_1"), []
        q, k, v = (linear(y, n + what).chunk(config.n_head, dim=-1) for what in "qkv")
        for qh, kh, vh in zip(q, k, v, strict=True):
            scores = (qh @ kh.mT / math.sqrt(qh.size(-1))).masked_fill(future, -math.inf)
            heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ vh)
        x = x + linear(torch.cat(heads, dim=-1), n + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, n + "ln_2"), n + "mlp.c_fc")), n + "mlp.c_proj")
    return linear(norm(x, "ln_f"), "head")


@pytest.mark.parity
def test_the_books_model():
    """q, k and v in another order, an untied head that is tied, a missing bias, exact GELU."""
    ours, idx = make(BOOK), tokens(3, 7)
    w = {k.removeprefix("transformer."): v for k, v in ours.state_dict().items()}
    for i in range(BOOK.n_layer):
        parts = w.pop(f"h.{i}.attn.c_attn.weight").chunk(3)
        w |= {f"h.{i}.{name}.weight": part for name, part in zip("qkv", parts, strict=True)}
    w["head.weight"] = w.pop("lm_head.weight")
    assert not torch.equal(w["head.weight"], w["wte.weight"])
    torch.testing.assert_close(ours(idx)[0], book_logits(w, idx, BOOK), atol=1e-5, rtol=1e-5)


@pytest.mark.parity
def test_known_sizes():
    """The published parameter counts; a tied head counts once."""
    with torch.device("meta"):
        assert GPT(GPTConfig()).count_parameters() == 124_439_808
        book = GPTConfig(qkv_bias=False, tie_weights=False)
        assert GPT(book).count_parameters() == 163_009_536
        xl = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
        assert GPT(xl).count_parameters() == 1_557_611_200
        qwen3 = GPTConfig(vocab_size=151_936, n_layer=28, n_head=16, n_kv_head=8, head_dim=128,
                          n_embd=1024, n_inner=3072, rope_theta=1e6, rms_norm=True, swiglu=True,
                          qk_norm=True, bias=False, qkv_bias=False)
        assert GPT(qwen3).count_parameters() == 596_049_920  # Qwen3-0.6B


@pytest.mark.parity
def test_parameter_names():
    """GPT-2's names, so that published weights fit; a part that a shape lacks has none."""
    names = set(make(replace(GPT2, n_layer=1)).state_dict())
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    wanted = {f"transformer.h.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    wanted |= {f"transformer.{n}" for n in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    assert names == wanted | {"lm_head.weight"}
    added = {f"transformer.h.0.{n}.weight" for n in ("attn.q_norm", "attn.k_norm", "mlp.c_gate")}
    kept = {name for name in names if not name.endswith("bias")} - {"transformer.wpe.weight"}
    assert set(make(replace(QWEN3, n_layer=1)).state_dict()) == kept | added


@pytest.mark.parity
def test_starting_weights():
    """Wrong init is quiet: the Verdict recipe then ends at another loss."""
    torch.manual_seed(0)
    size = dict(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128)
    gpt2, own = GPT(GPTConfig(**size)), GPT(GPTConfig(**size, init="torch", tie_weights=False))
    for name, p in gpt2.named_parameters():
        if p.dim() == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < std / 20, name
    for name, p in own.named_parameters():
        if "wte" in name or "wpe" in name:
            assert abs(p.std() - 1) < 0.05, name
        elif p.dim() == 2:  # uniform within 1 / sqrt(inputs)
            bound = 1 / math.sqrt(p.size(1))
            assert 0.95 * bound < p.abs().max() <= bound, name
            assert abs(p.std() - bound / math.sqrt(3)) < 0.05 * bound, name
        elif name.endswith("bias") and "ln_" not in name:
            assert p.abs().max() > 0, name
    idx = tokens(3, 64, vocab_size=500)
    for gpt in (gpt2, own):
        assert abs(gpt(idx, idx.roll(1))[1] - math.log(500)) < 0.3


@pytest.mark.parity
@pytest.mark.parametrize(("change", "least"), [
    ({}, 0.07), (dict(embd_norm=True, n_head=1, n_kv_head=1, head_dim=96, rope_theta=1e4), 0.7),
    (dict(rms_norm=False, qk_norm=False, tie_weights=False), 0.7)])
def test_local_heads(monkeypatch, change, least):
    """Heads that begin elsewhere would only train more slowly."""
    weights = []

    def attention(q, k, v, **_):
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = q @ k.mT / math.sqrt(q.size(-1))
        weights.append(scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -1e9).softmax(-1))
        return weights[-1] @ v.repeat_interleave(q.size(1) // v.size(1), dim=1)

    monkeypatch.setattr(model, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=6, n_kv_head=3, n_embd=192, head_dim=32, block_size=128)
    gpt = GPT(replace(QWEN3, **shape | change, vocab_size=500, init="local"))
    heads = gpt.config.n_head
    half = torch.stack([torch.randperm(500)[:64] for _ in range(2)])
    idx = torch.cat((half, half), dim=1)  # the second half repeats the first
    logits = gpt(idx)[0][:, :-1]
    losses = F.cross_entropy(logits.mT, idx[:, 1:], reduction="none")  # (B, T - 1)
    assert losses[:, :63].mean() < math.log(500) + 0.5  # 26 where a tied head repeats its input
    assert losses[:, 64:].mean() < losses[:, :63].mean() - 0.05
    size = 2 if gpt.config.tie_weights else 10  # beside GPT-2's 0.02, in two parts
    assert abs(gpt.transformer.wte.weight.std() / (0.02 * 2**0.5 * size) - 1) < 0.1
    written = gpt.transformer.h[0].attn.c_proj.weight[:, : gpt.config.head_dim]
    size = 1 if gpt.config.embd_norm else 0.02 * 2**0.5 * size
    assert abs(written.std() * gpt.config.head_dim**0.5 / size - 1) < 0.1
    first, second = (w[:, :, 16:].mean(0) for w in weights)  # (heads, T, T)
    for head in range(heads):
        seen = [first[head].diagonal(16 - d, -2, -1).mean() for d in range(8)]
        if head < 4:
            assert max(range(8), key=seen.__getitem__) == head + 1 and seen[head + 1] > 0.2
        else:
            assert max(seen) < 0.1
    after = [second[head, 48:].diagonal(1).mean() for head in range(heads)]
    assert after[0] > least and all(seen < 0.02 for seen in after[1:])
    GPT(replace(gpt.config, n_layer=1))  # which has no second layer
    torch.set_default_dtype(torch.bfloat16)  # in which PyTorch has no QR decomposition
    try:
        GPT(gpt.config)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rotation():
    """Pair i of position t turns by t * theta^(-2i / hs): a complex number times e^(i angle)."""
    ours, x = make(LLAMA), torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *ours.rotation(torch.arange(7)))
    t, i = torch.arange(7.0).double()[:, None], torch.arange(5.0).double()
    turn = torch.exp(1j * t * 1e4 ** (-2 * i / 10))
    wanted = torch.complex(x[..., :5].double(), x[..., 5:].double()) * turn
    wanted = torch.cat((wanted.real, wanted.imag), dim=-1).float()
    torch.testing.assert_close(turned, wanted, atol=1e-5, rtol=1e-5)
    later = ours.rotation(torch.arange(3, 7))
    assert torch.equal(rotate(x[:, :, 3:], *later), turned[:, :, 3:])


# ---------------------------------------------------------------------------------------------
# every shape


def test_impossible_configurations():
    """A bare assertion, the end of a notebook's kernel, or a model that is silently another."""
    bad = [
        dict(n_layer=0), dict(vocab_size=-1), dict(block_size=0), dict(n_head=0), dict(n_embd=0),
        dict(head_dim=None, n_head=4), dict(n_kv_head=2), dict(n_kv_head=0), dict(head_dim=0),
        dict(n_layer=1.5), dict(n_embd=12.0), dict(n_inner=2.5),
        dict(n_inner=0), dict(rope_theta=1e4, head_dim=5), dict(rope_theta=0.0),
        dict(dropout=1.0), dict(dropout=-0.1), dict(dropout=math.nan), dict(init="xavier"),
        dict(init="local"),
    ]
    for change in bad:
        name, value = [*change.items()][-1]
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            replace(GPT2, **change)
    for config in SHAPES.values():  # what a checkpoint's run.json holds gives the same model
        assert GPTConfig(**asdict(config)) == config


@every_shape
def test_shapes_and_causality(shape):
    """No position sees a later one, every position sees all earlier ones, rows are apart."""
    ours, idx = make(SHAPES[shape]), tokens(3, 7)
    logits, loss = ours(idx)
    assert logits.shape == (3, 7, 13) and loss is None
    changed = idx.clone()
    changed[1, 4] = (changed[1, 4] + 1) % 13
    difference = (ours(changed)[0] - logits).abs().amax(-1)
    assert (difference[1, 4:] > 1e-4).all() and difference[1, :4].max() < 1e-5
    assert difference[[0, 2]].max() < 1e-5
    for length in (1, 5):
        torch.testing.assert_close(ours(idx[:, :length])[0], logits[:, :length], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="8 tokens exceed block_size 7"):
        ours(tokens(1, 8))


@every_shape
def test_loss(shape):
    """The mean over the targets that count; without logits the same value and gradients."""
    ours, idx, targets = make(SHAPES[shape]).train(), tokens(3, 7), tokens(3, 7, seed=2)
    targets[0, 3:] = targets[2, :2] = -100
    logits, loss = ours(idx, targets)
    kept = targets != -100
    nats = -logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None])
    torch.testing.assert_close(loss, nats.mean())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    nothing, again = ours(idx, targets, return_logits=False)
    again.backward()
    assert nothing is None
    torch.testing.assert_close(again, loss)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=lambda m, name=name: f"{name}: {m}")
        assert p.grad.abs().sum() > 0, name


@every_shape
def test_dropout(shape):
    """Dropout may take another path through attention: with nothing dropped it is the same model,
    in eval mode there is none, and what is dropped stays causal."""
    idx, targets = tokens(3, 7), tokens(3, 7, seed=2)
    plain, almost, dropping = (make(replace(SHAPES[shape], dropout=p)) for p in (0, 1e-9, 0.2))
    torch.testing.assert_close(dropping(idx)[0], plain(idx)[0])
    for gpt in (plain, almost, dropping):
        gpt.train()(idx, targets)[1].backward()
    torch.testing.assert_close(almost(idx)[0], plain(idx)[0], atol=1e-4, rtol=1e-4)
    for (name, p), q in zip(almost.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert all(p.grad.abs().sum() > 0 for p in dropping.parameters())
    again = []
    for changed in (idx, torch.cat((idx[:, :5], tokens(3, 2, seed=3)), dim=1)):
        torch.manual_seed(0)
        again.append(dropping(changed)[0])
    torch.testing.assert_close(again[0][:, :5], again[1][:, :5])
    assert not torch.allclose(again[0][:, :5], plain(idx)[0][:, :5])


@every_shape
@pytest.mark.filterwarnings("error:Mismatch dtype")  # RMSNorm's fused kernel would not be used
def test_autocast(shape):
    """bf16 products change the logits little, and neither norms nor residuals fail on dtypes."""
    ours, idx = make(SHAPES[shape], spread=0.1), tokens(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(6)(torch.ones(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
        logits, loss = ours(idx, idx)
        loss.backward()
    assert loss.dtype == torch.float32
    assert (logits - ours(idx)[0]).norm() < 0.05 * ours(idx)[0].norm()


# ---------------------------------------------------------------------------------------------
# alone

ALONE = """
import sys
import torch
import model
assert "fast" not in sys.modules
results = {}
for shape, (config, state, idx, targets) in torch.load("in.pt", weights_only=False).items():
    gpt = model.GPT(model.GPTConfig(**config)).eval()
    gpt.load_state_dict(state)
    logits, loss = gpt(idx, targets)
    loss.backward()
    results[shape] = [logits, loss, *(p.grad for p in gpt.parameters())]
    with torch.no_grad():
        results[shape].append(gpt(idx[:1, :1])[0])
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(**config | {"dropout": 0.1}))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        losses.append(gpt(idx, targets)[1])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1, (shape, losses[0], losses[-1])
torch.save(results, "out.pt")
"""


def test_alone_in_an_empty_folder(tmp_path):
    """model.py needs no other file, and without fast.py it computes the same and trains."""
    shutil.copy(ROOT / "model.py", tmp_path)
    (tmp_path / "script.py").write_text(ALONE, encoding="utf-8")
    given, wanted = {}, {}
    for shape, config in SHAPES.items():
        ours, idx, targets = make(config), tokens(3, 7), tokens(3, 7, seed=2)
        given[shape] = (asdict(config), ours.state_dict(), idx, targets)
        logits, loss = ours(idx, targets)
        loss.backward()
        wanted[shape] = [logits, loss, *(p.grad for p in ours.parameters())]
        with torch.no_grad():
            wanted[shape].append(ours(idx[:1, :1])[0])  # one row: fast.Linear's other way
    torch.save(given, tmp_path / "in.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "out.pt")
    for shape, tensors in wanted.items():
        for mine, theirs in zip(tensors, results[shape], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=shape)
    assert F.dropout is not sys.modules["model"].dropout  # here the stand-ins were in use


def test_import_is_light():
    """`import model` once brought a command line parser, file locks and its type checker."""
    code = "import sys, model; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    heavy = {"tyro", "filelock", "transformers", "safetensors", "accelerate", "tokenizers"}
    assert done.returncode == 0 and "fast" in done.stdout.split(), done.stderr
    assert not heavy & {*done.stdout.split()}
