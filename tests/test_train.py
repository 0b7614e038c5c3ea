"""train.py: the order of the data, one update, resume, faults, processes."""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import configurator
import prepare
import runtime
import sample
import train

CPU = torch.device("cpu")
TINY = dict(block_size=15, n_layer=1, n_head=2, n_embd=12, batch_size=3, max_iters=11)
TINY |= dict(warmup_iters=3, eval_iters=3, eval_interval=0, log_interval=1, sample_tokens=0)
TINY |= dict(mixed_precision="no", dropout=0.0, save_interval=5, keep_checkpoints=9)
ADAMW = dict(optimizer="adamw", learning_rate=1e-3)  # Muon may iterate in bf16: sums differ


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """loss.png takes half a second; the module's one run draws it."""
    monkeypatch.setattr(runtime, "plot_log", lambda *a, **k: None)


@pytest.fixture
def config(data_dir, tmp_path):
    """config(**changes) -> a train.Config for a run of half a second in its own folder."""
    base = train.Config(dataset="tiny", data_dir=str(data_dir), out_dir=str(tmp_path / "run"))
    return lambda **changes: replace(base, **TINY | changes)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """(config, what main returned, what it printed) of one run of 11 iterations; read only."""
    cfg = train.Config("tiny", str(data_dir), str(tmp_path_factory.mktemp("finished") / "run"),
                       **TINY | dict(eval_interval=4, sample_tokens=7, dropout=0.2))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = train.main(cfg)
    return cfg, result, said.getvalue()


def copy_until(cfg, folder, iteration):
    """Copy a run, as if it was killed after `iteration` was saved and went on logging; returns the
    config that resumes it."""
    shutil.copytree(cfg.out_dir, folder)
    for checkpoint in runtime.checkpoints(folder):
        if int(checkpoint.name[11:]) > iteration:
            runtime.remove(checkpoint)
    runtime.remove(Path(folder) / "best")
    return replace(cfg, out_dir=str(folder), resume=True)


@pytest.fixture
def copied(finished, tmp_path):
    """The config that resumes a copy of the finished run at iteration 5."""
    return copy_until(finished[0], tmp_path / "copy", 5)


def newest(cfg):
    return runtime.checkpoints(cfg.out_dir)[0]


def weights(cfg):
    return load_file(newest(cfg) / "model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close_weights(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def log(cfg):
    """log.csv without the throughput, which no two runs share."""
    rows = runtime.read_log(Path(cfg.out_dir) / "log.csv")
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def numbers(cfg):
    """(iterations, 3): loss, learning rate and gradient norm."""
    return np.array([(r["loss"], r["lr"], r["grad_norm"]) for r in log(cfg) if r["loss"]])


def saved(cfg):
    return runtime.read_run(newest(cfg))


def change(folder, name, content):
    """Put other bytes into a file of a checkpoint and sign it again, as a stranger would."""
    (folder / name).write_bytes(content if type(content) is bytes else content.encode())
    (folder / "SHA256SUMS").unlink()
    runtime.commit_folder(folder.rename(folder.with_name(".tmp-signed")), folder)


def options(cfg):
    return [f"--{name}={value}" for name, value in configurator.changed(cfg).items()]


def typed(*words):
    """The Config of a command line; it knows what was given."""
    return configurator.load(train.Config, words)


# ---------------------------------------------------------------------------------------------
# the order of the data, the learning rate


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 2000), st.integers(1, 64), st.integers(1, 7), st.integers(0, 5))
def test_every_window_once_an_epoch_and_none_past_the_end(length, block_size, rows, seed):
    """Would catch a batch that repeats or skips windows at an epoch's end, reads past it, or sees
    every epoch in the same order."""
    tokens = range(max(length, block_size + 1))
    n = train.count_windows(tokens, block_size)
    iterations = 2 + math.ceil(3 * n / rows)
    stream = np.concatenate([train.windows_of(t, rows, n, seed) for t in range(iterations)])
    epochs = [tuple(stream[epoch * n : (epoch + 1) * n]) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 20 or len({*epochs, tuple(train.epoch_order(seed + 1, 0, n))}) == 4
    assert len(tokens) - block_size <= n * block_size + 1 <= len(tokens)
    assert list(train.windows_of(1, rows, n, seed)) == list(stream[rows : 2 * rows])
    assert len(train.windows_of(10**7, rows, n, seed)) == rows  # found at once


def test_targets_are_one_ahead(fails):
    """Would catch targets that equal the inputs, windows that overlap, and a token past the
    vocabulary that is an index error deep in the embedding, or none on a GPU."""
    tokens = np.arange(101, dtype=np.uint16)
    idx, targets = train.read_windows(tokens, np.array([0, 9]), 10, 101, CPU)
    assert torch.equal(idx + 1, targets) and idx[0, 0] == 0 and targets[1, -1] == 100
    fails(1, lambda: train.read_windows(tokens, np.array([9]), 10, 100, CPU), "token 100")
    cfg = train.Config(block_size=10)
    fails(1, lambda: train.check_data(cfg, {"val": tokens}, 100, 3), "val.npy", "token 100")


@pytest.mark.parametrize("warmup, total", [(0, 9), (3, 11), (1, 101), (6, 7)])
def test_learning_rate(warmup, total):
    """Would catch a first update at 0, a last one above min_lr, and a kink after the warm-up.
    (transformers' schedules, one ahead: theirs begin at 0.)"""
    for name in ("linear", "cosine"):
        cfg = train.Config(learning_rate=3.0, min_lr=1.0, warmup_iters=warmup, schedule=name,
                           max_iters=total)
        for t in range(total):
            done = (t + 1 - warmup) / (total - warmup)
            left = 1 - done if name == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
            want = 1 + 2 * left if t + 1 >= warmup else 3 * (t + 1) / warmup
            assert train.lr_at(t, cfg) == pytest.approx(want)
        assert train.lr_at(total - 1, cfg) == 1
    short = train.Config(learning_rate=3.0, warmup_iters=20, max_iters=10)  # a recipe cut short
    assert train.lr_at(9, short) == 1.5


# ---------------------------------------------------------------------------------------------
# one update


@pytest.mark.parametrize("optimizer, tied", [("adamw", True), ("muon", False), ("adamw", False)])
def test_every_parameter_once_with_its_decay_and_rate(optimizer, tied):
    """Would catch weight decay on biases and norms, a tied head counted twice, a parameter nobody
    trains, and --embedding_lr=0, which freezes, taken for not given."""
    model = train.GPT(train.GPTConfig(8, 51, 1, 2, 12, tie_weights=tied))
    cfg = train.Config(optimizer=optimizer, learning_rate=0.1, embedding_lr=0.0, head_lr=0.7)
    made = train.make_optimizers(model, cfg, CPU)
    runtime.set_learning_rate(made, 0.05)  # half of the peak
    groups = [group for o in made for group in o.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    found = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        hidden = p.dim() > 1 and name.startswith("transformer.h.")
        decays = hidden if optimizer == "muon" else p.dim() > 1
        assert found[id(p)]["weight_decay"] == (0.1 if decays else 0), name
        rates = {"transformer.w": 0.0, "lm_head": 0.35}
        rate = next((rates[part] for part in rates if name.startswith(part)), 0.05)
        assert found[id(p)]["lr"] == pytest.approx(rate), name


@pytest.mark.parametrize("clip, batches", [(0.0, (6,)), (0.0, (2, 2, 2)), (0.1, (1,) * 6)])
def test_accumulation_is_the_mean_and_the_norm_is_clipped(clip, batches):
    """Would catch a step after each micro-batch, a gradient that is a sum, the last micro-batch's
    loss for that of all, and a norm clipped before it is whole. SGD shows the gradient itself."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = train.GPT(train.GPTConfig(8, 51, 1, 2, 12))
    rows = torch.randint(51, (6, 9))
    parameters = list(model.parameters())
    expected = model(rows[:, :-1], rows[:, 1:])[1]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    before = torch.cat([p.detach().flatten() for p in parameters])
    optimizer = accelerator.prepare(torch.optim.SGD(parameters, lr=1.0))
    cfg = train.Config(gradient_accumulation_steps=len(batches), grad_clip=clip)
    micro_batches = [(part[:, :-1], part[:, 1:]) for part in rows.split(batches)]
    loss, norm = train.update(model, [optimizer], micro_batches, cfg, accelerator)
    torch.testing.assert_close(loss, expected.detach())
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-4) and norm > 0.2
    moved = before - torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(moved, gradient * (clip / norm if clip else 1), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("bad", [False, True])
def test_fp16s_scale_serves_both_optimizers(bad):
    """Would catch what accelerate's wrappers do: the second optimizer's gradients divided by the
    scale twice; and one optimizer that takes a step with gradients of which the other's are NaN."""
    ended, idx = [], torch.arange(16).view(2, 8)
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**20)):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler
        torch.manual_seed(0)
        model = train.GPT(train.GPTConfig(8, 16, 1, 2, 16))
        made = train.make_optimizers(model, train.Config(), CPU)
        wrapped = [AcceleratedOptimizer(optimizer, scaler=scaler) for optimizer in made]
        before = [p.clone() for p in model.parameters()]
        for _ in range(3):
            loss = model(idx, idx)[1]
            (scaler.scale(loss) if scaler else loss).backward()
            if bad:
                model.transformer.ln_f.bias.grad[0] = torch.nan
            for optimizer in made if scaler else ():
                scaler.unscale_(optimizer)
            train.apply_gradients(accelerator, wrapped, not bad)
        assert not any(p.grad is not None for p in model.parameters())
        assert all(map(torch.equal, before, model.parameters())) == bad
        ended.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ended)
    assert scaler.get_scale() == 2.0 ** (17 if bad else 20)


def test_bad_updates_are_skipped_and_ten_in_a_row_end_the_run(config, monkeypatch, capsys, fails):
    """Would catch NaN that reaches the weights, a count of all bad updates where one of those in a
    row is promised, and a broken run that overwrites its last good checkpoint."""
    lr_at, forward = train.lr_at, train.GPT.forward
    update = []
    monkeypatch.setattr(train, "lr_at", lambda t, *rest: update.append(t) or lr_at(t, *rest))

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        bad = self.training and (update[-1] % 2 == 1 or update[-1] > 21)
        return logits, loss * math.nan if bad else loss

    monkeypatch.setattr(train.GPT, "forward", poisoned)
    cfg = config(max_iters=50)
    fails(1, lambda: train.main(cfg), "iteration 31", "10 updates")
    assert newest(cfg).name == "checkpoint-000030" and saved(cfg)["skipped"] == 11 + 8
    assert all(torch.isfinite(w).all() for w in weights(cfg).values())
    assert "iteration 2: gradient norm nan, update skipped" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# whole runs


def test_the_run_folder_is_complete(finished):
    """Would catch a loop that trains nothing, promised files that nobody wrote, and a notebook
    that gets nothing back."""
    cfg, result, said = finished
    out, rows = Path(cfg.out_dir), runtime.read_log(Path(cfg.out_dir) / "log.csv")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1
    assert [r["iter"] for r in rows] == list(range(12)) and rows[11]["tokens"] == 11 * 45
    assert [r["iter"] for r in rows if r["val_loss"]] == [0, 4, 8, 11]
    assert [int(p.name[11:]) for p in runtime.checkpoints(out)] == [11, 10, 5]
    assert all(runtime.verify_checksums(p) is None for p in [out / "best", *out.glob("check*")])
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG" and not list(out.glob(".tmp-*"))
    assert [int(e[1]) for e in train.read_samples(out / "samples.md")] == [0, 4, 8, 11]
    assert runtime.read_run(out)["train"]["max_iters"] == 11
    for word in ("perplexity", "bits per byte", "tokens/s", "1 process(es)", "elapsed", "left"):
        assert word in said
    assert result["history"] == rows and not result["model"].training
    assert same_weights(result["model"].state_dict(), weights(cfg))
    assert result["tokenizer"].decode(result["tokenizer"].encode("def")) == "def"


def test_watching_a_run_does_not_change_it(finished, config):
    """Would catch evaluation, sampling or saving that draws from training's random numbers or
    leaves the model without dropout."""
    plain = config(dropout=0.2, save_interval=0, eval_interval=2)
    train.main(plain)
    assert np.array_equal(numbers(plain), numbers(finished[0]))
    assert same_weights(weights(plain), weights(finished[0]))


def test_best_and_a_checkpoint_by_time(config, monkeypatch):
    """Would catch best/ overwritten by worse, save_interval=0 (the default) that loses two hours of
    a long run, and dropout that is the same in each iteration."""
    seeds, losses = [], iter([5.0, 4.0, 3.0, 4.0])
    plain = runtime.derive_seed
    monkeypatch.setattr(runtime, "derive_seed", lambda *a: seeds.append(plain(*a)) or seeds[-1])
    monkeypatch.setattr(train, "evaluate", lambda *a: dict.fromkeys(("train_loss", "val_loss"),
                                                                     next(losses)))
    monkeypatch.setattr(runtime, "SAVE_SECONDS", -1)
    cfg = config(save_interval=0, max_iters=3, eval_interval=1)
    train.main(cfg)
    assert [int(p.name[11:]) for p in runtime.checkpoints(cfg.out_dir)] == [3, 2, 1]
    best = runtime.read_run(Path(cfg.out_dir) / "best")
    assert (best["iter"], saved(cfg)["best_iter"], len(set(seeds))) == (2, 2, 3)


def test_epochs_set_the_iterations_and_what_follows_from_them(config):
    """Would catch a pass rounded away, and a warm-up longer than the run: the rate never peaked."""
    cfg = config(max_iters=None, max_epochs=0.013, warmup_iters=None, eval_interval=None)
    train.main(cfg)
    tokens = np.load(Path(cfg.data_dir) / "tiny" / "train.npy", mmap_mode="r")
    rows = log(cfg)
    assert rows[-1]["iter"] == math.ceil(0.013 * train.count_windows(tokens, 15) / 3) > 9
    assert max(r["lr"] for r in rows[1:]) == pytest.approx(cfg.learning_rate)
    assert sum(r["val_loss"] is not None for r in rows) >= 4


def test_minutes_are_settled_once(config, monkeypatch):
    """Would catch a resumed run whose length is measured again: it would not be the same run."""
    monkeypatch.setattr(train, "measure_run", lambda *a: (0.5, 0.2, 0.0, 1e9))
    cfg = config(max_iters=None, minutes=0.0745, warmup_iters=None, eval_interval=2)
    train.main(cfg)  # (60 x 0.0745 - 0.2) / (0.5 + 0.2 / 2) = 7.1
    monkeypatch.setattr(train, "measure_run", lambda *a: (0.1, 0.2, 0.0, 1e9))
    assert newest(cfg).name == "checkpoint-000007"
    runtime.remove(newest(cfg))
    train.main(typed(f"--out_dir={cfg.out_dir}", "--resume"))
    assert newest(cfg).name == "checkpoint-000007" and saved(cfg)["train"]["max_iters"] == 7


@pytest.mark.parametrize(("windows", "iters", "tied", "head_lr"), [
    (9, 23, False, 0.003), (19, 40, False, 0.003), (292, 365, False, 0.003),
    (293, 367, True, None), (2_318, 1_450, True, None), (2_319, 1_450, False, 0.003),
    (3_864, 1_450, False, 0.003), (3_865, 1_450, False, None)])
def test_a_small_text_is_repeated(windows, iters, tied, head_lr):
    """Ten passes were too few for a tiny text; the head learned small ones by heart."""

    def choose(vocab_size=2_048, **given):
        cfg = train.Config(block_size=256, **given)
        chosen = train.choose(cfg, windows, 8, vocab_size, None)
        return chosen.tie_weights, chosen.head_lr and pytest.approx(chosen.head_lr)

    chosen = train.choose(train.Config(), windows, 8, 2_048, None)
    assert chosen.max_iters == iters and choose() == (tied, head_lr)
    assert iters != 1_450 or chosen.eval_interval == 363  # 1,448 and 1,450 were both evaluated
    slow = 0.003 if windows < 3_865 else None
    assert choose(optimizer="adamw") == (False, None)
    assert choose(head_lr=0.0) == (False, 0.0)  # a rate for a head of its own
    assert choose(tie_weights=False) == (False, slow) and choose(tie_weights=True) == (True, None)
    assert choose(init_from="gpt2") == (None, slow)  # whose weights say what is tied
    assert choose(resume=True) == (tied, None)
    wide = choose(n_embd=130)[0], choose(max_iters=1_709)[0]  # 3.5M tokens: width 192
    assert wide == (windows > 292, windows > 292)
    assert choose(vocab_size=2_047) == (False, slow)


@pytest.mark.parametrize("rows", [3, 7, 8])
def test_whole_passes(rows):
    """Three passes, rounded up to whole updates, got the dropout of four; 7 passes over 29 windows
    by sevens made 30 updates."""
    for windows in range(20, 99):
        for passes, dropout in ((3, 0.0), (5, 0.1), (7, 0.2)):
            chosen = train.choose(train.Config(max_epochs=passes), windows, rows, 99, None)
            assert chosen.dropout == dropout and chosen.max_iters == -(-passes * windows // rows)


@pytest.mark.parametrize(("said", "shape"), [
    (dict(max_iters=1_708), (3, 2, 128)), (dict(max_iters=1_709), (4, 3, 192)),
    (dict(max_iters=12_207), (4, 3, 192)), (dict(max_iters=12_208), (4, 4, 256)),
    (dict(n_embd=100), (3, 2, 100)),
    (dict(n_layer=5, n_head=1), (5, 1, 128)), (dict(n_embd=30), (3, 1, 30)),
    (dict(n_head=3), (3, 3, 132)), (dict(n_kv_head=4), (3, 4, 128)), (dict(n_embd=36), (3, 2, 36))])
def test_a_longer_run_is_wider(said, shape):
    """A minute on 2 cores gave 10 % more bits per byte with a width of 256 than with 128."""
    chosen = train.choose(train.Config(**said), 99_999, 4, 99, None)
    assert (chosen.n_layer, chosen.n_head, chosen.n_embd) == shape
    train.model_config(chosen, 99)  # 4 heads of 25 were refused, and 2 for 4 heads of keys
    often = train.choose(train.Config(max_iters=12_208), 99, 4, 99, None)  # many passes
    assert (often.n_layer, often.n_embd) == (4, 128)


@pytest.mark.parametrize(("said", "init"), [
    ({}, "local"), (dict(rope_theta=None), "gpt2"), (dict(init="torch"), "torch")])
def test_initial_weights_suit_the_positions(said, init):
    assert train.choose(train.Config(max_iters=9, **said), 99, 8, 99, None).init == init


def test_minutes_hold_evaluations_and_dropout():
    """A run took up to 1.5 times the minutes asked for: neither of the two was counted."""
    asked = []

    def measure(cfg):  # -> update, evaluation, elapsed, memory
        asked.append((cfg.n_embd, cfg.dropout))
        return cfg.n_embd / 512 * (2 if cfg.dropout else 1), 3.0, 2.0, 0

    def fit(minutes, windows):
        asked.clear()
        return train.choose(train.Config(minutes=minutes), windows, 7, 99, measure)

    once = fit(1.0, 10_007)  # less than three passes
    assert (once.max_iters, once.dropout, once.head_lr) == (172, 0.0, None)  # 60 - 2 - 5 x 3 s
    assert asked == [(128, 0.0)] and once.minutes is None
    often = fit(1.0, 195)
    assert (often.max_iters, often.dropout, often.head_lr) == (86, 0.1, 0.003)  # 3.1 passes
    assert asked == [(128, 0.0), (128, 0.2), (128, 0.1)]
    between = fit(1.0, 201)  # 172 without dropout would need it, 86 with it would not
    assert (between.max_iters, between.dropout, between.head_lr) == (86, 0.0, None)
    wide = fit(10.0, 100_007)  # 2,332 of the narrowest fit
    assert (wide.max_iters, wide.n_embd, wide.n_head) == (1_554, 192, 3)
    assert asked == [(128, 0.0), (192, 0.0)]


def test_dry_run_measures_and_writes_nothing(config, capsys, tmp_path, monkeypatch):
    """Would catch a dry run that leaves a folder, that only estimates, or that counts the memory of
    two models."""
    made, make = [], train.make_model
    monkeypatch.setattr(train, "make_model", lambda *a: made.append(a) or make(*a))
    train.main(config(dry_run=True, gradient_accumulation_steps=3))
    out = capsys.readouterr().out
    for word in ("parameters", "tokens", "epochs", "hours", "memory", "disk", "nothing is written"):
        assert word in out
    assert len(made) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("interval", "count"), [(0, 1), (4, 4), (11, 2)])
def test_dry_run_counts_evaluations(config, capsys, monkeypatch, interval, count):
    """At 0, 4, 8 and 11 of 11 iterations there were 3, and without an interval 2."""
    monkeypatch.setattr(train, "measure_run", lambda *a: (0.0, 3600.0, 0.0, 1e9))
    train.main(config(dry_run=True, eval_interval=interval))
    assert f" {count}.00 hours" in capsys.readouterr().out


def test_dry_run_of_a_resumed_run(copied, capsys):
    """Would catch one that measures this command's defaults instead of the run."""
    before = snapshot(copied.out_dir)
    train.main(typed(f"--out_dir={copied.out_dir}", "--resume", "--dry_run"))
    assert "dataset='tiny'" in capsys.readouterr().out and snapshot(copied.out_dir) == before


def test_a_first_run_keeps_what_it_did_not_write(config):
    """Notes in a samples.md were deleted without --overwrite; the log of a start that was killed
    had its row of iteration 0 twice."""
    cfg = config(eval_interval=4)
    folder = Path(cfg.out_dir)
    folder.mkdir()
    (folder / "samples.md").write_text("my notes\n")
    (folder / "log.csv").write_text("iter,loss\n0,\n")
    train.main(cfg)
    assert (folder / "samples.md").read_text().startswith("my notes\n")
    assert [row["iter"] for row in runtime.read_log(folder / "log.csv")] == [*range(12)]


# ---------------------------------------------------------------------------------------------
# resume


@pytest.mark.parametrize("changes", [
    dict(gradient_accumulation_steps=3), dict(optimizer="adamw", tie_weights=True, bias=True)])
def test_5_plus_6_is_11_bit_for_bit(config, tmp_path, changes):
    """Would catch a resume that replays batches, loses dropout's or the optimizer's state, keeps
    rows of the log that it makes again, or starts from a damaged checkpoint."""
    whole = config(dropout=0.2, eval_interval=4, sample_tokens=5, **changes)
    train.main(whole)
    half = copy_until(whole, tmp_path / "half", 10)
    file = newest(half) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    train.main(half)
    assert [runtime.verify_checksums(p) for p in runtime.checkpoints(half.out_dir)] == [None] * 3
    assert same_weights(weights(whole), weights(half)) and log(whole) == log(half)
    samples = [(Path(c.out_dir) / "samples.md").read_bytes() for c in (whole, half)]
    assert samples[0] == samples[1] and saved(half)["resumed"] == [5]
    assert saved(half)["best_val_loss"] == saved(whole)["best_val_loss"]


def test_another_accumulation_goes_on(config, tmp_path):
    """accelerate's restored micro-step counter once made a resume at 4 x 2 after 5 iterations of
    8 x 1 print losses and make no update at all."""
    whole = config(batch_size=8, **ADAMW)
    train.main(whole)
    half = copy_until(whole, tmp_path / "half", 5)
    train.main(replace(half, batch_size=2, gradient_accumulation_steps=4))
    assert np.allclose(numbers(whole), numbers(half), atol=1e-5) and len(numbers(half)) == 11
    assert close_weights(weights(whole), weights(half))


def test_a_resumed_run_keeps_its_tracker(config):
    """Would catch an Accelerator made without the tracker that only the first command named."""
    cfg = config(log_with="tensorboard", max_iters=4)
    train.main(cfg)
    before = set(Path(cfg.out_dir).rglob("events.*"))
    train.main(typed("--out_dir", cfg.out_dir, "--resume", "--max_iters=7"))
    assert before and set(Path(cfg.out_dir).rglob("events.*")) > before


def test_the_runs_own_settings(copied, finished, capsys, monkeypatch):
    """Would catch a resume that needs all options again, or changes what nobody named; and an
    optimizer whose settings come from the checkpoint although others were given."""
    made, plain = [], train.make_optimizers
    monkeypatch.setattr(train, "make_optimizers", lambda *a: made.append(plain(*a)) or made[-1])
    asked, make = [], runtime.make_accelerator
    monkeypatch.setattr(runtime, "make_accelerator",
                        lambda wanted, **more: asked.append(wanted) or make(wanted, **more))
    train.main(typed("--out_dir", copied.out_dir, "--resume"))
    assert asked == ["no"]  # this command's default is "auto", bf16 on some machines
    assert same_weights(weights(copied), weights(finished[0]))
    runtime.remove(newest(copied))
    said = dict(weight_decay=0.3, beta2=0.5, momentum=0.7, dropout=0.0, max_iters=13)
    train.main(typed("--out_dir", copied.out_dir, "--resume", *(f"--{k}={said[k]}" for k in said)))
    muon, adamw = (optimizer.param_groups[0] for optimizer in made[-1])
    assert (muon["weight_decay"], muon["momentum"], adamw["betas"][1]) == (0.3, 0.7, 0.5)
    now, was = saved(copied)["train"], saved(finished[0])["train"]
    was |= {"out_dir": copied.out_dir, "resume": True, **said}
    assert {k: (v, now[k]) for k, v in was.items() if now[k] != v and v is not None} == {}
    assert "ends at iteration 13: the learning rate" in capsys.readouterr().out


def test_where_a_resume_ends(copied, fails, capsys):
    """Below the iteration reached it never ended and swung the rate; at it nothing was said."""
    before = {k: v and v[0] for k, v in snapshot(copied.out_dir).items()}
    fails(2, lambda: train.main(replace(copied, max_iters=3)), "5 iterations", "3", "--max_iters")
    fewer = replace(copied, max_iters=None, max_epochs=0.0035)
    fails(2, lambda: train.main(fewer), "5 iterations", "4")
    result = train.main(replace(copied, max_iters=5))
    said = capsys.readouterr().out
    assert "finished" in said and f"--out_dir={copied.out_dir} --resume --max_iters=" in said
    assert same_weights(result["model"].state_dict(), weights(copied))
    assert len(result["history"]) == 12
    assert {k: v and v[0] for k, v in snapshot(copied.out_dir).items()} == before


def test_what_may_not_change_is_refused_in_one_message(copied, fails, data_dir, tmp_path):
    """Would catch a resume on another text or tokenizer of the same size, unnoticed once."""
    before = snapshot(copied.out_dir)
    command = [f"--out_dir={copied.out_dir}", "--resume"]
    other = ["--n_layer=3", "--swiglu=False", "--block_size=7", "--tie_weights"]
    other += ["--optimizer=adamw"]
    fails(2, lambda: train.main(typed(*command, "--batch_size=2")),
          "x processes is 2 but was 3")
    fails(2, lambda: train.main(typed(*command, *other)), "--n_layer is 3 but was 1", "--swiglu",
          "--block_size", "--tie_weights is True but was False", "--optimizer", copied.out_dir)
    for name in ("text", "tokenizer"):
        shutil.copytree(data_dir / "tiny", tmp_path / name)
    meta = json.loads((tmp_path / "text" / "meta.json").read_text("utf-8"))
    meta.pop("tokenizer_sha256", None)
    (tmp_path / "tokenizer" / "meta.json").write_text(json.dumps(meta), "utf-8")
    meta["source_sha256"] = "0" * 64
    (tmp_path / "text" / "meta.json").write_text(json.dumps(meta), "utf-8")
    engine = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    ids = engine["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(engine), "utf-8")
    for name, word in (("text", "source_sha256"), ("tokenizer", "tokenizer_sha256")):
        other = [f"--data_dir={tmp_path}", f"--dataset={name}", "--n_head=1"]
        fails(2, lambda: train.main(typed(*command, *other)), word, "--n_head is 1 but was 2")
    assert snapshot(copied.out_dir) == before
    (newest(copied) / "tokenizer.json").unlink()  # as if the data was tiktoken's then
    change(newest(copied), "meta.json", json.dumps(meta | {"tokenizer": "gpt2"}))
    fails(2, lambda: train.main(typed(*command)), "tokenizer")


def test_an_old_run_resumes(config, monkeypatch):
    """Would catch a run of an older version that is lost: its settings are in config.json, without
    the fields that came since, and its max_epochs is 0.0 where None stands now."""
    old = dict(rope_theta=None, rms_norm=False, swiglu=False, qk_norm=False, norm_eps=1e-5)
    cfg = config(max_iters=5, bias=True, qkv_bias=True, tie_weights=True, **old)
    train.main(cfg)
    was, before = saved(cfg), weights(cfg)
    new = [*old, "n_kv_head", "head_dim", "n_inner", "embedding_lr", "head_lr", "schedule"]
    for name in (*new, "momentum", "minutes"):
        was["model"].pop(name, None)
        was["train"].pop(name, None)
    was["train"] |= {"max_epochs": 0.0, "tokens_per_s": 0.0, "sample_start": "def"}
    old = {k: was[k] for k in ("model", "train", "iter", "skipped", "best_val_loss")}
    (newest(cfg) / "run.json").rename(newest(cfg) / "config.json")
    change(newest(cfg), "config.json", json.dumps(old))
    monkeypatch.setattr(train, "REPEATS", ((math.inf, 0.2, 0.3, True),))  # a new run
    train.main(typed(f"--out_dir={cfg.out_dir}", "--resume", "--max_iters=7"))
    assert newest(cfg).name == "checkpoint-000007" and not same_weights(weights(cfg), before)
    assert saved(cfg)["train"]["head_lr"] is None
    assert saved(cfg)["model"]["rope_theta"] is None and saved(cfg)["train"]["schedule"] == "cosine"
    model = train.GPT(train.GPTConfig(8, 51, 1, 2, 12))
    for name in ("muon", "adamw"):  # an older run's AdamW has two groups: matrices, then the rest
        made = train.make_optimizers(model, train.Config(optimizer=name), CPU)
        matrices = [{p.dim() > 1 for p in group["params"]} for group in made[-1].param_groups]
        assert matrices == [{True}, {False}]


@pytest.mark.parametrize("content", ["{}", "[]", '{"script": "train_roberta.py", "iter": 5}',
                                     '{"model": {"fork": 1}, "train": {}, "iter": 5}'])
def test_a_checkpoint_of_another_script(copied, fails, content):
    """Would catch a KeyError or TypeError for a folder that train.py did not write."""
    change(newest(copied), "run.json", content)
    fails(1, lambda: train.main(typed(f"--out_dir={copied.out_dir}", "--resume")), copied.out_dir)


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.bin", "optimizer_1.bin", "random_states_0.pkl",
                                  "model.safetensors", "scheduler.bin", "scaler.pt"])
def test_no_pickle_is_ever_run(copied, tmp_path, name):
    """A checkpoint from a stranger is data. Each of these runs code where it is unpickled."""
    mark = tmp_path / "mark"
    change(newest(copied), name, pickle.dumps(Evil(mark)))
    with contextlib.suppress(runtime.UserError):
        train.main(copied)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


TITLE = b"# My run\r\nThe text below is a book about ## iteration 3.\n\n"
INNER = "## iteration 3: val loss 1.000\n\n~~~~\na\r\nb\n~~~~\n"
ENTRY = b"## iteration 2: val loss 3.000\n\n~~~~~\n" + INNER.encode() + b"\n~~~~~\n\n"


def test_samples_are_cut_at_the_right_place(tmp_path):
    """Text that looks like an entry was cut out on resume, a user's title was a traceback and CRLF
    became LF."""
    path = tmp_path / "samples.md"
    train.trim_samples(path, 1)  # not there yet
    path.write_bytes(TITLE)
    train.append_sample(path, 2, 3.0, INNER)
    assert path.read_bytes() == TITLE + ENTRY
    train.append_sample(path, 7, 2.5, INNER)
    train.append_sample(path, 11, 2.25, "")
    entries = [(e[1], e[3]) for e in train.read_samples(path)]
    assert entries == [("2", INNER), ("7", INNER), ("11", "")]
    train.trim_samples(path, 7)
    assert [e[1] for e in train.read_samples(path)] == ["2", "7"]
    for iteration, left in ((6, TITLE + ENTRY), (2, TITLE + ENTRY), (1, TITLE)):
        train.trim_samples(path, iteration)
        assert path.read_bytes() == left


@pytest.mark.slow
def test_init_from_a_padded_model(finished, config, tmp_path, fails):
    """A head of 50,304 rows drew ids that no tokenizer decodes: KeyError at an evaluation. Would
    catch a resume that takes the model's 15 positions for the run's block_size of 7."""
    from transformers import AutoModelForCausalLM

    import convert

    folder = tmp_path / "model"
    convert.main(convert.Config(str(newest(finished[0])), str(folder)))
    padded = AutoModelForCausalLM.from_pretrained(folder)
    padded.resize_token_embeddings(139, mean_resizing=False)
    padded.lm_head.weight.data[100:] = 3 * padded.lm_head.weight.data[:39]
    padded.save_pretrained(folder)
    bare = dict(init_from=str(folder), n_layer=None, n_head=None, n_embd=None, max_iters=5)
    cfg = config(**bare, learning_rate=0.0, sample_tokens=99)
    train.main(cfg)
    head = weights(cfg)["lm_head.weight"]
    assert torch.equal(head, padded.lm_head.weight.detach()) and len(head) == 139
    cfg = config(**bare, block_size=7, out_dir=str(tmp_path / "seven"))
    train.main(cfg)
    again = ["--resume", f"--out_dir={cfg.out_dir}"]
    train.main(typed(*again, "--max_iters=7"))
    assert saved(cfg)["train"]["block_size"] == 7 and log(cfg)[-1]["tokens"] == 7 * 3 * 7
    fails(2, lambda: train.main(typed(*again, "--n_layer=3")), "--n_layer")
    fails(2, lambda: train.main(typed(*again, "--block_size=8")), "--block_size is 8 but was 7")
    tokenizer = prepare.load_tokenizer(Path(cfg.data_dir) / cfg.dataset)
    model = train.make_model(cfg, tokenizer.vocab_size, {}, tokenizer)
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())  # or a resume has other bits


# ---------------------------------------------------------------------------------------------
# faults


@pytest.mark.parametrize("number, code, ends", [
    (signal.SIGINT, None, KeyboardInterrupt), (signal.SIGTERM, 143, SystemExit)])
def test_a_signal_saves_and_the_run_goes_on(copied, finished, monkeypatch, capsys, number, code,
                                            ends):
    """Would catch a signal that loses work, a last line that does not say how to go on, and a
    resume that differs from an unbroken run."""
    plain = train.lr_at

    def lr_at(iteration, *rest):
        if iteration == 6:
            os.kill(os.getpid(), number)
        return plain(iteration, *rest)

    monkeypatch.setattr(train, "lr_at", lr_at)
    with pytest.raises(ends) as stop:
        train.main(copied)
    assert getattr(stop.value, "code", None) == code and newest(copied).name == "checkpoint-000007"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"train.py --out_dir={copied.out_dir} --resume")
    monkeypatch.setattr(train, "lr_at", plain)
    train.main(copied)
    assert same_weights(weights(copied), weights(finished[0])) and log(copied) == log(finished[0])


@pytest.mark.slow
def test_a_forkers_typo_shows_his_line(config, tmp_path, run):
    """Would catch a bug in the model that reads as a damaged checkpoint or a full disk."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    text = (tmp_path / "model.py").read_text("utf-8")
    assert "self.c_fc(x)" in text
    (tmp_path / "model.py").write_text(text.replace("self.c_fc(x)", "self.c_fz(x)"), "utf-8")
    done = run(tmp_path / "train.py", *options(config()))
    assert done.returncode == 1 and "Traceback" in done.stderr and "error: " not in done.stderr
    assert "self.c_fz(x)" in done.stderr and "has no attribute 'c_fz'" in done.stderr
    done = run("train.py", *options(config(n_head=5, overwrite=True)))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "n_head 5" in done.stderr


def test_a_text_names_no_file(config, tmp_path, fails):
    """A text with FILE: where the prompt is taken from had the next word opened as a file."""
    (tmp_path / "text.txt").write_text("x FILE: gone a " * 200)
    source = [str(tmp_path / "text.txt")]
    prepare.main(prepare.Config("log", source=source, tokenizer="char", data_dir=str(tmp_path)))
    cfg = config(dataset="log", data_dir=str(tmp_path), sample_start=None, sample_tokens=3)
    train.main(cfg)
    assert "~~~~\nFILE: gone a" in (Path(cfg.out_dir) / "samples.md").read_text("utf-8")
    (tmp_path / "text.txt").write_text("name\nof\na\nline\n" * 200)  # a vocabulary without a blank
    prepare.main(prepare.Config("log", source=source, tokenizer="char", data_dir=str(tmp_path)))
    train.main(replace(cfg, overwrite=True))
    assert "~~~~\nof\na\nline" in (Path(cfg.out_dir) / "samples.md").read_text("utf-8")
    data = {"train": np.zeros(0, np.uint16), "val": np.zeros(0, np.uint16)}
    fails(1, lambda: train.check_data(cfg, data, 9, 1), "has 0 tokens", "prepare more text")


def test_a_prompts_file_is_read_once(config, tmp_path):
    """A run whose --sample_start=FILE:... was gone could neither be resumed nor sampled from."""
    path = tmp_path / "prompt.txt"
    path.write_text("FILE:ab")
    cfg = config(sample_start=f"FILE:{path}", sample_tokens=3, max_iters=2)
    train.main(cfg)
    path.unlink()
    train.main(replace(cfg, sample_start=None, max_iters=3, eval_interval=1, resume=True))
    assert runtime.read_run(newest(cfg))["train"]["sample_start"] == "FILE:ab"
    assert (Path(cfg.out_dir) / "samples.md").read_text("utf-8").count("~~~~\nFILE:ab") >= 2
    assert sample.main(sample.Config(cfg.out_dir, max_new_tokens=2))[0].startswith("FILE:ab")


@pytest.mark.parametrize("broken", [
    "--n_head=5", "--dataset=gone", "--block_size=99999", "--batch_size=9999", "--dropout=1.5",
    "--sample_tokens=3 --sample_start=FILE:gone", "--init_from=gone",
    "--max_iters=5 --resume", "--log_with=wandb"])
def test_overwrite_deletes_last(copied, broken, monkeypatch):
    """--overwrite once deleted the old run and then named the mistake."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    before = snapshot(copied.out_dir)
    command = options(replace(copied, resume=False, overwrite=True))
    with pytest.raises(runtime.UserError):
        train.main(typed(*command, *broken.split()))
    assert {**snapshot(copied.out_dir), ".lock": None} == {**before, ".lock": None}


@pytest.mark.parametrize("changes, code, words", [
    (dict(seed=2**64), 2, ["--seed", str(2**64)]), (dict(seed=-1), 2, ["--seed", "-1"]),
    (dict(batch_size=10**400), 1, ["--batch_size"]), (dict(batch_size=0), 2, ["--batch_size", "0"]),
    (dict(max_iters=None, max_epochs=1e308), 2, ["--max_epochs"]),
    (dict(max_iters=-1), 2, ["--max_iters"]), (dict(beta2=1.0), 2, ["--beta2"]),
    (dict(learning_rate=math.nan), 2, ["--learning_rate", "nan"]),
    (dict(eval_iters=0), 2, ["--eval_iters"]), (dict(keep_checkpoints=0), 2, ["--keep"]),
    (dict(max_epochs=2.0), 2, ["max_iters", "max_epochs", "give only one"]),
    (dict(max_iters=0, minutes=2.0), 2, ["max_iters", "minutes"]),
    (dict(n_embd=13), 2, ["n_embd 13", "n_head 2"]), (dict(n_embd=10), 2, ["even head_dim"]),
    (dict(block_size=100_003), 1, ["train.npy", "100003", "--block_size"]),
    (dict(batch_size=10_007), 1, ["train.npy", "10007", "--batch_size"]),
    (dict(dataset="nowhere"), 1, ["nowhere", "prepare.py"]),
    (dict(dataset="../tiny"), 2, ["../tiny"]), (dict(dataset="x" * 300), 2, ["--dataset", "xxx"]),
    (dict(resume=True), 1, ["--resume"]), (dict(dataset="\udcff" * 300), 2, ["--dataset"]),
    (dict(init_from="gone", n_layer=3), 2, ["--init_from", "--n_layer"]),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_bad_input_is_one_line(config, fails, changes, code, words):
    """Would catch a traceback, or an error after the first slow step."""
    fails(code, lambda: train.main(config(**changes)), *words)


@pytest.mark.parametrize("remade", [True, False])
def test_data_that_goes_while_the_run_goes(config, data_dir, tmp_path, monkeypatch, remade):
    """A data set made anew gave the checkpoint its tokenizer, one removed made the save fail after
    the last update."""
    shutil.copytree(data_dir / "tiny", tmp_path / "mine")
    plain = train.evaluate

    def evaluate(*args):
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)
        if remade:
            shutil.copytree(data_dir / "tiny", tmp_path / "mine")
            for name in ("meta.json", "tokenizer.json"):
                (tmp_path / "mine" / name).write_text("{}")
        return plain(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    cfg = config(dataset="mine", data_dir=str(tmp_path), eval_interval=1, max_iters=3)
    result = train.main(cfg)
    kept, given = (p / "tokenizer.json" for p in (newest(cfg), data_dir / "tiny"))
    assert kept.read_bytes() == given.read_bytes()
    assert prepare.load_tokenizer(newest(cfg)).encode("d") == result["tokenizer"].encode("d")


def test_a_full_disk_leaves_the_last_checkpoint(config, monkeypatch, fails):
    """Would catch a half-written folder under a checkpoint's name."""
    plain = train.write_text

    def full(path, text):
        if "000010" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        plain(path, text)

    monkeypatch.setattr(train, "write_text", full)
    cfg = config()
    fails(1, lambda: train.main(cfg), "No space left on device", cfg.out_dir)
    assert newest(cfg).name == "checkpoint-000005" and not list(Path(cfg.out_dir).glob(".tmp-*"))
    assert runtime.verify_checksums(newest(cfg)) is None


# ---------------------------------------------------------------------------------------------
# several processes


def on_two(cfg):
    """The Popen of train.py on two processes; it is killed where they wait for each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = subprocess.Popen([*command, str(ROOT / "train.py"), *options(cfg)], text=True,
                             stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    timer = threading.Timer(150, child.kill)
    timer.daemon = True
    timer.start()
    return child


@pytest.mark.slow
@pytest.mark.network_loopback
def test_two_processes_train_what_one_trains(config, tmp_path):
    """Would catch two independent runs, another data order, doubled output, a loss that is one
    process's own, and a checkpoint that only as many processes as wrote it can resume (two stopped
    at 7 and one x 2 made no update at all)."""
    one = config(batch_size=6, save_interval=7, eval_interval=4, **ADAMW)
    two = replace(one, out_dir=str(tmp_path / "two"), batch_size=3)
    train.main(one)
    with on_two(two) as both:
        said = both.communicate()[0]
    assert both.returncode == 0 and said.count("parameters") == 1 and "2 process(es)" in said
    again = copy_until(two, tmp_path / "again", 7)
    train.main(replace(again, gradient_accumulation_steps=2))
    for cfg in (two, again):
        assert np.allclose(numbers(one), numbers(cfg), atol=1e-5) and len(numbers(cfg)) == 11
        assert close_weights(weights(one), weights(cfg))
    losses = [[r["val_loss"] for r in log(cfg) if r["val_loss"]] for cfg in (one, two)]
    assert np.allclose(*losses, atol=1e-5) and len(losses[0]) == 4


@pytest.mark.slow
@pytest.mark.network_loopback
def test_two_processes_resume_and_stop_together(config):
    """Would catch a checkpoint of one process that two cannot resume, and a process that stops
    before the other has heard of the signal: they then waited for ever."""
    cfg = config(batch_size=6, max_iters=3)
    train.main(cfg)
    cfg = replace(cfg, batch_size=3, max_iters=100_000, save_interval=0, resume=True)
    with on_two(cfg) as both:
        for line in both.stdout:
            if line.startswith("iteration 5/"):
                workers = psutil.Process(both.pid).children()
                second = next(p for p in workers if p.environ().get("RANK") == "1")
                second.send_signal(signal.SIGTERM)
        assert both.wait(60) == 1  # torchrun's own code
    assert line.endswith("--resume\n") and runtime.verify_checksums(newest(cfg)) is None
    assert saved(cfg)["iter"] >= 5
