"""model.py: against transformers, the book, written-out formulas, exhaustive search."""

import itertools
import json
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from conftest import needs_gpt2, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F

import model as model_module
import runtime
from model import GPT, GPTConfig, KVCache, export, next_probabilities, sample_token

TINY = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
BOOK = replace(TINY, qkv_bias=False, tie_weights=False, init="torch")  # the book's model
VARIANTS = {"gpt2": TINY, "book": BOOK, "bare": replace(TINY, bias=False, qkv_bias=False)}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads make these tiny models slower, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(config=TINY, seed=0, spread=0.3):
    """A GPT in eval mode whose weights, biases included, are far from zero."""
    torch.manual_seed(seed)
    gpt = GPT(config)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=spread)
    return gpt.eval()


def tokens(rows, length, seed=1, config=TINY):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)


# ---------------------------------------------------------------------------------------------
# against other models


@pytest.fixture
def refuses(capsys):
    """As fails, for from_pretrained: transformers' own bars may stand before the line."""

    def refuses(folder, *words, code=1):
        with pytest.raises(SystemExit) as stop:
            GPT.from_pretrained(str(folder))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == code and not any("Traceback" in line for line in lines)
        one_line(lines[-1], *words)

    return refuses


def twin(**changes):
    """A tiny random GPT-2 of transformers, biases too, in eval mode."""
    torch.manual_seed(3)
    size = dict(vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    ids = dict(bos_token_id=None, eos_token_id=None)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size | ids | changes))
    for p in hf.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return hf.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_weights_come_in(tmp_path, tied):
    """A transposed matrix, another GELU or another LayerNorm epsilon would differ here."""
    hf = twin(tie_word_embeddings=tied)
    hf.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path)), tokens(3, 8)
    assert ours.config.tie_weights == tied and not ours.training
    torch.testing.assert_close(ours(idx)[0], hf(idx).logits, atol=1e-5, rtol=0)
    ours.to_hf(tmp_path / "back")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == hf.state_dict().keys()
    assert all(torch.equal(v, back[k]) for k, v in hf.state_dict().items())


def test_weights_without_a_head_come_in(tmp_path):
    """The hub's gpt2 is such a folder: its names lack the prefix, and the head is tied."""
    hf, idx = twin(), tokens(3, 8)
    hf.transformer.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), dropout=0.1)
    torch.testing.assert_close(ours(idx)[0], hf(idx).logits, atol=1e-5, rtol=0)
    assert ours.config.dropout == 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_go_out_and_come_back(tmp_path, name):
    """Biases that a model lacks must become zeros, an untied head must stay untied."""
    ours, idx = make(VARIANTS[name]), tokens(3, 8)
    hf = ours.to_hf(tmp_path)
    torch.testing.assert_close(hf(idx).logits, ours(idx)[0], atol=1e-5, rtol=0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(idx).logits, ours(idx)[0], atol=1e-5, rtol=0)
    back = GPT.from_pretrained(str(tmp_path)).state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, back[key]), key
    added = back.keys() - ours.state_dict().keys()
    assert all(key.endswith("bias") and not back[key].any() for key in added)


def test_a_model_we_cannot_express_is_refused(tmp_path, refuses):
    """GPT-2 relatives load without a word in transformers and would compute something else."""
    others = [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-3),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("n_inner", 20),
    ]
    for i, (key, value) in enumerate(others):
        twin(**{key: value}).save_pretrained(tmp_path / str(i))
        refuses(tmp_path / str(i), key)
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    refuses(tmp_path / "bert", "bert")
    hf = twin()
    del hf.transformer.h[1].mlp.c_fc.bias
    hf.save_pretrained(tmp_path / "part")
    refuses(tmp_path / "part", "c_fc.bias")
    refuses(tmp_path / "none", "none", "gpt2-xl", code=2)
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "empty")


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


def test_the_books_model():
    """q, k and v in another order, an untied head that is tied, a missing bias, exact GELU."""
    ours, idx = make(BOOK), tokens(3, 8)
    w = {k.removeprefix("transformer."): v for k, v in ours.state_dict().items()}
    for i in range(BOOK.n_layer):
        parts = w.pop(f"h.{i}.attn.c_attn.weight").chunk(3)
        w |= {f"h.{i}.{name}.weight": part for name, part in zip("qkv", parts, strict=True)}
    w["head.weight"] = w.pop("lm_head.weight")
    assert not torch.equal(w["head.weight"], w["wte.weight"])
    torch.testing.assert_close(ours(idx)[0], book_logits(w, idx, BOOK), atol=1e-5, rtol=1e-5)


def test_known_sizes():
    """GPT-2's and the book's published parameter counts; a tied head counts once."""
    with torch.device("meta"):
        assert GPT(GPTConfig()).count_parameters() == 124_439_808
        book = GPTConfig(block_size=1024, qkv_bias=False, tie_weights=False)
        assert GPT(book).count_parameters() == 163_009_536
        xl = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
        assert GPT(xl).count_parameters() == 1_557_611_200


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
    idx = tokens(4, 64, config=gpt2.config)
    for gpt in (gpt2, own):
        assert abs(gpt(idx, idx.roll(1))[1] - math.log(500)) < 0.3


def test_bad_configurations_are_one_line(fails):
    """A bare assertion, or a model that is silently something else."""
    bad = [
        dict(n_layer=0), dict(vocab_size=-1), dict(block_size=0), dict(n_head=3), dict(n_head=0),
        dict(dropout=1.0), dict(dropout=-0.1), dict(dropout=math.nan), dict(init="xavier"),
    ]  # fmt: skip
    for change in bad:
        fails(2, lambda c=change: GPT(replace(TINY, **c)), f"--{[*change][0]}")


# ---------------------------------------------------------------------------------------------
# loss, dropout


@pytest.mark.parametrize("name", VARIANTS)
def test_loss(name):
    """return_logits=False may take another way to the loss: same value, same gradients."""
    ours, idx, targets = make(VARIANTS[name]).train(), tokens(3, 8), tokens(3, 8, seed=2)
    targets[0, 3:] = targets[2, :2] = -100
    logits, loss = ours(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(-1, 13), targets.view(-1)))
    kept = targets != -100
    nats = -logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None])
    torch.testing.assert_close(loss, nats.mean())
    loss.backward()
    first = {k: p.grad.clone() for k, p in ours.named_parameters()}
    ours.zero_grad()
    nothing, again = ours(idx, targets, return_logits=False)
    again.backward()
    assert nothing is None
    torch.testing.assert_close(again, loss)
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, first[key], msg=lambda m, key=key: f"{key}: {m}")
    assert ours(idx)[1] is None
    with pytest.raises(ValueError, match="block_size 8"):
        ours(tokens(1, 9))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(p, dtype):
    """The faster dropout of the CPU: its rate, its mean, its gradient, any shape."""
    torch.manual_seed(0)
    x = (torch.rand(3, 333, 335) + 1).to(dtype).requires_grad_()
    y = model_module.dropout(x, p, True)
    assert y.shape == x.shape and y.dtype == dtype
    dropped = y == 0
    assert abs(dropped.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / x.numel()) + 1e-5
    torch.testing.assert_close(y[~dropped], (x / (1 - p))[~dropped], atol=0, rtol=0.02)
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped)
    torch.testing.assert_close(y, x * x.grad)
    assert torch.equal(model_module.dropout(x, p, False), x)
    if p == 0.5:
        neighbours = (dropped[..., 1:] == dropped[..., :-1]).float().mean()
        assert abs(neighbours - 0.5) < 0.01  # the bits are cut out of one number: still unrelated
        assert not torch.equal(model_module.dropout(x, p, True) == 0, dropped)


def test_attention_with_and_without_dropout():
    """Dropout takes another path through attention: with nothing dropped it is the same model."""
    idx, targets = tokens(3, 8), tokens(3, 8, seed=2)
    plain, almost, dropping = (make(replace(TINY, dropout=p)).train() for p in (0, 1e-9, 0.2))
    assert torch.equal(plain(idx)[0], plain.eval()(idx)[0])
    torch.testing.assert_close(almost(idx)[0], plain(idx)[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dropping(idx)[0], plain(idx)[0])
    assert torch.equal(dropping.eval()(idx)[0], plain(idx)[0])
    for gpt in (plain.train(), almost):
        gpt(idx, targets)[1].backward()
    for (key, p), q in zip(almost.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=key)
    dropping.train()(idx, targets)[1].backward()
    assert all(p.grad.abs().sum() > 0 for p in dropping.parameters())
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 13
    for gpt in (plain, almost):  # no position sees a later one
        torch.testing.assert_close(gpt(changed)[0][:, :5], gpt(idx)[0][:, :5])
        assert not torch.allclose(gpt(changed)[0][:, 5:], gpt(idx)[0][:, 5:])


# ---------------------------------------------------------------------------------------------
# KV cache


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", range(1, 12))
def test_cache_changes_nothing(name, rows, length):
    """Positions, the causal mask and the slide past block_size are each easy to get wrong; one
    row takes another way through a Linear than several."""
    ours, idx = make(VARIANTS[name]), tokens(rows, 14)
    cache = KVCache(ours, rows, 14)
    for end in range(length, 15):
        cached, plain = ours.next_logits(idx[:, :end], cache), ours.next_logits(idx[:, :end])
        torch.testing.assert_close(cached, plain, atol=1e-4, rtol=0)
        torch.testing.assert_close(plain, ours(idx[:, max(0, end - 8) : end])[0][:, -1])


@pytest.mark.parametrize("chunks", [(1, 3, 4), (3, 2, 3), (7, 1), (2, 2, 2, 2), (8,)])
def test_cache_filled_in_chunks(chunks):
    """Several tokens after a filled cache need a mask of their own."""
    ours, idx = make(), tokens(3, 8)
    cache, parts, end = KVCache(ours, 3, 8), [], 0
    for size in chunks:
        parts.append(ours.lm_head(ours.hidden(idx[:, end : end + size], cache, end)))
        end += size
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(idx)[0], atol=1e-4, rtol=0)


def test_cache_with_the_position_in_a_tensor():
    """What a CUDA graph records: no place of it may depend on a number that Python saw once."""
    ours, idx, place = make(), tokens(3, 8), torch.tensor([4])
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    cache = KVCache(ours, 3, 8)
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        ours.hidden(idx[:, :4], cache)
        for end in range(4, 8):
            step = ours.lm_head(ours.hidden(idx[:, end : end + 1], cache, place.fill_(end)))
            plain = ours(idx[:, : end + 1])[0]
            torch.testing.assert_close(step[:, -1], plain[:, -1], atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_cuda_graph(kind):
    """A graph replayed past block_size, for rows, beams and a second prompt; and two graphs whose
    texts grow in turns must not write into each other's memory."""
    ours = make().cuda() if kind == "fp32" else model_module.pack(make().cuda(), kind)
    for rows, how in ((1, dict(temperature=0)), (3, dict(top_k=5)), (3, dict(num_beams=3))):
        for length in (1, 5):
            idx = tokens(rows, length).cuda()
            draws = [torch.Generator("cuda").manual_seed(1) for _ in range(2)]
            texts = [
                ours.generate(idx, 12, kv_cache=on, generator=draw, **how)
                for on, draw in zip((True, False), draws, strict=True)
            ]
            assert kind != "fp32" or torch.equal(*texts)
            assert texts[0].shape == (rows, length + 12)
    a, b = ours.stream(idx, 6, 0), ours.stream(idx.flip(1), 6, 0)
    mixed = [torch.cat(x, 1) for x in zip(*zip(a, b, strict=True), strict=True)]
    alone = [ours.generate(x, 6, 0)[:, length:] for x in (idx, idx.flip(1))]
    assert all(map(torch.equal, mixed, alone))


@pytest.mark.parametrize("how", [dict(temperature=0), dict(top_k=5), dict(num_beams=3)])
def test_generate_with_and_without_cache(how):
    """Past block_size too, and beams that change places must take their cache along."""
    ours, idx = make(), tokens(3, 5)
    texts = [
        ours.generate(idx, 12, kv_cache=on, generator=torch.Generator().manual_seed(1), **how)
        for on in (True, False)
    ]
    assert torch.equal(*texts) and texts[0].shape == (3, 17)
    assert torch.equal(texts[0][:, :5], idx)


@pytest.mark.parametrize("kind, error, share", [("bf16", 0.02, 0.5), ("int8", 0.03, 0.3)])
def test_packed_weights(kind, error, share):
    """A scale on the wrong side would be noise; embeddings must stay as they are."""
    config = replace(TINY, n_embd=64, vocab_size=50, n_layer=3)
    ours, packed, idx = make(config, spread=0.1), make(config, spread=0.1), tokens(3, 8)
    model_module.pack(packed, kind)
    a, b = ours(idx)[0], packed(idx)[0]
    assert 0 < (a - b).norm() / a.norm() < error
    assert torch.equal(packed.transformer.wte.weight, ours.transformer.wte.weight)

    def size(gpt):
        state = gpt.transformer.h.state_dict()
        return sum(v.nbytes for k, v in state.items() if "c_" in k and not k.endswith("bias"))

    assert size(packed) <= size(ours) * share
    text = packed.generate(idx[:1], 12, temperature=0)
    assert torch.equal(text, packed.generate(idx[:1], 12, temperature=0, kv_cache=False))


# ---------------------------------------------------------------------------------------------
# sampling


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    temperature=st.one_of(st.floats(1e-300, 1e6), st.sampled_from([1e-45, 1e-38, 0.01, 1.0])),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
)
def test_probabilities(logits, temperature, top_k, top_p):
    """Overflow at tiny temperatures, ties past top_k, an empty set at tiny top_p."""
    logits = torch.tensor([logits])
    p = next_probabilities(logits, temperature, top_k, top_p)[0].double()
    assert (p >= 0).all() and abs(p.sum() - 1) < 1e-5
    kept = p > 0
    scaled = (logits[0].double() - logits.max().double()) / max(temperature, 1e-30)
    true = scaled.softmax(-1)
    assert true[kept].max() >= true.max() * (1 - 1e-6)
    if top_k is not None:
        assert kept.sum() <= top_k
        true = torch.zeros_like(true).scatter(0, (t := true.topk(min(top_k, len(true)))).indices,
                                              t.values)  # fmt: skip
        true /= true.sum()
    if top_p is None:
        assert (kept.sum() == min(top_k or len(p), len(p))) or (true.sort().values[0] < 1e-30)
        torch.testing.assert_close(p.sort().values, true.sort().values, atol=1e-5, rtol=1e-3)
        return
    ordered = true.sort(descending=True).values
    n = int(kept.sum())  # the smallest set: it reaches top_p, one fewer does not
    assert ordered[:n].sum() >= top_p - 1e-5
    assert ordered[: n - 1].sum() < top_p + 1e-5
    if (~kept).any():
        assert true[kept].min() >= true[~kept].max() * (1 - 1e-6) - 1e-7


def test_draws_follow_the_probabilities():
    """The right probabilities do not help where the draw ignores them."""
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    p = next_probabilities(logits, 0.7, 4, 0.95)
    generator = torch.Generator().manual_seed(1)
    many = sample_token(logits.expand(20_000, -1), 0.7, 4, 0.95, generator)
    counted = torch.bincount(many.flatten(), minlength=6) / 20_000
    torch.testing.assert_close(counted, p[0], atol=0.015, rtol=0)
    assert torch.equal(counted > 0, p[0] > 0) and (p > 0).sum() <= 4
    assert torch.equal(next_probabilities(logits, top_k=99), next_probabilities(logits))
    assert torch.equal(next_probabilities(logits, top_p=1.0), next_probabilities(logits))


def test_greedy_three_ways():
    """top_k=1, temperature 0 and one beam are one thing."""
    ours, idx = make(), tokens(4, 3)
    greedy = ours.generate(idx, 12, temperature=0)
    assert torch.equal(greedy, ours.generate(idx, 12, top_k=1))
    assert torch.equal(greedy, ours.generate(idx, 12, temperature=1e-40))
    assert torch.equal(greedy, ours.generate(idx, 12, top_p=1e-9))
    assert torch.equal(greedy, ours.generate(idx, 12, num_beams=1, temperature=0))
    assert torch.equal(greedy, ours.beam_search(idx, 12, 1)[0])


def test_the_same_seed_gives_the_same_text():
    """Sampling has its own generator: training's random state stays where it was."""
    ours, idx, before = make(), tokens(2, 3), torch.get_rng_state()

    def text(seed):
        return ours.generate(idx, 20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(text(1), text(1)) and not torch.equal(text(1), text(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_row_ends_at_its_own_end(monkeypatch):
    """One row's end must neither stop the others nor let its own row go on."""
    eos, script = 0, torch.tensor([[5, 0, 7, 7, 7, 7], [3, 4, 6, 0, 7, 7]])
    ours, idx = make(), tokens(2, 3)

    def scripted(idx, cache=None):
        return F.one_hot(script[:, idx.size(1) - 3], 13).float() * 50

    monkeypatch.setattr(ours, "next_logits", scripted)
    for how in (dict(temperature=0), dict(temperature=1.0)):
        made = ours.generate(idx, 6, eos_id=eos, **how)[:, 3:]
        assert made.tolist() == [[5, 0, 0, 0], [3, 4, 6, 0]]
    assert ours.generate(idx, 6, temperature=0)[:, 3:].tolist() == script.tolist()
    assert ours.generate(idx, 0).tolist() == idx.tolist()


# ---------------------------------------------------------------------------------------------
# beams


def log_probabilities(ours, rows, start, eos=None):
    """Summed log-probability of each rows[i, start:] up to its first eos, by plain forwards."""
    total = torch.zeros(len(rows))
    for t in range(start, rows.size(1)):
        window = rows[:, max(0, t - ours.config.block_size) : t]
        step = ours(window)[0][:, -1].log_softmax(-1).gather(1, rows[:, t : t + 1])[:, 0]
        ended = (rows[:, start:t] == eos).any(1) if eos is not None else False
        total += step.detach() * torch.as_tensor(ended).logical_not()
    return total


@pytest.mark.parametrize("eos", [None, 2])
def test_beam_search(eos):
    """Its score is the text's log-probability, never below greedy's; with room for all it is
    the best there is."""
    config = replace(TINY, vocab_size=4, block_size=4)
    every = torch.tensor([*itertools.product(range(4), repeat=4)])
    for seed in range(3):
        ours, idx = make(config, seed, spread=0.5), tokens(2, 2, seed=seed, config=config)
        greedy = ours.generate(idx, 4, temperature=0, eos_id=eos)
        for beams in (1, 2, 4, 4**4 + 9):
            out, score = ours.beam_search(idx, 4, beams, eos)
            torch.testing.assert_close(log_probabilities(ours, out, 2, eos), score)
            assert (score >= log_probabilities(ours, greedy, 2, eos) - 1e-5).all()
        for prompt, value in zip(idx, score, strict=True):
            rows = torch.cat((prompt.expand(len(every), -1), every), dim=1)
            assert abs(log_probabilities(ours, rows, 2, eos).max() - value) < 1e-4


def test_four_beams_beat_greedy_somewhere():
    """A search that always returned the greedy text would pass the test above."""
    config, gains = replace(TINY, vocab_size=30), []
    for seed in range(5):
        ours, idx = make(config, seed), tokens(3, 3, seed=seed)
        _, one = ours.beam_search(idx, 8, 1)
        _, four = ours.beam_search(idx, 8, 4)
        assert (four >= one - 1e-5).all()
        gains.append((four - one).max().item())
    assert max(gains) > 0.01


# ---------------------------------------------------------------------------------------------
# strangers' files


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def checkpoint(folder, config=TINY, tokenizer=None, name="tokenizer.json", eot_id=0, seed=0):
    """A checkpoint folder as train.py writes it; returns its model."""
    gpt, final = make(config, seed), folder
    folder = final.with_name(".tmp-making")
    folder.mkdir(parents=True)
    state = {k: v for k, v in gpt.state_dict().items()}
    if config.tie_weights:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    info = {"model": asdict(config), "train": {"dataset": "mine", "init_from": "scratch"}}
    info |= {"iter": 1234, "train_loss": 1.25, "val_loss": 2.5}
    (folder / "config.json").write_text(json.dumps(info), encoding="utf-8")
    meta = {"tokenizer": name, "vocab_size": config.vocab_size, "eot_id": eot_id}
    meta |= {"train_tokens": 98765, "val_tokens": 4321, "source": "/home/somebody/secret/book.txt"}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    runtime.seal_folder(folder, final)
    return gpt


def test_no_pickle_is_ever_run(tmp_path, fails, refuses):
    """Weights from a stranger are data. Each of these files runs code where it is unpickled."""
    mark = tmp_path / "executed"
    torch.save({"lm_head.weight": Evil(mark)}, tmp_path / "evil.bin")
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # the trap works
    mark.unlink()
    evils = {"pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()}
    evils |= {name: pickle.dumps(Evil(mark)) for name in ("model.safetensors", "config.json")}
    for name, content in evils.items():
        folder = tmp_path / f"hf-{name}"
        twin().save_pretrained(folder)
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
        refuses(folder, "cannot load")
        if name != "pytorch_model.bin":
            folder = tmp_path / f"run-{name}"
            checkpoint(folder)
            (folder / name).write_bytes(content)
            fails(1, lambda folder=folder: GPT.from_checkpoint(folder), str(folder))
        assert not mark.exists(), name


def test_no_code_named_by_a_config_is_run(tmp_path):
    """transformers can fetch model code and kernels that a config.json names."""
    mark, folder = tmp_path / "executed", tmp_path / "hf"
    twin().save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nGPT2LMHeadModel = 1\n")
    said = json.loads((folder / "config.json").read_text())
    said["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.GPT2LMHeadModel")
    said["attn_implementation"] = said["_attn_implementation"] = "somebody/kernel"
    (folder / "config.json").write_text(json.dumps(said))
    idx = tokens(2, 8)
    ours = GPT.from_pretrained(str(folder))
    torch.testing.assert_close(ours(idx)[0], twin()(idx).logits, atol=1e-5, rtol=0)
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------
# export


def byte_tokenizer():
    """A byte-level tokenizer of 257 tokens whose post-processor would add one to every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", *alphabet])}
    engine = Tokenizer(models.BPE(vocabulary, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    engine.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return engine


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{variant: (our model, exported folder)} of three byte-level models."""
    root, made = tmp_path_factory.mktemp("export"), {}
    for name, config in VARIANTS.items():
        config = replace(config, vocab_size=257, block_size=32)
        run = root / name
        checkpoint(run / "checkpoint-000010", config, byte_tokenizer(), seed=1)
        made[name] = (checkpoint(run / "checkpoint-000020", config, byte_tokenizer()), root / "out")
        made[name] = (made[name][0], root / f"out-{name}")
        export(run, made[name][1])
    return made


TEXTS = ["", "Every effort moves", " ə ğ ı ö ş ç\r\n\t\ufeff 🙂 I'll", "a<|endoftext|>b", "\x00"]


@pytest.mark.parametrize("name", VARIANTS)
def test_export_is_a_transformers_folder(exported, name):
    """Equal logits and token ids, or somebody serves another model than was trained."""
    ours, folder = exported[name]
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    engine = byte_tokenizer()
    engine.encode_special_tokens = True
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == engine.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    idx = torch.tensor([tokenizer("Every effort")["input_ids"]])
    torch.testing.assert_close(hf(idx).logits, ours(idx)[0], atol=1e-5, rtol=0)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 has no other
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == hf.config.eos_token_id == 0
    greedy = ours.generate(idx, 20, temperature=0, eos_id=0)
    assert hf.generate(idx, do_sample=False).tolist()[0] == greedy.tolist()[0]
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    text = pipe("Every effort", do_sample=False)[0]["generated_text"]  # stops at 32 tokens
    assert text == tokenizer.decode(greedy[0], skip_special_tokens=True)
    assert pipe("ə")[0]["generated_text"].startswith("ə")


def test_model_card(exported):
    """The figures of the newest checkpoint, and nothing of the machine it was made on."""
    ours, folder = exported["gpt2"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for figure in ("1,234", "1.25", "2.5", "98,765", "mine", "book.txt", "library_name"):
        assert figure in card
    assert f"{ours.count_parameters():,}" in card and "somebody" not in card
    assert runtime.damage(folder) is None


def check_tiktoken_export(source, folder):
    """Export a model with the vocabulary `source`; AutoTokenizer must give its ids, on any text."""
    config = replace(TINY, vocab_size=source.n_vocab, n_embd=8)
    checkpoint(folder / "run", config, name=source.name, eot_id=source.eot_token)
    export(folder / "run", folder / "out")
    ours = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert len(ours) == source.n_vocab and ours.eos_token_id == source.eot_token

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=40) | st.text("hello' sl1\n\r\t.,ə🙂<|>", max_size=40))
    def same_ids(text):
        ids = source.encode(text, disallowed_special=())
        assert ours(text)["input_ids"] == ids and ours.decode(ids) == text

    code = Path(__file__).read_text(encoding="utf-8")
    for text in [*TEXTS, code, "x" * 50, "3141592653", "  \n\n\t  \n", "Zoë's 世界 Ω≈ç√ ไทย हिन्दी"]:
        same_ids.hypothesis.inner_test(text)
    same_ids()


@needs_gpt2
def test_export_of_the_gpt2_vocabulary(tmp_path):
    """Rebuilt from the ranks: a merge out of order shows here."""
    check_tiktoken_export(tiktoken.get_encoding("gpt2"), tmp_path)


def test_export_of_a_vocabulary_with_gaps(tmp_path, monkeypatch):
    """As p50k_base and cl100k_base have: a special token in the middle, ids that nobody has."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"he": 256, b"ll": 257, b"hell": 259, b"hello": 261, b" s": 262}
    special = {"<|endoftext|>": 258, "<|endofprompt|>": 266}
    source = tiktoken.Encoding(
        "holes", pat_str=r"\s?\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"holes": source}[name])
    check_tiktoken_export(source, tmp_path)


def test_ctranslate2_takes_the_export(exported, tmp_path):
    """A runtime that knows nothing of us: greedy text must agree."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2 to run this")
    for name, (ours, folder) in exported.items():
        out = tmp_path / name
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out))
        generator = ctranslate2.Generator(str(out), device="cpu", compute_type="float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("Every effort moves")["input_ids"]
        result = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids)], max_length=12, sampling_topk=1, beam_size=1,
            include_prompt_in_result=False,
        )  # fmt: skip
        greedy = ours.generate(torch.tensor([ids]), 12, temperature=0, eos_id=0)[0, len(ids) :]
        end = greedy.tolist().index(0) if 0 in greedy else None
        assert result[0].sequences_ids[0] == greedy.tolist()[:end], name


def test_export_command(tmp_path, fails, run):
    """Wrong calls are one line, and leave what is there alone."""
    checkpoint(tmp_path / "run" / "best", replace(TINY, vocab_size=257), byte_tokenizer())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    best = tmp_path / "run" / "best"
    fails(1, lambda: export(tmp_path / "no", tmp_path / "x"), "no", "neither")
    fails(1, lambda: export(tmp_path / "run", tmp_path / "x"), "neither")
    fails(1, lambda: export(best, tmp_path / "full"), "not empty")
    (best / "meta.json").rename(tmp_path / "meta.json")
    fails(1, lambda: export(best, tmp_path / "x"), "meta.json")
    (tmp_path / "meta.json").rename(best / "meta.json")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "x").exists()

    (tmp_path / "x").mkdir()  # an empty folder is fine
    done = run("model.py", "export", "run/best", "x")
    assert done.returncode == 0 and done.stdout.startswith("run/best -> "), done.stderr
    assert (tmp_path / "x" / "model.safetensors").exists()
    for words in ([], ["export", "run/best"], ["import", "run/best", "y"]):
        wrong = run("model.py", *words)
        assert wrong.returncode == 2 and wrong.stderr.startswith("error: usage: python model.py")
    assert run("model.py", "--help").returncode == 0
