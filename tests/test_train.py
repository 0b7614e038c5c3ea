"""train.py: the data order, the schedule, resume, faults, processes."""

import json
import math
import os
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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import prepare
import runtime
import train

ROOT = Path(__file__).parent.parent
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TINY = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, batch_size=4, max_iters=8)
TINY |= dict(warmup_iters=2, eval_iters=2, log_interval=1, sample_tokens=0, mixed_precision="no")
TINY |= dict(optimizer="adamw", learning_rate=1e-3)  # Muon is in bf16: sums differ past 1e-5


@pytest.fixture
def config(data_dir, tmp_path):
    """config(**changes) -> a train.Config for a run of about a second in its own folder."""
    base = train.Config(dataset="tiny", data_dir=str(data_dir), out_dir=str(tmp_path / "run"))
    return lambda **changes: replace(base, **(TINY | changes))


def newest(cfg):
    return runtime.checkpoints(cfg.out_dir)[0]


def weights(cfg):
    return load_file(newest(cfg) / "model.safetensors")


def log(cfg):
    """log.csv without the throughput, which no two runs share."""
    rows = runtime.read_log(Path(cfg.out_dir) / "log.csv")
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(cfg, *first):
    options = [f"--{k}={v}" for k, v in vars(cfg).items()]
    return [*first, str(ROOT / "train.py"), *options]


def run(cfg, *first, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(cfg, *first), capture_output=True, text=True, env=env, **more)


def fails(capsys, code, *words):
    """The one line that an ended program said; it holds all of `words`."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    return code


# -- pure functions --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2000), st.integers(1, 64), st.integers(1, 7), st.integers(0, 5))
def test_every_window_once_an_epoch_and_none_past_the_end(length, block_size, rows, seed):
    """Would catch a batch that repeats or skips windows at an epoch's end, or reads past it."""
    n = train.n_windows(range(max(length, block_size + 1)), block_size)
    iterations = math.ceil(2 * n / rows)
    stream = np.concatenate([train.windows_of(t, rows, n, seed) for t in range(iterations)])
    assert sorted(stream[:n]) == sorted(stream[n : 2 * n]) == list(range(n))
    assert (n - 1) * block_size + block_size + 1 <= max(length, block_size + 1)


def test_epochs_and_seeds_differ_and_far_iterations_are_found_at_once():
    """Would catch one permutation for all epochs, and a stream that must be replayed on resume."""
    first, second = train.epoch_order(1, 0, 50), train.epoch_order(1, 1, 50)
    assert list(first) != list(second) != list(train.epoch_order(2, 1, 50))
    assert len(train.windows_of(10_000_000, 64, 1000, 1)) == 64


@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (10, 100), (10, 10)])
def test_lr_is_transformers_cosine_shifted_by_one(warmup, total):
    """Would catch a first update at 0, a last one above min_lr, and a kink after the warm-up."""
    from transformers import get_cosine_schedule_with_warmup

    cfg = train.Config(learning_rate=1.0, min_lr=0.0, warmup_iters=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for t in range(total):
        optimizer.step()
        scheduler.step()
        want = scheduler.get_last_lr()[0]
        assert train.lr_at(t, cfg, total) == pytest.approx(want, abs=1e-12)
    assert train.lr_at(0, cfg, total) > 0


def test_targets_are_one_ahead_and_windows_tile_the_split():
    """Would catch targets that equal the inputs, and windows that overlap."""
    tokens = np.arange(101, dtype=np.uint16)
    idx, targets = train.read_windows(tokens, np.array([0, 9]), 10, 101, torch.device("cpu"))
    assert torch.equal(idx + 1, targets)
    assert idx[0, 0] == 0 and targets[1, -1] == 100


def test_only_matrices_decay(data_dir):
    """Would catch weight decay on biases and LayerNorms; and a tied head counted twice."""
    model = train.GPT(train.GPTConfig(16, 50, 1, 2, 32))
    for name, optimizers in (("adamw", 1), ("muon", 2)):
        made = train.make_optimizers(model, train.Config(optimizer=name), torch.device("cpu"))
        assert len(made) == optimizers
        groups = [g for o in made for g in o.param_groups]
        assert all((g["weight_decay"] > 0) == (p.dim() > 1) for g in groups for p in g["params"])
        given = [id(p) for g in groups for p in g["params"]]
        assert sorted(given) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("bad", [False, True])
def test_fp16s_scale_serves_both_optimizers(bad):
    """Would catch what accelerate's wrappers do: the second optimizer's gradients divided by the
    scale twice; and one optimizer that takes a step with gradients of which the other's are NaN."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    ended, idx = [], torch.arange(16).view(2, 8)
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**20)):
        torch.manual_seed(0)
        model = train.GPT(train.GPTConfig(8, 16, 1, 2, 16))
        made = train.make_optimizers(model, train.Config(), torch.device("cpu"))
        wrapped = [AcceleratedOptimizer(optimizer, scaler=scaler) for optimizer in made]
        before = [p.clone() for p in model.parameters()]
        for _ in range(3):
            loss = model(idx, idx)[1]
            (scaler.scale(loss) if scaler else loss).backward()
            if bad:
                model.transformer.ln_f.bias.grad[0] = torch.nan
            for optimizer in made if scaler else ():
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            train.step(scaler, wrapped, bool(norm.isfinite()))
        assert not any(p.grad is not None for p in model.parameters())
        assert all(map(torch.equal, before, model.parameters())) == bad
        ended.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ended)
    assert scaler.get_scale() == 2.0 ** (17 if bad else 20)


# -- whole runs ------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_run_folder_is_complete(config, capsys):
    """Would catch a loop that trains nothing, and promised files that nobody wrote."""
    cfg = config(max_iters=60, eval_interval=20, save_interval=20, sample_tokens=10)
    train.main(cfg)
    rows, out = runtime.read_log(Path(cfg.out_dir) / "log.csv"), Path(cfg.out_dir)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert [r["iter"] for r in rows] == list(range(61))
    assert [r["iter"] for r in rows if r["val_loss"]] == [0, 20, 40, 60]
    assert [p.name for p in runtime.checkpoints(out)] == ["checkpoint-000060", "checkpoint-000040"]
    best = json.loads((out / "best" / "config.json").read_text("utf-8"))
    assert best["val_loss"] == min(r["val_loss"] for r in rows if r["val_loss"])
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "samples.md").read_text("utf-8").count("## iteration") == 4
    assert json.loads((out / "config.json").read_text("utf-8"))["max_iters"] == 60
    assert not list(out.glob(".tmp-*"))
    said = capsys.readouterr().out
    assert "perplexity" in said and "bits per byte" in said and "tokens/s" in said


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"gradient_accumulation_steps": 2}])
def test_n_plus_n_is_2n_bit_for_bit(config, tmp_path, changes):
    """Would catch a resume that replays batches, or loses dropout's or the optimizer's state."""
    whole = config(dropout=0.2, eval_interval=3, sample_tokens=5, **changes)
    train.main(whole)
    halves = replace(whole, out_dir=str(tmp_path / "halves"), max_iters=8, save_interval=4)
    train.main(halves)
    for folder in (newest(halves), Path(halves.out_dir) / "best"):
        runtime.remove(folder)  # as if killed after iteration 7: the log is ahead of checkpoint 4
    train.main(replace(halves, resume=True))
    assert same_weights(weights(whole), weights(halves))
    assert log(whole) == log(halves)
    samples = [(Path(c.out_dir) / "samples.md").read_text("utf-8") for c in (whole, halves)]
    assert samples[0] == samples[1]


def test_watching_a_run_does_not_change_it(config, tmp_path):
    """Would catch evaluation, sampling or saving that draws from training's random numbers."""
    plain = config(dropout=0.2, eval_interval=0, log_interval=1)
    watched = replace(plain, out_dir=str(tmp_path / "watched"), eval_interval=1, eval_iters=3)
    watched = replace(watched, save_interval=1, sample_tokens=7)
    train.main(plain)
    train.main(watched)
    assert [r["loss"] for r in log(plain)] == [r["loss"] for r in log(watched)][1:]
    assert same_weights(weights(plain), weights(watched))


def test_accumulation_changes_who_computes_a_row_not_which(config, tmp_path):
    """Would catch a step after each micro-batch, and a gradient that is a sum, not a mean."""
    logs = []
    for batch_size in (1, 2, 4, 8):
        cfg = config(batch_size=batch_size, gradient_accumulation_steps=8 // batch_size)
        cfg = replace(cfg, out_dir=str(tmp_path / str(batch_size)), eval_interval=0)
        train.main(cfg)
        logs.append([(r["loss"], r["lr"], r["grad_norm"]) for r in log(cfg)[1:]])
    for other in logs[1:]:
        assert np.allclose(np.array(other, float), np.array(logs[0], float), atol=1e-5)


def test_epochs_set_the_iterations(config):
    """Would catch max_epochs that counts rows of one process or rounds a pass away."""
    cfg = config(max_epochs=0.1)
    train.main(cfg)
    tokens = np.load(Path(cfg.data_dir) / "tiny" / "train.npy", mmap_mode="r")
    assert log(cfg)[-1]["iter"] == math.ceil(0.1 * train.n_windows(tokens, 16) / 4)


def on_two(cfg):
    """Run train.py on two processes; returns what it printed."""
    done = run(cfg, *TWO)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_two_processes_leave_no_threads(config, tmp_path):
    """gloo's threads, once they outlive their group, abort now and then as Python ends."""
    script = tmp_path / "threads.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import configurator, train
train.main(configurator.load(train.Config))
print("threads", *[(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()])
""")
    words = command(config(max_iters=1, batch_size=2))[1:]  # the options alone
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TWO, script, *words], capture_output=True, text=True, env=env)
    assert done.stdout.count("threads") == 2, done.stderr
    assert "gloo" not in done.stdout


@pytest.mark.slow
def test_two_processes_train_what_one_trains(config, tmp_path):
    """Would catch two independent runs, another data order, doubled output, a loss that is one
    process's own, and a checkpoint that only as many processes as wrote it can resume."""
    one = config(batch_size=8, max_iters=50, save_interval=25, keep_checkpoints=9)
    two = replace(one, out_dir=str(tmp_path / "two"), batch_size=4)
    train.main(one)
    said = on_two(two)
    assert said.count("parameters") == 1 and "2 process(es)" in said
    for name in ("two to two", "one to two", "two to one"):
        source = one if name.startswith("one") else two
        resumed = replace(one if name.endswith("one") else two, out_dir=str(tmp_path / name))
        shutil.copytree(source.out_dir, resumed.out_dir)
        runtime.remove(newest(resumed))
        (train.main if name.endswith("one") else on_two)(replace(resumed, resume=True))
        if name == "two to two":
            assert same_weights(weights(two), weights(resumed)) and log(two) == log(resumed)
    expected = [[(r["loss"], r["lr"], r["grad_norm"]) for r in log(one)[1:]]] * 4
    names = ("two", "two to two", "one to two", "two to one")
    seen = [log(replace(one, out_dir=str(tmp_path / name)))[1:] for name in names]
    seen = [[(r["loss"], r["lr"], r["grad_norm"]) for r in rows] for rows in seen]
    assert np.array(seen).shape == (4, 50, 3)
    assert np.allclose(np.array(seen), np.array(expected), atol=1e-5)


@pytest.mark.slow
def test_fsdp_trains_what_one_process_trains(config, tmp_path):
    """Would catch a head that FSDP has parted from the embedding, an optimizer state that is not
    saved, and a checkpoint of which each process holds a part."""
    one = config(batch_size=8, save_interval=4)
    two = replace(one, out_dir=str(tmp_path / "two"), batch_size=4, sample_tokens=3)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "config/accelerate/fsdp.yaml"), "--main_process_port", "0"]
    train.main(one)
    for cfg in (two, replace(two, resume=True)):
        done = run(cfg, *launch)
        assert done.returncode == 0, done.stderr
        numbers = [[(r["loss"], r["lr"], r["grad_norm"]) for r in log(c)[1:]] for c in (one, two)]
        assert np.allclose(*np.array(numbers, float), atol=1e-5)
        if not cfg.resume:
            whole = weights(cfg)
            runtime.remove(newest(two))
    assert same_weights(whole, weights(two))
    sample = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={two.out_dir}", "--start=def"]
    assert subprocess.run(sample, capture_output=True, check=True).stdout.count(b"def")
    assert "--optimizer=adamw" in run(replace(two, optimizer="muon"), *launch).stderr


def test_shards_are_read_as_one_data_set(config, data_dir, tmp_path):
    """Would catch windows that end at a shard's border or a checkpoint without its tokenizer."""
    whole = config(save_interval=4)
    train.main(whole)
    arrays = {s: np.load(data_dir / "tiny" / f"{s}.npy") for s in prepare.SPLITS}
    meta = json.loads((data_dir / "tiny" / "meta.json").read_text("utf-8"))
    for i in range(3):
        shard = tmp_path / f"data/tiny/shard-00{i}-of-003"
        shutil.copytree(data_dir / "tiny", shard)
        for split, tokens in arrays.items():
            mine = np.array_split(tokens, [1000, 1013])[i]
            np.save(shard / f"{split}.npy", mine)
            meta[f"{split}_tokens"] = len(mine)
        (shard / "meta.json").write_text(json.dumps(meta), "utf-8")
    sharded = replace(whole, data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / "sharded"))
    train.main(sharded)
    assert log(sharded) == log(whole) and same_weights(weights(sharded), weights(whole))
    assert prepare.read_meta(newest(sharded))["train_tokens"] == len(arrays["train"])
    assert prepare.load_tokenizer(newest(sharded)).encode("def")


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(config, tmp_path, number, code):
    """Would catch a signal that loses work, and a resume that differs from an unbroken run."""
    cfg = config(max_iters=100_000, eval_interval=0)
    cfg = replace(cfg, warmup_iters=0, min_lr=cfg.learning_rate)
    with subprocess.Popen(command(cfg, sys.executable), stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("iteration 3:"):
                child.send_signal(number)
        assert child.wait(60) == code
    done = json.loads((newest(cfg) / "config.json").read_text("utf-8"))["iter"]
    assert done >= 3 and runtime.damage(newest(cfg)) is None
    more = replace(cfg, resume=True, max_iters=done + 3)
    train.main(more)
    whole = replace(more, resume=False, out_dir=str(tmp_path / "whole"))
    train.main(whole)
    assert same_weights(weights(whole), weights(more))


def test_a_second_signal_stops_at_once(config):
    """Would catch a run that cannot be stopped while an update hangs."""
    cfg = config(max_iters=100, eval_interval=0)
    hang = (
        "plain = train.lr_at; train.lr_at = lambda t, *r: (t == 3 and sleep(600)) or plain(t, *r)"
    )
    script = f"import sys, train; from time import sleep; {hang}; train.main({cfg!r})"
    script = script.replace("Config(", "train.Config(").replace("train.train.", "train.")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as child:  # fmt: skip
        for line in child.stdout:
            if line.startswith(("iteration 3:", "SIGINT: saving")):
                child.send_signal(signal.SIGINT)
        assert child.wait(60) == -signal.SIGINT
    assert not runtime.checkpoints(cfg.out_dir)


def poison(monkeypatch, bad):
    """Make the gradient NaN in the updates (from 0) for which bad(update) is true."""
    plain, update = train.windows_of, [0]
    forward = train.GPT.forward

    def windows_of(iteration, *rest):
        update[0] = iteration
        return plain(iteration, *rest)

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        return logits, loss * math.nan if self.training and bad(update[0]) else loss

    monkeypatch.setattr(train, "windows_of", windows_of)
    monkeypatch.setattr(train.GPT, "forward", poisoned)


def test_a_bad_update_is_skipped_and_counted(config, monkeypatch, capsys):
    """Would catch NaN that reaches the weights."""
    poison(monkeypatch, lambda update: update in (2, 5))
    cfg = config()
    train.main(cfg)
    assert json.loads((newest(cfg) / "config.json").read_text("utf-8"))["skipped"] == 2
    assert all(torch.isfinite(w).all() for w in weights(cfg).values())
    assert "2 update(s) skipped" in capsys.readouterr().out


def test_ten_bad_updates_in_a_row_end_the_run(config, monkeypatch, capsys):
    """Would catch a broken run that burns its hours, or overwrites its last good checkpoint."""
    poison(monkeypatch, lambda update: update >= 5)
    cfg = config(max_iters=50, save_interval=4)
    with pytest.raises(SystemExit) as stop:
        train.main(cfg)
    assert stop.value.code == fails(capsys, 1, "iteration 15", "10 updates")
    assert newest(cfg).name == "checkpoint-000012" and runtime.damage(newest(cfg)) is None


def test_bad_updates_that_are_not_in_a_row_do_not_end_the_run(config, monkeypatch):
    """Would catch a count of all bad updates where one of those in a row is promised."""
    cfg = config(max_iters=24, eval_interval=0)
    poison(monkeypatch, lambda t: t % 2)
    train.main(cfg)
    assert json.loads((newest(cfg) / "config.json").read_text("utf-8"))["skipped"] == 12


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(config):
    """Would catch a process that stops before the others have heard of it: they wait for ever then,
    as they did when each looked at its own flag."""
    cfg = config(max_iters=100_000, batch_size=2)
    words = command(cfg, *TWO)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as both:
        timer = threading.Timer(90, both.kill)  # they wait for each other where this fails
        timer.start()
        for line in both.stdout:
            if line.startswith("iteration 3:"):
                workers = psutil.Process(both.pid).children()
                second = next(p for p in workers if p.environ().get("RANK") == "1")
                second.send_signal(signal.SIGTERM)
        assert both.wait(60) == 1  # torchrun's own code
        timer.cancel()
    assert line.startswith("stopped at iteration") and runtime.damage(newest(cfg)) is None


@pytest.mark.parametrize("how", ["truncate", "flip", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(config, capsys, how):
    """Would catch a resume from half a file, and a traceback for it."""
    cfg = config(save_interval=4)
    train.main(cfg)
    file = newest(cfg) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:1000] if how == "truncate" else content)
    if how == "missing":
        file.unlink()
    train.main(replace(cfg, resume=True, max_iters=9))
    said = capsys.readouterr().out
    assert "checkpoint-000008 is skipped" in said and "model.safetensors" in said
    assert "resuming from" in said and newest(cfg).name == "checkpoint-000009"


def test_a_full_folder_is_not_overwritten(config, capsys):
    """Would catch a fresh run that eats an old one, and a resume of nothing."""
    cfg = config()
    with pytest.raises(SystemExit) as stop:
        train.main(replace(cfg, resume=True))
    assert stop.value.code == fails(capsys, 1, "--resume=True", cfg.out_dir)
    train.main(cfg)
    before = {p: p.read_bytes() for p in Path(cfg.out_dir).rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        train.main(cfg)
    assert stop.value.code == fails(capsys, 1, "--resume=True", "--overwrite=True")
    with pytest.raises(SystemExit) as stop:
        train.main(replace(cfg, resume=True, n_layer=3))
    assert stop.value.code == fails(capsys, 2, "--n_layer is 3", "made with 2")
    assert before == {p: p.read_bytes() for p in Path(cfg.out_dir).rglob("*") if p.is_file()}
    train.main(replace(cfg, overwrite=True, max_iters=2))
    assert [p.name for p in runtime.checkpoints(cfg.out_dir)] == ["checkpoint-000002"]
    assert len(log(cfg)) == 3


def test_a_full_disk_leaves_the_last_checkpoint(config, monkeypatch, capsys):
    """Would catch a half-written folder under a checkpoint's name."""
    cfg = config(save_interval=4)
    plain = train.save_file

    def full(tensors, path):
        if "000008" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        plain(tensors, path)

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(SystemExit) as stop:
        train.main(cfg)
    assert stop.value.code == fails(capsys, 1, "No space left on device")
    assert newest(cfg).name == "checkpoint-000004" and runtime.damage(newest(cfg)) is None
    assert not list(Path(cfg.out_dir).glob(".tmp-*"))


def test_two_runs_do_not_share_a_folder(config, capsys):
    """Would catch two runs that write one log."""
    cfg = config()
    lock = runtime.lock_folder(cfg.out_dir)
    with pytest.raises(SystemExit) as stop:
        train.main(cfg)
    assert stop.value.code == fails(capsys, 1, "another run", cfg.out_dir)
    lock.release()


@pytest.mark.parametrize(
    "changes, code, words",
    [
        (dict(block_size=100_000), 1, ["train.npy", "100000", "--block_size"]),
        (dict(batch_size=10_000), 1, ["train.npy", "10000", "--batch_size"]),
        (dict(n_head=5), 2, ["--n_embd 32", "--n_head 5"]),
        (dict(dataset="nowhere"), 1, ["nowhere", "prepare.py"]),
        (dict(dropout=1.5), 2, ["--dropout 1.5"]),
        (dict(learning_rate=math.nan), 2, ["--learning_rate", "nan"]),
        (dict(batch_size=0), 2, ["--batch_size", "0"]),
        (dict(beta2=1.0), 2, ["--beta2 1.0"]),
        (dict(init_from="gpt3"), 2, ["gpt3", "gpt2-medium"]),
        (dict(out_dir="../elsewhere"), 2, ["../elsewhere"]),
    ],
)
def test_bad_input_is_one_line(config, capsys, changes, code, words):
    """Would catch a traceback, or an error after the first slow step."""
    with pytest.raises(SystemExit) as stop:
        train.main(config(**changes))
    assert stop.value.code == fails(capsys, code, *words)


def test_a_token_past_the_vocabulary_is_named(config, data_dir, tmp_path, capsys):
    """Would catch an index error deep in the embedding, or worse, none on a GPU."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("meta.json", "tokenizer.json", "val.npy"):
        (folder / name).write_bytes((data_dir / "tiny" / name).read_bytes())
    tokens = np.load(data_dir / "tiny" / "train.npy")
    tokens[77] = 5000
    np.save(folder / "train.npy", tokens)
    with pytest.raises(SystemExit) as stop:
        train.main(config(dataset="broken", data_dir=str(tmp_path)))
    assert stop.value.code == fails(capsys, 1, "train.npy", "5000")


def test_compile_that_fails_goes_on_without(config, monkeypatch, capsys):
    """Would catch a run that dies, or trains differently, where no compiler is installed."""

    def broken(self):
        def call(*args, **kwargs):
            raise RuntimeError("no compiler")

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    cfg = config(compile=True)
    train.main(cfg)
    assert "--compile failed" in capsys.readouterr().out
    assert log(cfg)[-1]["iter"] == 8


def test_fp16_on_a_cpu_warns_once_and_trains(config, capsys):
    """Would catch fp16 autocast on a CPU, which is slow and overflows."""
    train.main(config(mixed_precision="fp16"))
    said = capsys.readouterr().out
    if not torch.accelerator.is_available():
        assert said.count("needs a GPU") == 1 and "precision no" in said


def test_a_notebook_gets_a_bar_and_a_pipe_gets_lines(monkeypatch):
    """Would catch a notebook, whose output is no terminal, without its progress bar."""
    assert runtime.progress_bar(3, 0).disable
    monkeypatch.setitem(sys.modules, "ipykernel", math)
    assert not runtime.progress_bar(3, 0).disable
    assert runtime.progress_bar(3, 0, shown=False).disable
