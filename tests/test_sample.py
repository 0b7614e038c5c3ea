"""sample.py: its cache, draws and beams; checkpoints; the command line, on runs made here."""

import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import ROOT, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_model
from test_model import GPT2, LLAMA, QWEN3, make, tokens
from tokenizers import decoders, models, pre_tokenizers
from torch.nn import functional as F

import fast
import runtime
import sample
from sample import KVCache, beam_search, generate, next_logits, next_token_probabilities, stream

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}  # 1 kv head of 3, 2 of 6; block_size 7
every_family = pytest.mark.parametrize("family", FAMILIES)
HOW = {"greedy": dict(temperature=0), "drawn": dict(top_k=5), "beams": dict(num_beams=3)}


def seeded(seed=1, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


# ---------------------------------------------------------------------------------------------
# KV cache


@every_family
@pytest.mark.parametrize("rows", [1, 3])
def test_cache_changes_nothing(family, rows):
    """Positions, the causal mask and the slide past block_size are each easy to get wrong; one row
    takes another way through a Linear than several."""
    ours, idx = make(FAMILIES[family]), tokens(rows, 12)
    plain = [next_logits(ours, idx[:, :end]) for end in range(1, 13)]
    for end in (3, 7, 12):
        torch.testing.assert_close(plain[end - 1], ours(idx[:, max(0, end - 7) : end])[0][:, -1])
    for length in range(1, 11):
        cache = KVCache(ours, rows, 12)
        for end in range(length, 13):
            cached = next_logits(ours, idx[:, :end], cache)
            torch.testing.assert_close(cached, plain[end - 1], atol=1e-4, rtol=0)


@every_family
@pytest.mark.parametrize("chunks", [(1, 2, 4), (3, 2, 2), (6, 1), (2, 2, 3), (7,)])
def test_cache_filled_in_chunks(family, chunks):
    """Several tokens after a filled cache need a mask of their own."""
    ours, idx = make(FAMILIES[family]), tokens(3, 7)
    cache = KVCache(ours, 3, 7)
    for size in chunks:
        logits = next_logits(ours, idx[:, : cache.filled + size], cache)
        plain = ours(idx[:, : cache.filled])[0][:, -1]
        torch.testing.assert_close(logits, plain, atol=1e-4, rtol=0)


@every_family
def test_cache_with_the_position_in_a_tensor(family):
    """What a CUDA graph records: nothing in it may depend on a number that Python saw once."""
    ours, idx = make(FAMILIES[family]), tokens(3, 7)
    cache = KVCache(ours, 3, 7)
    next_logits(ours, idx[:, :4], cache)
    cache.graph_position = torch.tensor([4])
    for end in range(4, 7):
        cache.graph_position.fill_(end)
        with torch.no_grad():
            step = ours.lm_head(ours.hidden(idx[:, end : end + 1], cache))
        torch.testing.assert_close(step, ours(idx[:, : end + 1])[0][:, -1:], atol=1e-4, rtol=0)


@every_family
@pytest.mark.parametrize("how", HOW)
def test_generate_with_and_without_cache(family, how):
    """Past block_size too, and beams that change places must take their cache along."""
    ours = make(FAMILIES[family])
    for rows, length in ((3, 5), (1, 1), (2, 9)):
        idx = tokens(rows, length)
        texts = [generate(ours, idx, 11, kv_cache=on, generator=seeded(), **HOW[how])
                 for on in (True, False)]
        assert torch.equal(*texts) and texts[0].shape == (rows, length + 11)
        assert torch.equal(texts[0][:, :length], idx)


@pytest.mark.parametrize("kind, atol", [("bf16", 0.05), ("int8", 0.2), ("int4", 0.05)])
@every_family
def test_quantized_generation(family, kind, atol):
    """Narrow models of odd widths read past their weights; one row must equal several: in int8 up
    to the rounding of the rows."""
    for n_embd in (24, 33, 40, 50, 100):
        config = replace(FAMILIES[family], n_embd=n_embd, n_inner=n_embd + 7)
        ours = fast.quantize(make(config, spread=0.2), kind)
        idx, cache = tokens(1, 9), KVCache(ours, 1, 9)
        for end in range(3, 10):
            logits = next_logits(ours, idx[:, :end])
            for other in (next_logits(ours, idx[:, :end].expand(3, -1))[1:2],
                          next_logits(ours, idx[:, :end], cache)):
                torch.testing.assert_close(other, logits, atol=atol, rtol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@every_family
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_cuda_graph(family, kind):
    """A graph replayed past block_size, for rows, beams and a second prompt; and two graphs whose
    texts grow in turns must not write into each other's memory."""
    ours = make(FAMILIES[family]).cuda()
    if kind == "bf16":
        ours = fast.quantize(ours, kind)
    for rows, how in ((1, "greedy"), (3, "drawn"), (3, "beams")):
        for length in (1, 5):
            idx = tokens(rows, length).cuda()
            texts = [generate(ours, idx, 11, kv_cache=on, generator=seeded(1, "cuda"), **HOW[how])
                     for on in (True, False)]
            assert kind != "fp32" or torch.equal(*texts)
            assert texts[0].shape == (rows, length + 11)
    a, b = stream(ours, idx, 6, 0), stream(ours, idx.flip(1), 6, 0)
    mixed = [torch.cat(x, 1) for x in zip(*zip(a, b, strict=True), strict=True)]
    alone = [generate(ours, x, 6, 0)[:, length:] for x in (idx, idx.flip(1))]
    assert all(map(torch.equal, mixed, alone))


# ---------------------------------------------------------------------------------------------
# draws


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    temperature=st.one_of(st.floats(1e-300, 1e6), st.sampled_from([1e-45, 1e-38, 0.01, 1.0])),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
)
def test_probabilities(logits, temperature, top_k, top_p):
    """Overflow at tiny temperatures, ties past top_k, an empty set at tiny top_p."""
    logits = torch.tensor([logits])
    p = next_token_probabilities(logits, temperature, top_k, top_p)[0].double()
    assert (p >= 0).all() and abs(p.sum() - 1) < 1e-5
    kept = p > 0
    scaled = (logits[0].double() - logits.max().double()) / max(temperature, 1e-30)
    true = scaled.softmax(-1)
    assert true[kept].max() >= true.max() * (1 - 1e-6)
    if top_k is not None:
        assert kept.sum() <= top_k
        ties = true * (1 + 1e-9 * kept.double())  # those it took are higher
        best = ties.topk(min(top_k, len(true)))
        true = torch.zeros_like(true).scatter(0, best.indices, best.values / best.values.sum())
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


@pytest.mark.parametrize("options", [(1.0, None, None), (0.7, 4, 0.95), (2.0, None, 0.6)])
def test_draws_follow_the_probabilities(options):
    """The right probabilities do not help where the draw ignores them (chi-square, p = 0.001)."""
    logits = torch.randn(1, 6, generator=seeded(0))
    p = next_token_probabilities(logits, *options)[0]
    many = sample.sample_token(logits.expand(10_000, -1), *options, seeded())
    counted = torch.bincount(many.flatten(), minlength=6)
    drawn = p > 0
    assert torch.equal(counted > 0, drawn) and drawn.sum() > 1
    statistic = ((counted - 10_000 * p).square() / (10_000 * p))[drawn].sum()
    assert statistic < {2: 10.8, 3: 13.8, 4: 16.3, 5: 18.5, 6: 20.5}[int(drawn.sum())]


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_draw(monkeypatch, u):
    """The smallest and the largest random number must not give a token whose probability is 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, u))
    for size in (5, 50_000):
        logits = torch.full((1, size), -1e9)
        logits[0, 1:3] = 0.0
        assert sample.sample_token(logits).tolist() == [[1 if u == 0 else 2]]


def test_greedy_four_ways():
    """top_k=1, temperature 0 or nearly, the smallest nucleus and one beam are one thing; a top_k
    past the vocabulary and top_p 1 change nothing."""
    ours, idx = make(), tokens(3, 3)
    greedy = generate(ours, idx, 11, temperature=0)
    for how in (dict(top_k=1), dict(temperature=1e-40), dict(top_p=1e-9)):
        assert torch.equal(greedy, generate(ours, idx, 11, **how))
    assert torch.equal(greedy, beam_search(ours, idx, 11, 1)[0])
    logits = ours(idx)[0][:, -1]
    plain = next_token_probabilities(logits)
    assert torch.equal(next_token_probabilities(logits, top_k=99), plain)
    assert torch.equal(next_token_probabilities(logits, top_p=1.0), plain)


@pytest.mark.parametrize("rows", [1, 3])
def test_global_state_is_left_alone(rows):
    """Training's random state must not move, nor may gradients stay off between two tokens."""
    ours, idx = make(), tokens(rows, 3)
    state, seen = torch.get_rng_state(), []
    for new in stream(ours, idx, 12, generator=seeded()):
        seen.append(new)
        assert torch.is_grad_enabled() and not new.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    text = generate(ours, idx, 12, generator=seeded())
    assert torch.equal(text[:, 3:], torch.cat(seen, dim=1))
    assert not torch.equal(text, generate(ours, idx, 12, generator=seeded(2)))


def scripted(monkeypatch, script):
    """Make every model produce the rows of `script` (a tensor), then go on with its last column."""
    left = itertools.chain(script.T, itertools.repeat(script[:, -1]))

    def logits(model, idx, cache=None):
        rows = next(left).repeat_interleave(len(idx) // len(script))
        return F.one_hot(rows, model.config.vocab_size).float() * 100

    monkeypatch.setattr(sample, "next_logits", logits)


def test_each_row_ends_at_its_own_end(monkeypatch):
    """One row's end must neither stop the others nor let its own row go on."""
    ours, idx = make(), tokens(2, 3)
    script = torch.tensor([[5, 0, 7, 7, 7, 7], [3, 4, 6, 0, 7, 7]])
    for how in (dict(temperature=0), dict(temperature=1.0), dict(num_beams=2)):
        scripted(monkeypatch, script)
        made = generate(ours, idx, 6, eos_id=0, **how)[:, 3:]
        assert made.tolist() == [[5, 0, 0, 0], [3, 4, 6, 0]]
    scripted(monkeypatch, script)
    assert generate(ours, idx, 6, temperature=0)[:, 3:].tolist() == script.tolist()
    assert generate(ours, idx, 0).tolist() == idx.tolist()


# ---------------------------------------------------------------------------------------------
# beams


@torch.no_grad()
def log_probabilities(ours, rows, start, eos=None):
    """Summed log-probability of each rows[i, start:] up to its first eos, by plain forwards."""
    total = torch.zeros(len(rows))
    for t in range(start, rows.size(1)):
        window = rows[:, max(0, t - ours.config.block_size) : t]
        step = ours(window)[0][:, -1].log_softmax(-1).gather(1, rows[:, t : t + 1])[:, 0]
        ended = (rows[:, start:t] == eos).any(1) if eos is not None else False
        total += step * torch.as_tensor(ended).logical_not()
    return total


@every_family
@pytest.mark.parametrize("eos", [None, 2])
def test_beam_search(family, eos):
    """Its score is the text's log-probability, never below greedy's; with room for all it is
    the best there is."""
    config = replace(FAMILIES[family], vocab_size=4, block_size=4)
    every = torch.tensor([*itertools.product(range(4), repeat=4)])
    for seed in range(2):
        ours, idx = make(config, seed, spread=0.5), tokens(2, 2, seed, vocab_size=4)
        greedy = generate(ours, idx, 4, temperature=0, eos_id=eos)
        for beams in (1, 2, 4, 4**4 + 9):
            out, score = beam_search(ours, idx, 4, beams, eos)
            torch.testing.assert_close(log_probabilities(ours, out, 2, eos), score)
            assert (score >= log_probabilities(ours, greedy, 2, eos) - 1e-5).all()
        for prompt, value in zip(idx, score, strict=True):
            rows = torch.cat((prompt.expand(len(every), -1), every), dim=1)
            assert abs(log_probabilities(ours, rows, 2, eos).max() - value) < 1e-4


def test_four_beams_beat_greedy_somewhere():
    """A search that always returned the greedy text would pass the test above."""
    gains = []
    for seed in range(5):
        ours, idx = make(replace(GPT2, vocab_size=30), seed), tokens(3, 3, seed)
        gains.append(beam_search(ours, idx, 8, 4)[1] - beam_search(ours, idx, 8, 1)[1])
    assert torch.cat(gains).min() > -1e-5 and torch.cat(gains).max() > 0.01


# ---------------------------------------------------------------------------------------------
# checkpoints

LETTERS = [*"Every fotmus\nəğıöşç🙂", "<|endoftext|>"]
EOT = len(LETTERS) - 1


def letters():
    """A character tokenizer; what it lacks becomes its end-of-text token."""
    vocabulary = {c: i for i, c in enumerate(LETTERS)}
    engine = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=LETTERS[EOT]))
    engine.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens([LETTERS[EOT]])
    return engine


def byte_letters():
    """A byte-level tokenizer of 257 tokens, the first of them the end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([LETTERS[EOT], *alphabet])}
    engine = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([LETTERS[EOT]])
    return engine


def save(folder, seed=0, val_loss=2.0, engine=None, vocab_size=None, **changes):
    """A checkpoint as train.py writes it. Returns its model. `changes`: to its run.json."""
    engine = engine or letters()
    size = engine.get_vocab_size()
    config = replace(GPT2, vocab_size=vocab_size or size)
    model = make(config, seed)
    aside = folder.with_name(".tmp-making")
    aside.mkdir(parents=True)
    save_model(model, str(aside / "model.safetensors"))
    run = {"model": asdict(config), "train": {"dataset": "tiny", "sample_start": "ç"},
           "iter": 5, "val_loss": val_loss} | changes
    (aside / "run.json").write_text(json.dumps(run), encoding="utf-8")
    meta = {"tokenizer": "tokenizer.json", "vocab_size": size, "source": "text", "dtype": "uint16",
            "eot_id": engine.token_to_id(LETTERS[EOT]), "format_version": 1}
    meta |= dict.fromkeys(("train_tokens", "val_tokens", "train_bytes", "val_bytes"), 90)
    (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    engine.save(str(aside / "tokenizer.json"))
    runtime.commit_folder(aside, folder)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with out/tiny: two checkpoints and a best/ that is hardly better."""
    root = tmp_path_factory.mktemp("sample")
    save(root / "out" / "tiny" / "checkpoint-000004", 4, 2.2)
    save(root / "out" / "tiny" / "best", 4, 1.99)
    save(root / "out" / "tiny" / "checkpoint-000005", 0, 2.0)
    return root


@pytest.fixture(scope="module")
def run_dir(root):
    return root / "out" / "tiny"


@pytest.fixture
def go(run_dir, capsys):
    """go(**options) -> (texts, what was printed), in this process."""

    def go(**options):
        texts = sample.main(sample.Config(**{"out_dir": str(run_dir)} | options))
        return texts, capsys.readouterr().out

    return go


def test_a_checkpoint_is_the_model_that_was_saved(run_dir):
    """In eval mode, with its tokenizer; older runs have config.json instead of run.json."""
    model, tokenizer, saved = sample.load_checkpoint(run_dir / "best")
    assert not model.training and saved["val_loss"] == 1.99 and tokenizer.eot_id == EOT
    wanted = make(replace(GPT2, vocab_size=len(LETTERS)), 4)
    assert torch.equal(model(tokens(3, 7))[0], wanted(tokens(3, 7))[0])


def test_which_checkpoint(tmp_path, run_dir, fails, go):
    """auto is the newest unless best/ is clearly better; the rest by name."""
    for name in ("best", "checkpoint-000004", "checkpoint-000005"):
        assert name in go(max_new_tokens=1, checkpoint=name)[1].splitlines()[0]
    for name in ("auto", "newest"):
        assert "checkpoint-000005" in go(max_new_tokens=1, checkpoint=name)[1].splitlines()[0]
    save(tmp_path / "run" / "best", 1, 1.5)
    assert sample.pick_checkpoint(tmp_path / "run", "newest").name == "best"
    save(tmp_path / "run" / "checkpoint-000010", 1, 2.0)
    first, second = go(out_dir=str(tmp_path / "run"), max_new_tokens=1)[1].splitlines()[:2]
    assert {"2.000", "1.500"} < {*first.split()} and "--checkpoint=newest" in first
    assert second.endswith("best")
    assert sample.pick_checkpoint(tmp_path / "run", "newest").name == "checkpoint-000010"
    (tmp_path / "run" / "best" / "run.json").write_text("{}")  # no figure to compare
    assert sample.pick_checkpoint(tmp_path / "run").name == "checkpoint-000010"
    fails(1, lambda: sample.pick_checkpoint(run_dir, "worst"), "--checkpoint worst", "best")
    fails(1, lambda: sample.pick_checkpoint(tmp_path / "no"), "no checkpoint", "--out_dir")


def test_the_newest_run_is_the_one_saved_last(run_dir, go, monkeypatch, tmp_path):
    """By its checkpoints' time, not by name; folders of other scripts do not count."""
    for name, when in (("zebra", 1), ("ant", 3), ("mule", 2)):
        folder = tmp_path / "out" / name / "checkpoint-000001"
        shutil.copytree(run_dir / "best", folder)
        os.utime(folder, (1e9 + when,) * 2)
    (tmp_path / "out" / "empty").mkdir()
    (tmp_path / "out" / "mrpc" / "checkpoint-000009").mkdir(parents=True)  # another script's
    monkeypatch.chdir(tmp_path)
    assert str(Path("out", "ant")) in go(out_dir=None, max_new_tokens=1)[1].splitlines()[0]


def test_damaged_checkpoints(tmp_path, fails):
    """One flipped byte was sampled from; a stranger's folder or another script's is one line."""

    def refused(name, *words):
        fails(1, lambda: sample.load_checkpoint(tmp_path / name), str(tmp_path / name), *words)

    save(tmp_path / "flipped")
    data = bytearray((tmp_path / "flipped" / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (tmp_path / "flipped" / "model.safetensors").write_bytes(data)
    refused("flipped", "damaged", "model.safetensors")
    save(tmp_path / "gone")
    (tmp_path / "gone" / "tokenizer.json").unlink()
    refused("gone", "damaged", "tokenizer.json")
    save(tmp_path / "odd", model={"n_head": 5, "n_embd": 18})
    refused("odd", "n_head 5")
    save(tmp_path / "unknown", model={"n_heads": 5})
    refused("unknown", "n_heads")
    save(tmp_path / "list", model=[1])
    refused("list", "checkpoint of train.py")
    save(tmp_path / "none", model=None)
    refused("none", "checkpoint of train.py")
    (tmp_path / "empty").mkdir()
    refused("empty")
    (tmp_path / "roberta").mkdir()  # as the Trainer writes it
    (tmp_path / "roberta" / "config.json").write_text('{"model_type": "roberta"}')
    refused("roberta", "SHA256SUMS")
    runtime.commit_folder(tmp_path / "roberta", tmp_path / "trainer")  # train_roberta.py's
    refused("trainer", "no checkpoint of train.py", "--fill_mask")
    refused("nowhere")


def test_a_forkers_bug_keeps_its_traceback(run_dir, monkeypatch):
    """A typo in the model read "is no whole checkpoint of this project"."""

    def broken(self, config):
        raise TypeError("the forker's own")

    monkeypatch.setattr(sample.GPT, "__init__", broken)
    with pytest.raises(TypeError, match="the forker's own"):
        sample.load_checkpoint(run_dir / "best")


# ---------------------------------------------------------------------------------------------
# the command line


def test_command_line(root, run, tmp_path):
    """The newest run without --out_dir, a prompt from a file, tokens/s at the end; without fast.py
    and with the same seed the same text."""
    (root / "prompt.txt").write_text("\ufeffEvery ə🙂", encoding="utf-8")
    options = ["--start", "FILE:prompt.txt", "--max_new_tokens=30", "--stop_at_eos=False"]
    done = run("sample.py", *options, cwd=root, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    first, *text, last = done.stdout.splitlines()
    assert first == f"sampling from {Path('out', 'tiny', 'checkpoint-000005')}"
    assert "\n".join(text).startswith("Every ə🙂")
    assert re.fullmatch(r"30 tokens in \d+\.\d s, \d+\.\d tokens/s", last)
    for name in ("sample", "model", "prepare", "runtime", "configurator"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    again = run(tmp_path / "sample.py", *options, cwd=root)
    assert again.stdout.splitlines()[1:-1] == text and not again.stderr
    options[:2] = ["--start", "FILE:/dev/stdin"]  # a pipe can be read once
    piped = subprocess.run([sys.executable, ROOT / "sample.py", *options], cwd=root, text=True,
                           input=(root / "prompt.txt").read_text("utf-8"), stdout=subprocess.PIPE,
                           encoding="utf-8", check=True)
    assert piped.stdout.splitlines()[1:-1] == text


def test_wrong_calls(run, run_dir, fails, tmp_path, monkeypatch):
    """Each is one line that names the option; nothing of PyTorch's comes through."""

    def wrong(code, *words, **options):
        options = {"out_dir": str(run_dir)} | options
        fails(code, lambda: sample.main(sample.Config(**options)), *words)

    values = dict(num_samples=0, max_new_tokens=0, num_beams=0, temperature=-1.0, top_k=0,
                  top_p=0.0, seed=-1)
    for name, value in values.items():
        wrong(2, f"--{name}", str(value), **{name: value})
    wrong(2, "--seed", seed=2**64)
    wrong(2, "--top_p", "1.5", top_p=1.5)
    wrong(2, "--temperature", temperature=math.nan)
    for other in (dict(num_samples=2), dict(top_k=5), dict(top_p=0.9)):
        wrong(2, "--num_beams", "--top_k", num_beams=2, **other)
    wrong(2, "the prompt", "No such file", start="FILE:no such")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    monkeypatch.chdir(tmp_path)
    wrong(2, "latin.txt", "not UTF-8", start="FILE:latin.txt")
    wrong(2, "the prompt", "not UTF-8", start="\udce9t\udce9")  # an argument of those bytes
    wrong(1, "no checkpoint", "nowhere", out_dir=str(tmp_path / "nowhere"))
    for code, options, words in (
        (2, ["--chat"], ["--chat", "--interactive"]), (2, ["--top_p=high"], ["--top_p"]),
        (1, [], ["no run under out/", "python train.py"]),
    ):
        done = run("sample.py", *options)
        assert done.returncode == code
        one_line(done.stderr, *words)


def test_prompts(go, run_dir, fails):
    """The run's own, empty, longer than block_size, with a character the vocabulary lacks."""
    (text,), said = go(max_new_tokens=11)
    assert text.startswith("ç") and text in said
    (text,), said = go(start="", max_new_tokens=11)
    assert "<|endoftext|>" not in said and text in said
    (text,), _ = go(start="Every effort " * 3, max_new_tokens=5)
    assert text.startswith("Every effort " * 3) and len(text) <= 13 * 3 + 5
    model, tokenizer, _ = sample.load_run(run_dir)
    assert sample.encode_prompt(model, tokenizer, "") == [EOT]
    tokenizer.eot_id = None
    fails(2, lambda: sample.encode_prompt(model, tokenizer, ""), "no end-of-text", "give a prompt")
    model.config.vocab_size = 1
    fails(1, lambda: sample.encode_prompt(model, tokenizer, "Ev"), "past the model's vocabulary")
    for unknown in ("wörld", "日本"):
        assert "warning: the model's vocabulary" in go(start=unknown, max_new_tokens=2)[1]
    assert "warning" not in go(start="Every ə", max_new_tokens=2)[1]


def test_samples_of_one_batch(go):
    """All rows are printed, each cut at its own end; they differ. The seed decides."""
    texts, said = go(start="E", num_samples=5, max_new_tokens=20, temperature=1.5)
    assert len({*texts}) == 5 and all(t.startswith("E") for t in texts)
    for i, text in enumerate(texts):
        assert f"--- sample {i + 1}\n{text}\n" in said
    assert re.search(r"\d+ tokens in", said)

    def text(**options):
        return go(start="E", max_new_tokens=20, **options)[0]

    assert text() == text() == text(kv_cache=False) != text(seed=2)
    assert text(temperature=0) == text(temperature=0, seed=2) == text(top_k=1)


def test_beams_on_the_command_line(go, run_dir):
    """The log-probability shown is the model's own for the text shown."""
    (text,), said = go(start="Every", num_beams=4, max_new_tokens=8, stop_at_eos=False)
    shown = float(re.search(r"log-probability (-[\d.]+), 4 beams", said)[1])
    model, tokenizer, _ = sample.load_checkpoint(run_dir / "checkpoint-000005")
    ids = torch.tensor([tokenizer.encode(text)])
    assert ids.size(1) == 13 and abs(log_probabilities(model, ids, 5)[0] - shown) < 1e-3


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_quantize_on_the_command_line(go, kind):
    """It runs and prints; how near the weights are is for test_fast.py."""
    (text,), said = go(start="Every", max_new_tokens=9, quantize=kind, stop_at_eos=False)
    assert text.startswith("Every") and text in said and "9 tokens in" in said


def script_letters(monkeypatch, text, engine):
    scripted(monkeypatch, torch.tensor([engine.encode(text).ids]))


def test_the_end_of_text(go, monkeypatch):
    """It ends the text, is not shown, and is shown where it must not end it."""
    e = letters().encode("E").ids[0]
    for options in (dict(), dict(num_samples=2), dict(num_beams=2)):
        scripted(monkeypatch, torch.tensor([[e, e, EOT, e, e]]))
        texts, said = go(start="you", max_new_tokens=5, **options)
        assert {*texts} == {"youEE"} and "youEE\n" in said and "<|endoftext|>" not in said
        assert f"{3 * len(texts)} tokens in" in said
    scripted(monkeypatch, torch.tensor([[e, e, EOT, e, e]]))
    assert go(start="you", max_new_tokens=5, stop_at_eos=False)[0] == ["youEE<|endoftext|>EE"]


def test_a_padded_head(tmp_path, go, monkeypatch):
    """A head of 50,304 for 50,257 tokens: an id that no token has is nothing, not a KeyError."""
    save(tmp_path / "run" / "checkpoint-000001", vocab_size=EOT + 9)
    scripted(monkeypatch, torch.tensor([[0, EOT + 8, 1, EOT + 2, EOT]]))
    assert go(out_dir=str(tmp_path / "run"), start="y")[0] == ["yEv"]


def test_streaming_shows_whole_characters(tmp_path, go, monkeypatch):
    """Bytes of a character come one token at a time: no replacement mark may flash by."""
    engine = byte_letters()
    save(tmp_path / "run" / "checkpoint-000001", engine=engine)
    ids = engine.encode("ə🙂a").ids + engine.encode("ə").ids[:1] + [0]
    scripted(monkeypatch, torch.tensor([ids]))
    shown = []
    monkeypatch.setattr("builtins.print", lambda *words, end="\n", **_: shown.append(words[0]))
    (text,), _ = go(start="é", out_dir=str(tmp_path / "run"))
    assert text == "éə🙂a\ufffd"  # a broken character at the very end is said so
    assert [part for part in shown if part][1:-1] == ["é", "ə", "🙂", "a", "\ufffd"]


def test_escape_sequences(tmp_path, go, monkeypatch):
    """A model's escape sequences changed the terminal's title; a file gets the text as it is."""
    engine = byte_letters()
    save(tmp_path / "run" / "checkpoint-000001", engine=engine)
    evil = "\x1b]0;t\x07\x9b1\r\nz"
    options = dict(start="a\r\n\tb", out_dir=str(tmp_path / "run"),
                   max_new_tokens=len(engine.encode(evil).ids))
    ways = itertools.product((False, True), ({}, {"num_samples": 2}, {"num_beams": 2}))
    for terminal, how in ways:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        scripted(monkeypatch, torch.tensor([engine.encode(evil).ids]))
        (text, *_), said = go(**options, **how)
        assert text == "a\r\n\tb" + evil and (text in said) != terminal
        assert ("a\n\tb␛]0;t␇\ufffd1\nz" in said) == terminal == ("\x1b" not in said)
    assert sample.printable("\x00\x7f\ta\nb\rç🙂\u2028") == "␀\ufffd\ta\nb␍ç🙂\u2028"


# ---------------------------------------------------------------------------------------------
# line by line


class Terminal:
    """sample.py --interactive on a pseudo-terminal."""

    def __init__(self, cwd, *options):
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()
        command = [sys.executable, str(ROOT / "sample.py"), "--interactive", *options]
        self.process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, "TERM": "dumb"}, stdin=slave, stdout=slave,
            stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = b""

    def until(self, text, seconds=60):
        """Read until `text` appears; return what was seen since the last call."""
        end = time.monotonic() + seconds
        while text.encode() not in self.seen:
            left = end - time.monotonic()
            ready = left > 0 and select.select([self.master], [], [], left)[0]
            assert ready, f"{text!r} not in {self.seen.decode(errors='replace')!r}"
            self.seen += os.read(self.master, 4096)
        seen, _, self.seen = self.seen.partition(text.encode())
        return seen.decode(errors="replace")

    def type(self, keys):
        os.write(self.master, keys.encode())


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
def test_interactive_on_a_terminal(root):
    """Ctrl-C stops the text and not the program, the prompt comes back, Ctrl-D ends with 0."""
    terminal = Terminal(root, "--max_new_tokens=100000", "--stop_at_eos=False", "--kv_cache=False")
    try:
        terminal.until("> ")
        terminal.type("Every ə\n")
        terminal.until("\n")  # the echo
        terminal.until("Every ə")  # the text has begun
        terminal.type("\x03")
        assert "tokens/s" not in terminal.until("\n> ")
        time.sleep(0.5)  # readline listens to signals a moment after it shows its prompt
        terminal.type("\x03")  # at the prompt: a new prompt
        terminal.until("\n> ")
        terminal.type("\x1b[A\n")  # arrow up: the line from before
        assert "Every ə" in terminal.until("\n")
        terminal.until("Every ə")
        terminal.type("\x03")
        terminal.until("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


def test_interactive_from_a_pipe(root, run):
    """--start is the first line, an empty line is one too, a wrong one is said and passed over,
    and the end of the input is the end."""
    lines = b"Every\n\nFILE:no such\n\xe9t\xe9\nEvery\n"
    options = ["--interactive", "--start=you", "--max_new_tokens=5"]
    done = run("sample.py", *options, cwd=root, input=lines, text=False, encoding=None)
    said = done.stdout.decode()
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert said.count("tokens/s") == 4 and said.index("you") < said.index("Every")
    assert said.count("error: ") == 2 and "No such file" in said and "not UTF-8" in said


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted(root):
    """Ctrl-C during one text ends the program as the shell expects it, without a traceback."""
    command = [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens=1000000",
               "--stop_at_eos=False"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        p.stdout.readline()  # sampling from ...
        p.stdout.read(20)
        p.send_signal(signal.SIGINT)
        p.stdout.read()
        assert p.wait(20) == 130 and b"Traceback" not in p.stderr.read()
