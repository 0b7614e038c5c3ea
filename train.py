"""Stage 2: train a GPT on what prepare.py wrote. Read it from train() down, then its helpers.

python train.py                                # 3 minutes on 2 CPU cores with bf16, no network
python train.py config/verdict.py              # a recipe; options after it override it
python train.py --dataset=mine --minutes=10    # your text: the rest is chosen from its size
python train.py --out_dir=out/mine --resume    # continue from the newest intact checkpoint
accelerate launch train.py                     # several GPUs
torchrun --nproc_per_node 2 train.py           # several processes, GPUs or not
"""

import contextlib
import copy
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

from configurator import changed, commit, load


@dataclass
class Config:
    """Train a GPT."""

    # data and run
    dataset: str = "stdlib"  # the folder under data_dir; a missing preset is prepared first
    data_dir: str = "data"  # where prepare.py writes
    out_dir: str | None = None  # None: out/<dataset>
    init_from: str = "scratch"  # or the weights of a GPT-2, Llama or Qwen3: hub name or folder
    resume: bool = False  # continue from the newest intact checkpoint in out_dir
    overwrite: bool = False  # start again in an out_dir that holds a run
    seed: int = 1337  # of the weights, the order of the data and dropout
    # model; see model.GPTConfig. None: chosen from the length of the run
    block_size: int = 512  # tokens of context
    n_layer: int | None = None  # blocks
    n_head: int | None = None  # query heads a block
    n_embd: int | None = None  # width
    dropout: float | None = None  # pays when the data is seen many times
    bias: bool = False  # in LayerNorm and Linear
    qkv_bias: bool = False  # in c_attn
    tie_weights: bool | None = None  # one matrix for embedding and head
    init: Literal["gpt2", "torch", "local", None] = None  # initial weights; None: local with rope
    n_kv_head: int | None = None  # key/value heads; None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_inner: int | None = None  # width inside the MLP; None: 4 n_embd, with swiglu 8/3
    rope_theta: float | None = 10_000.0  # base of rotary positions; None: learned positions
    rms_norm: bool = True  # RMSNorm instead of LayerNorm
    swiglu: bool = True  # SwiGLU instead of GELU
    qk_norm: bool = True  # RMSNorm on queries and keys
    embd_norm: bool = True  # RMSNorm on token embeddings
    norm_eps: float = 1e-6  # of every norm
    # one iteration = one update of batch_size x gradient_accumulation_steps x processes sequences
    batch_size: int = 4  # sequences of a micro-batch on each process
    gradient_accumulation_steps: int = 1  # micro-batches an update
    max_iters: int | None = None  # updates; None: chosen from the size of the data
    max_epochs: float | None = None  # instead: passes over the training split
    minutes: float | None = None  # instead: as many updates as fit, 10 epochs at most (tiny: 20)
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for hidden matrices, AdamW for the rest
    learning_rate: float = 1e-2  # at its peak
    min_lr: float = 0.0  # at the last update
    embedding_lr: float | None = None  # peak for embeddings; None: learning_rate, doubled with muon
    head_lr: float | None = None  # peak for an untied head; None: learning_rate or, with muon, less
    schedule: Literal["linear", "cosine"] = "linear"  # from the peak to min_lr
    warmup_iters: int | None = None  # of linear warm-up; None: a tenth of the run, at most 40
    weight_decay: float = 0.1  # of matrices; with muon of the hidden ones
    beta1: float = 0.9  # AdamW
    beta2: float = 0.99  # AdamW
    momentum: float = 0.9  # Muon
    grad_clip: float = 1.0  # norm the gradient is clipped to; 0: not clipped
    # how often to evaluate, log and save; how many checkpoints to keep
    eval_interval: int | None = None  # iterations; 0: only at the end; None: a quarter of the run
    eval_iters: int = 20  # batches of batch_size windows of each split, on each process
    log_interval: int = 10  # iterations between rows of log.csv
    save_interval: int = 0  # iterations; 0: every 15 minutes and at the end
    keep_checkpoints: int = 2  # newest ones kept, besides best/
    sample_start: str | None = None  # prompt at each evaluation; None: words from the val split
    sample_tokens: int = 100  # length of that text; 0: none
    sample_temperature: float = 0.8  # 0: greedy
    # machine
    mixed_precision: Literal["auto", "fp16", "bf16", "no"] = "auto"  # weights stay fp32
    compile: bool = False  # torch.compile: slow to start, then faster
    log_with: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # tracker beside log.csv
    dry_run: bool = False  # measure a few updates, say what the run would cost, write nothing
    ALTERNATIVES: ClassVar = (("max_iters", "max_epochs", "minutes"),)
    RETIRED: ClassVar = {"tokens_per_s": "measured: leave it out"}


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import numpy as np
import torch
from safetensors.torch import save_model

import prepare
import runtime
from model import GPT, GPTConfig
from runtime import UserError, check_range, disk_errors, one_line, print0, write_text
from sample import encode_prompt, generate, read_prompt

try:  # torch.optim.Muon, faster on some CPUs
    from fast import Muon
except ModuleNotFoundError:
    from torch.optim import Muon

DATA_IDENTITY = ("source_sha256", "train_tokens", "val_tokens", "vocab_size", "tokenizer",
                 "tokenizer_sha256")
MODEL_FIELDS = [f.name for f in fields(GPTConfig) if f.name != "vocab_size"]

# ---------------------------------------------------------------------------------------------
# the run


def train(cfg, out_dir, stop, checkpoint, saved):
    """The whole run, from top to bottom. checkpoint, saved: what runtime.find_run found."""

    # -- settings, processes, data; nothing is deleted yet -------------------------------------
    cfg = settings_of(cfg, checkpoint, saved)
    tracker = None if cfg.log_with == "none" else cfg.log_with
    if tracker:
        from accelerate.tracking import get_available_trackers  # slow

        if tracker not in map(str, get_available_trackers()):
            raise UserError(f"--log_with={tracker} needs a package: pip install {tracker}")
    accelerator = runtime.make_accelerator(cfg.mixed_precision, log_with=tracker,
                                           project_dir=out_dir)
    device = accelerator.device
    world = accelerator.num_processes
    with accelerator.main_process_first():  # a missing preset is prepared once
        meta, data, tokenizer, files = load_data(cfg)
    began = time.perf_counter()  # a download is no part of --minutes
    vocab_size = meta["vocab_size"]
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * world
    check_data(cfg, data, vocab_size, rows)
    train_windows = count_windows(data["train"], cfg.block_size)

    def measure(cfg):
        model = make_model(cfg, vocab_size, saved, tokenizer)
        return measure_run(model, data, cfg, accelerator, rows, began)

    cfg = choose(cfg, train_windows, rows, vocab_size, measure)
    model = make_model(cfg, vocab_size, saved, tokenizer)
    if checkpoint:
        check_resume(cfg, checkpoint, saved, meta, model.config, rows)
    if cfg.sample_start is None:
        text = tokenizer.decode(data["val"][:64])
        words = re.search(r"\s(\S+(\s+\S+){0,2})", text)  # the split may begin inside a word
        cfg = replace(cfg, sample_start=words[1] if words else text[:8])
    prompt = None
    if cfg.sample_tokens:  # an error now, not at an evaluation
        prompt = encode_prompt(model, tokenizer, cfg.sample_start)

    # -- optimizers ----------------------------------------------------------------------------
    it = int(checkpoint.name[11:]) if checkpoint else 0
    if it > cfg.max_iters:
        raise UserError(f"{checkpoint} has done {it} iterations, more than the {cfg.max_iters} "
                        "asked for, which count from the first; give a larger --max_iters, or "
                        "start again with --overwrite", 2)
    if cfg.dry_run:
        announce(cfg, accelerator, model, data, rows)
        found = measure_run(model, data, cfg, accelerator, rows, began)
        return dry_run(cfg, model, *found)
    model.to(device).train()
    optimizers = make_optimizers(model, cfg, device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    bare = accelerator.unwrap_model(model)
    if checkpoint:
        runtime.load_checkpoint(accelerator, checkpoint, optimizers)
    if cfg.compile:
        bare.compile()

    announce(cfg, accelerator, bare, data, rows)
    if checkpoint:
        print0(f"resuming from {checkpoint} at iteration {it:,}")
    if checkpoint and it == cfg.max_iters:
        print0(f"the run is finished; a longer one: {stop.command} "
               f"--max_iters={2 * it}, whose learning rate rises again to that schedule's")
        return {"model": bare.eval(), "tokenizer": tokenizer,
                "history": runtime.read_log(out_dir / "log.csv")}
    if checkpoint and cfg.max_iters != saved["train"].get("max_iters"):
        print0(f"the run now ends at iteration {cfg.max_iters:,}: the learning rate continues at "
               f"{lr_at(it, cfg):.2e} on the schedule of that length")

    # -- the run folder: from here on the old run is gone --------------------------------------
    losses = {name: saved[name] for name in ("train_loss", "val_loss") if name in saved}
    best = saved.get("best_val_loss") or math.inf
    best_iter = saved.get("best_iter", 0)
    bad_updates = runtime.BadUpdates(saved.get("skipped", 0))
    info = {"script": "train.py", "model": asdict(bare.config), "train": asdict(cfg), "rows": rows,
            "resumed": saved.get("resumed", []) + ([it] if checkpoint else []),
            "command": saved.get("command") or " ".join(sys.argv), "commit": commit(),
            "machine": runtime.describe_machine(accelerator),
            "started": saved.get("started") or time.strftime("%Y-%m-%d %H:%M")}
    stop.catch()
    if accelerator.is_main_process:
        with disk_errors(out_dir):
            if cfg.overwrite:
                runtime.clear_run(out_dir)
            trim_samples(out_dir / "samples.md", it if checkpoint else -1)
            write_text(out_dir / "run.json", json.dumps(info, indent=2))
    log = runtime.RunLog(out_dir, cfg.max_iters, it if checkpoint else -1,
                         accelerator.is_main_process)
    settings = {k: "None" if v is None else v for k, v in asdict(cfg).items()}  # trackers take none
    accelerator.init_trackers(out_dir.name, settings)  # no tracker: nothing happens
    row = {"iter": 0, "tokens": 0}
    tokens_since = 0
    updates_before = 0.0
    signum, late = 0, False
    fresh = not checkpoint  # a checkpoint's iteration was evaluated, logged and saved before

    while True:
        last = it == cfg.max_iters

        # -- once in a while: evaluate, sample, log, save --------------------------------------
        due = cfg.eval_interval and it % cfg.eval_interval == 0
        if fresh and (due or last):
            with log.stage("evaluation"):
                losses = evaluate(model, data, cfg, accelerator, vocab_size)
            row |= losses
            log.print(f"iteration {it}: {describe_losses(losses, meta)}")
            if cfg.sample_tokens and accelerator.is_main_process:
                with log.stage("samples"):
                    text = sample_text(bare, tokenizer, prompt, cfg)
                append_sample(out_dir / "samples.md", it, losses["val_loss"], text)
        if fresh and ("val_loss" in row or it and it % cfg.log_interval == 0):
            log.write(row)
            accelerator.log(row, step=it)  # to the trackers
        improved = it and row.get("val_loss", math.inf) < best
        if improved:
            best = row["val_loss"]
            best_iter = it
        elif "val_loss" in row and row["val_loss"] > 1.02 * best:
            log.print(f"val loss has risen since iteration {best_iter} ({best:.3f}, kept in best/)")
        info |= {"iter": it, "skipped": bad_updates.skipped, "best_iter": best_iter,
                 "best_val_loss": best if best < math.inf else None,
                 "seconds": saved.get("seconds", 0.0) + time.perf_counter() - log.began, **losses}

        def write(folder):
            """best/ holds what sample.py needs, a checkpoint what --resume needs besides."""
            if folder.name != ".tmp-best":
                accelerator.save_state(str(folder))  # weights, optimizers, scaler
            elif accelerator.is_main_process:
                save_model(bare, folder / "model.safetensors")
            if accelerator.is_main_process:
                for name, content in {**files, "run.json": json.dumps(info, indent=2)}.items():
                    write_text(folder / name, content)

        if improved:
            with log.stage("checkpoints"):
                runtime.save_checkpoint(accelerator, out_dir / "best", write)
        save_due = late or cfg.save_interval and it % cfg.save_interval == 0
        if fresh and (save_due or last or signum) and it:
            with log.stage("checkpoints"):
                folder = out_dir / f"checkpoint-{it:06d}"
                runtime.save_checkpoint(accelerator, folder, write, cfg.keep_checkpoints)
                stop.saved_at = time.monotonic()
                log.plot(resumed=info["resumed"])
        if last or signum:
            break

        # -- one update ------------------------------------------------------------------------
        with log.stage("updates"):
            lr = lr_at(it, cfg)
            runtime.set_learning_rate(optimizers, lr)
            # dropout is a pure function of (seed, iteration, process)
            torch.manual_seed(runtime.derive_seed(cfg.seed, it, accelerator.process_index))
            windows = windows_of(it, rows, train_windows, cfg.seed)
            windows = windows.reshape(cfg.gradient_accumulation_steps, world, cfg.batch_size)
            micro_batches = (
                read_windows(data["train"], micro, cfg.block_size, vocab_size, device)
                for micro in windows[:, accelerator.process_index]
            )
            loss, norm = update(model, optimizers, micro_batches, cfg, accelerator)
            (loss,), signum, late = stop.agree(accelerator, loss)
        it += 1
        fresh = True

        # -- log -------------------------------------------------------------------------------
        if bad_updates.count(math.isfinite(norm), it):
            log.print(f"warning: iteration {it}: gradient norm {norm}, update skipped")
        tokens_since += rows * cfg.block_size
        speed = tokens_since / (log.seconds["updates"] - updates_before)
        row = {"iter": it, "tokens": it * rows * cfg.block_size, "lr": lr, "loss": loss,
               "grad_norm": norm, "tokens_per_s": speed}
        logged = it % cfg.log_interval == 0
        log.progress(it, f"loss {loss:.3f}, {speed:,.0f} tokens/s" if logged else "")
        if logged:
            tokens_since = 0
            updates_before = log.seconds["updates"]

    # -- the end -------------------------------------------------------------------------------
    skipped = f", {bad_updates.skipped} update(s) skipped" if bad_updates.skipped else ""
    kept = f"; best val loss {best:.3f} at iteration {best_iter}" if best < math.inf else ""
    done = "stopped" if signum else "done"
    print0(f"{done} at iteration {it:,}: {out_dir}{skipped}{kept}; {log.close()}")
    accelerator.wait_for_everyone()  # the first process may still be drawing
    accelerator.end_training()
    if signum:
        stop.exit(signum, out_dir)
    return {"model": bare.eval(), "tokenizer": tokenizer,
            "history": runtime.read_log(out_dir / "log.csv")}


def main(cfg, script="train.py"):
    """Hold the run folder and the signals for as long as the run lasts; see train().

    Returns {"model", "tokenizer", "history"}: the trained GPT in eval mode, its prepare.Tokenizer
    and the rows of log.csv; None after a dry run. Raises UserError.
    """
    check_config(cfg)
    out_dir = Path(cfg.out_dir or f"out/{cfg.dataset}")
    if cfg.dry_run:
        return train(cfg, out_dir, None, *runtime.find_run(out_dir, cfg.resume, not cfg.resume))
    with runtime.hold_run(script, out_dir) as stop:
        return train(cfg, out_dir, stop, *runtime.find_run(out_dir, cfg.resume, cfg.overwrite))


# ---------------------------------------------------------------------------------------------
# data: windows of block_size tokens, never overlapping; window i is tokens i*T .. (i+1)*T


def load_data(cfg):
    """(meta, {split: token array}, tokenizer, {name: content} of its files) of the data set, read
    once: the folder may change while the run goes. Prepares a missing preset."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if not prepare.is_prepared(folder):
        if cfg.dataset not in prepare.PRESETS:
            raise UserError(f"{folder} holds no prepared data; prepare it: "
                            f"python prepare.py --dataset={cfg.dataset} --source=PATH")
        if cfg.dry_run:
            raise UserError(f"{folder} is not prepared, and a dry run writes nothing; first: "
                            f"python prepare.py --dataset={cfg.dataset}")
        print0(f"{folder} is not there yet: preparing it")
        prepare.main(prepare.Config(dataset=cfg.dataset, data_dir=cfg.data_dir))
    data = {split: prepare.open_split(folder, split) for split in ("train", "val")}
    tokenizer = prepare.load_tokenizer(folder)
    return prepare.read_meta(folder), data, tokenizer, prepare.tokenizer_files(folder, tokenizer)


def check_data(cfg, data, vocab_size, rows):
    """Raise UserError where a split cannot fill a window or a batch, or holds an unknown token."""
    for split, tokens in data.items():
        file = f"{cfg.data_dir}/{cfg.dataset}/{split}.npy"
        if len(tokens) < cfg.block_size + 1:
            shorter = f"use --block_size {len(tokens) - 1} or" if len(tokens) > 1 else "prepare"
            raise UserError(f"{file} has {len(tokens):,} tokens, too few for one window of "
                            f"--block_size {cfg.block_size} + 1; {shorter} more text")
        n = count_windows(tokens, cfg.block_size)
        if split == "train" and n < rows:
            raise UserError(f"{file} has {n} windows of {cfg.block_size} tokens, fewer than the "
                            f"{rows} sequences of one iteration; lower --batch_size, "
                            "--gradient_accumulation_steps or --block_size")
        highest = int(tokens[: 2**26].max())  # the rest is checked as it is read
        if highest >= vocab_size:
            raise UserError(f"{file} holds token {highest}, past the vocabulary of {vocab_size} "
                            "tokens; run prepare.py again")


def count_windows(tokens, block_size):
    """The number of windows of block_size tokens, each followed by one more to predict."""
    return (len(tokens) - 1) // block_size


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """A permutation of the n windows that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def windows_of(iteration, rows, n, seed):
    """The `rows` windows of one iteration: a pure function, so any iteration is found at once.

    The stream of rows continues over the ends of epochs; each epoch holds each window once.
    """
    stream = range(iteration * rows, (iteration + 1) * rows)
    return np.array([epoch_order(seed, i // n, n)[i % n] for i in stream])


def read_windows(tokens, windows, block_size, vocab_size, device):
    """Window numbers (B,) -> idx, targets (B, T) on `device`, targets one token ahead."""
    starts = windows * block_size
    x = np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64)
    if x.max() >= vocab_size:
        raise UserError(f"the data holds token {x.max()}, past the vocabulary of {vocab_size}")
    x = torch.from_numpy(x)
    if device.type == "cuda":
        x = x.pin_memory().to(device, non_blocking=True)
    x = x.to(device)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------
# what is not set by hand


# Measured, see docs/LOG.md. A narrow model sees more tokens in the same time: it wins as long as
# they are few, and memorizes a small text later. Tokens of a run up to which a width holds; the
# first has 3 layers for the same reason, 4 where the text is repeated:
WIDTHS = ((3.5e6, 128), (25e6, 192), (math.inf, 256))
# A text that is repeated needs dropout and a slow head, which memorizes first; one that is not
# loses by both. Epochs up to which a line holds; dropout; the head's part of learning_rate; whether
# embedding and head are one matrix. In models wider than 128 they always are.
REPEATS = ((3, 0.0, 1.0, False), (5, 0.1, 0.3, False), (math.inf, 0.2, 0.3, True))
TIED = (75_000, 2_048)  # but only from so many tokens of a text and of a vocabulary on
UPDATES = 1_450  # of a run whose length is not given
EVALUATIONS = 5  # of a run at most, one before the first update; or --eval_interval
MAX_EPOCHS = 10  # of a run whose length is not given, or given in minutes,
MIN_ITERS = 40  # but up to twice as many epochs where a tiny text has fewer updates


def choose(cfg, train_windows, rows, vocab_size, measure):
    """cfg with its length settled, from max_epochs or minutes where one is given, and what is None
    of shape, init, dropout, tie_weights, head_lr, warmup_iters, eval_interval chosen to suit it.

    measure: what measure_run returns, as a function of cfg.
    """
    epoch = train_windows / rows
    most = math.ceil(min(2 * MAX_EPOCHS * epoch, max(MAX_EPOCHS * epoch, MIN_ITERS)))

    def settle(iters):
        """cfg for a run of so many updates."""
        chosen = {"warmup_iters": min(40, iters // 10),
                  "eval_interval": max(1, math.ceil(iters / (EVALUATIONS - 1)))}
        _, chosen["dropout"], head, tie = next(
            line for line in REPEATS if iters - 1 < line[0] * epoch)
        tied = cfg.tie_weights
        if cfg.init_from == "scratch":
            tokens = min(iters, most) * rows * cfg.block_size
            width = cfg.n_embd or next(width for up_to, width in WIDTHS if tokens <= up_to)
            heads = cfg.n_head or (math.gcd(4, width // 2) if width % 64 else width // 64)
            heads += -heads % (cfg.n_kv_head or 1)
            width += -width % (2 * heads)  # an even width of each, for rotary positions
            few = width < WIDTHS[1][1] and not chosen["dropout"]
            chosen |= {"n_layer": 3 if few else 4, "n_embd": width, "n_head": heads}
            chosen["init"] = "gpt2" if cfg.rope_theta is None else "local"
            if tied is None:
                pays = train_windows * cfg.block_size >= TIED[0] and vocab_size >= TIED[1]
                pays = pays and (tie or width > WIDTHS[0][1])
                tied = pays and cfg.optimizer == "muon" and cfg.head_lr is None
            chosen["tie_weights"] = tied
        if head < 1 and cfg.optimizer == "muon" and not tied and not cfg.resume:
            chosen["head_lr"] = head * cfg.learning_rate
        chosen = {name: value for name, value in chosen.items() if getattr(cfg, name) is None}
        return replace(cfg, max_iters=iters, max_epochs=None, minutes=None, **chosen)

    def fitting(tried):
        """How many updates fit into cfg.minutes."""
        update, evaluation, elapsed, _ = measure(tried)
        if cfg.eval_interval:
            update += evaluation / cfg.eval_interval
        once = EVALUATIONS if cfg.eval_interval is None else 1
        left = cfg.minutes * 60 - elapsed - once * evaluation
        return min(most, max(1, int(left / update)))

    iters = min(UPDATES, most) if cfg.max_iters is None else cfg.max_iters
    if cfg.max_epochs:
        iters = math.ceil(cfg.max_epochs * train_windows / rows)
    if cfg.minutes:
        tried = settle(1)
        iters = fitting(tried)
        cfg = replace(cfg, n_embd=settle(iters).n_embd)  # by what fits the narrowest
        for _ in range(2):  # width and dropout take time; dropout depends on the length
            wanted = settle(iters)
            if (wanted.n_embd, wanted.dropout) == (tried.n_embd, tried.dropout):
                break
            tried = wanted
            iters = min(iters, fitting(tried))
    return settle(iters)


# ---------------------------------------------------------------------------------------------
# optimisation


def lr_at(iteration, cfg):
    """Learning rate of update `iteration` (from 0): linear warm-up, whose first value is above 0,
    then `schedule` to min_lr at the last update (cosine: Loshchilov & Hutter 2017)."""
    step = iteration + 1
    if step <= cfg.warmup_iters or cfg.max_iters == 1:
        return cfg.learning_rate * step / max(1, cfg.warmup_iters)
    left = (cfg.max_iters - step) / (cfg.max_iters - cfg.warmup_iters)  # 1 at the peak, 0 at last
    if cfg.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * left


def make_optimizers(model, cfg, device):
    """AdamW, weight decay on matrices only; with muon two optimizers (Jordan et al. 2024)."""
    muon = cfg.optimizer == "muon"
    hidden = [p for p in model.transformer.h.parameters() if p.dim() >= 2] if muon else []
    taken = {id(p) for p in hidden}
    groups = {}  # (is a matrix, factor of the learning rate): parameters
    for name, p in model.named_parameters():
        if id(p) in taken:
            continue
        scale, own = 1.0, None
        if name.startswith("transformer.w"):
            scale, own = 2.0 if muon else 1.0, cfg.embedding_lr
        elif name.startswith("lm_head"):
            own = cfg.head_lr
        if own is not None and cfg.learning_rate:  # check_config: else `own` is 0 too
            scale = own / cfg.learning_rate
        groups.setdefault((p.dim() >= 2, scale), []).append(p)
    groups = [{"params": params, "lr_scale": scale,
               "weight_decay": cfg.weight_decay if matrix and not muon else 0.0}
              for (matrix, scale), params in groups.items()]
    fused = device.type in ("cuda", "cpu")
    betas = (cfg.beta1, cfg.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=fused)]
    if muon:
        # match_rms_adamw: updates as large as AdamW's, so one learning rate serves both.
        # 4 iterations orthogonalise as well as 5 here, for a fifth less time: docs/LOG.md.
        optimizers.insert(0, Muon(hidden, cfg.learning_rate, cfg.weight_decay, cfg.momentum,
                                  adjust_lr_fn="match_rms_adamw", ns_steps=4))
    return optimizers


def apply_gradients(accelerator, optimizers, finite):
    """One optimizer step, none if the gradient is not finite.

    With two optimizers we drive the GradScaler of fp16 ourselves: accelerate's wrapper calls
    scaler.update() after each, so the second would be unscaled twice.
    """
    scaler = accelerator.scaler
    for optimizer in optimizers:
        if finite and scaler:
            scaler.step(optimizer.optimizer)
        elif finite:
            optimizer.step()
        optimizer.zero_grad()
    if scaler:
        scaler.update()


def update(model, optimizers, micro_batches, cfg, accelerator):
    """Forward and backward over the micro-batches, clip, step.

    micro_batches: an iterable of cfg.gradient_accumulation_steps (idx, targets). Returns (mean
    loss as a 0-d tensor, gradient norm as a float); the update is skipped if that is not finite.
    """
    steps = cfg.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    for i, (idx, targets) in enumerate(micro_batches):
        # processes exchange gradients after the last micro-batch only
        last = i + 1 == steps
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = model(idx, targets, return_logits=False)[1]
            accelerator.backward(loss / steps)
        loss_sum += loss.detach()
    norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf))
    apply_gradients(accelerator, optimizers, math.isfinite(norm))
    return loss_sum / steps, norm


# ---------------------------------------------------------------------------------------------
# evaluation, samples


@torch.no_grad()
def evaluate(model, data, cfg, accelerator, vocab_size):
    """{"train_loss", "val_loss"}: nats a token over windows that are the same at every call.

    Windows are spread evenly over the split and dealt to the processes; no random state is touched.
    """
    model.eval()
    losses = {}
    world = accelerator.num_processes
    with accelerator.autocast():  # around all: weights are cast once, not for every batch
        for split, tokens in data.items():
            n = count_windows(tokens, cfg.block_size)
            count = min(n, cfg.eval_iters * cfg.batch_size * world)
            windows = np.arange(count) * n // count
            total = torch.zeros(2, device=accelerator.device)  # summed loss, windows
            for start in range(0, count, cfg.batch_size * world):
                mine = windows[start : start + cfg.batch_size * world]
                mine = mine[accelerator.process_index :: world]
                # Every process runs as many batches; one with no window left adds 0.
                chosen = mine if len(mine) else windows[:1]
                batch = read_windows(tokens, chosen, cfg.block_size, vocab_size, accelerator.device)
                loss = model(*batch, return_logits=False)[1]
                total += torch.stack((loss.float(), torch.ones_like(loss))) * len(mine)
            total = accelerator.reduce(total)
            losses[f"{split}_loss"] = (total[0] / total[1]).item()
    model.train()
    return losses


def describe_losses(losses, meta):
    """One line: losses, perplexities and, where no byte was lost, bits per byte."""
    parts = []
    for split in ("train", "val"):
        loss = losses[f"{split}_loss"]
        parts.append(f"{split} loss {loss:.3f}, perplexity {runtime.perplexity(loss):.1f}")
    if meta["val_bytes"] and meta["lossless"]:
        bits = losses["val_loss"] / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
        parts.append(f"{bits:.3f} bits per byte of val")
    return " | ".join(parts)


def sample_text(model, tokenizer, prompt, cfg):
    """Continue `prompt`, a list of token ids, by cfg.sample_tokens tokens. Returns the text."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(cfg.seed)  # leaves the global one alone
    model.eval()
    out = generate(model, torch.tensor([prompt], device=device), cfg.sample_tokens,
                   cfg.sample_temperature, generator=generator)
    model.train()
    return tokenizer.decode(out[0])


def append_sample(path, iteration, val_loss, text):
    """Append a text to samples.md. Its fence is longer than any in the text, so that no text can
    look like the next entry."""
    fence = "~" * max(4, 1 + max(map(len, re.findall("~+", text)), default=0))
    with disk_errors(path.parent), open(path, "a", encoding="utf-8", newline="") as f:
        f.write(f"## iteration {iteration}: val loss {val_loss:.3f}\n\n"
                f"{fence}\n{text}\n{fence}\n\n")


def read_samples(path):
    """The entries of samples.md: a list of re.Match with groups iteration, fence, text."""
    if not path.is_file():
        return []
    # surrogateescape: bytes that somebody else wrote go back as they were
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:
        entry = r"(?ms)^## iteration (\d+)[^\n]*\n\n(~{4,})\n(.*?)\n\2\n\n?"
        return list(re.finditer(entry, f.read()))


def trim_samples(path, iteration):
    """Drop the entries past `iteration` from samples.md: a resumed run writes them again."""
    later = [entry for entry in read_samples(path) if int(entry[1]) > iteration]
    if later:
        write_text(path, later[0].string[: later[0].start()])


# ---------------------------------------------------------------------------------------------
# settings


def check_config(cfg):
    """Raise UserError (code 2) for what is wrong with the options alone."""
    check_range(cfg, 1, "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim")
    check_range(cfg, 1, "batch_size", "gradient_accumulation_steps", "keep_checkpoints")
    check_range(cfg, 1, "eval_iters", "log_interval", "n_inner")
    check_range(cfg, 0, "max_iters", high=10**12)
    check_range(cfg, 1e-9, "max_epochs", "minutes", high=10**12)
    check_range(cfg, 0, "learning_rate", "min_lr")
    check_range(cfg, 1e-12, "rope_theta", "norm_eps")
    check_range(cfg, 0, "embedding_lr", "head_lr", "warmup_iters", "weight_decay", "grad_clip")
    check_range(cfg, 0, "eval_interval", "save_interval", "sample_tokens", "sample_temperature")
    check_range(cfg, 0, "dropout", "beta1", "beta2", "momentum", high=1 - 1e-9)
    check_range(cfg, 0, "seed", high=2**63 - 1)
    for group in Config.ALTERNATIVES:
        said = [f"--{name}" for name in group if getattr(cfg, name) is not None]
        if len(said) > 1:
            raise UserError(f"{' and '.join(said)} set the same thing; give only one", 2)
    if not cfg.learning_rate and (cfg.embedding_lr or cfg.head_lr):
        raise UserError("--embedding_lr and --head_lr need a --learning_rate above 0", 2)
    if ".." in Path(cfg.dataset).parts or len(cfg.dataset.encode(errors="replace")) > 200:
        raise UserError(f"--dataset {cfg.dataset[:80]} must be a short name without '..'", 2)


def settings_of(cfg, checkpoint, saved):
    """cfg, on resume laid over the settings in the checkpoint's run.json `saved`."""
    given = runtime.given_names(cfg)
    cfg = copy.copy(cfg)  # with what it knows of the command line
    if cfg.sample_start:  # the text of a file, which may be gone on resume
        cfg.sample_start = read_prompt(cfg.sample_start)
    if checkpoint:
        with one_line(f"{checkpoint} is no checkpoint of train.py",
                      kinds=(KeyError, TypeError, ValueError)):
            # what runs made before these options existed used
            settings = {"schedule": "cosine", "momentum": 0.95,
                        "embedding_lr": saved["train"]["learning_rate"]}
            settings |= asdict(GPTConfig(**saved["model"])) | saved["train"]
        cfg = runtime.resume_settings(cfg, settings)
    beside = sorted(given & set(MODEL_FIELDS) - {"dropout", "block_size"})
    if beside and cfg.init_from != "scratch":
        raise UserError(f"--init_from {cfg.init_from} brings its own shape; leave out "
                        f"{', '.join('--' + name for name in beside)}", 2)
    return cfg


def model_config(cfg, vocab_size):
    """The GPTConfig that cfg asks for. Raises UserError (code 2) where it is impossible."""
    try:
        shape = {name: getattr(cfg, name) for name in MODEL_FIELDS}
        return GPTConfig(vocab_size=vocab_size, **shape)
    except ValueError as error:
        raise UserError(error, 2) from error


def make_model(cfg, vocab_size, saved, tokenizer):
    """The model of a fresh or resumed run, in training mode, on the CPU."""
    if saved:  # the weights come from the checkpoint
        return GPT(replace(GPTConfig(**saved["model"]), dropout=cfg.dropout))
    torch.manual_seed(cfg.seed)
    if cfg.init_from == "scratch":
        return GPT(model_config(cfg, vocab_size))
    import convert  # only here: it brings transformers along

    model = convert.from_pretrained(cfg.init_from, cfg.dropout).train()
    model = copy.deepcopy(model)  # weights aligned as after a resume: else kernels round otherwise
    c = model.config
    if c.vocab_size < vocab_size or c.block_size < cfg.block_size:
        raise UserError(f"--init_from {cfg.init_from} has vocab_size {c.vocab_size} and block_size "
                        f"{c.block_size}; the data needs {vocab_size} and {cfg.block_size}", 2)
    convert.check_same_tokenizer(cfg.init_from, tokenizer)
    return model


def check_resume(cfg, folder, saved, meta, config, rows):
    """Raise one UserError that names everything in which cfg and the data differ from the run."""
    old_meta = prepare.read_meta(folder)
    was = {f"the data's {key}": old_meta.get(key) for key in DATA_IDENTITY}
    now = {f"the data's {key}": meta.get(key) for key in DATA_IDENTITY}
    product = "batch_size x gradient_accumulation_steps x processes"
    was[product] = saved.get("rows", rows)  # older runs did not say
    now[product] = rows
    for name in ("init_from", "optimizer", "block_size"):
        was[f"--{name}"] = saved["train"].get(name)
        now[f"--{name}"] = getattr(cfg, name)
    if cfg.init_from == "scratch":
        asked = model_config(cfg, config.vocab_size)
        for name in MODEL_FIELDS:
            was[f"--{name}"] = getattr(config, name)
            now[f"--{name}"] = getattr(asked, name)
    runtime.check_same(folder, was, now)


def announce(cfg, accelerator, model, data, rows):
    """Print the resolved configuration, machine, size and length."""
    windows = {split: count_windows(tokens, cfg.block_size) for split, tokens in data.items()}
    print0("configuration:", ", ".join(f"{k}={v!r:.200}" for k, v in changed(cfg).items()))
    print0(f"{accelerator.device.type}, precision {accelerator.mixed_precision}, "
           f"{'compiled' if cfg.compile else 'not compiled'}, {accelerator.num_processes} "
           f"process(es), {model.count_parameters() / 1e6:.1f}M parameters")
    print0(f"{rows * cfg.block_size:,} tokens an iteration, {windows['train'] / rows:.1f} "
           f"iterations an epoch, {cfg.max_iters:,} iterations = "
           f"{cfg.max_iters * rows / windows['train']:.2f} epochs of "
           f"{windows['train'] * cfg.block_size:,} train tokens; "
           f"{windows['val'] * cfg.block_size:,} val tokens")


def measure_run(model, data, cfg, accelerator, rows, began):
    """(seconds an update takes here, seconds an evaluation takes, seconds since `began`, bytes of
    memory), from six real updates, of which the first warms up, and an evaluation."""
    import psutil

    vocab_size = model.config.vocab_size
    model.to(accelerator.device)
    optimizers = make_optimizers(model, cfg, accelerator.device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if cfg.compile:
        accelerator.unwrap_model(model).compile()
    times = [time.perf_counter()]
    n = count_windows(data["train"], cfg.block_size)
    for iteration in range(6):
        windows = windows_of(iteration, rows, n, cfg.seed)[: cfg.batch_size]
        batch = read_windows(data["train"], windows, cfg.block_size, vocab_size, accelerator.device)
        update(model, optimizers, [batch] * cfg.gradient_accumulation_steps, cfg, accelerator)
        times.append(time.perf_counter())
    evaluate(model, data, cfg, accelerator, vocab_size)
    times.append(time.perf_counter())
    memory = psutil.Process().memory_info().rss
    if accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    accelerator.free_memory()
    found = [(times[6] - times[1]) / 5, times[7] - times[6], time.perf_counter() - began]
    found = torch.tensor(found, device=accelerator.device)
    return *accelerator.gather(found).view(-1, 3).amax(0).tolist(), memory  # the same everywhere


def dry_run(cfg, model, seconds, evaluation, _, memory):
    """Print what the run would cost, by what measure_run found. Nothing is written."""
    N = model.count_parameters()
    hidden = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() >= 2)
    checkpoint = 12 * N - (4 * hidden if cfg.optimizer == "muon" else 0)  # Muon keeps one moment
    disk = (cfg.keep_checkpoints + 1) * checkpoint + 4 * N  # one is written before one is deleted
    evaluations = 1 + math.ceil(cfg.max_iters / (cfg.eval_interval or math.inf))
    hours = (seconds * cfg.max_iters + evaluation * evaluations) / 3600
    print0(f"dry run, nothing is written\n"
           f"time         {hours:.2f} hours: {seconds:.2f} s an iteration, {evaluation:.2f} s an "
           "evaluation\n"
           f"memory       {memory / 1e9:.2f} GB: the whole process, or a GPU's peak\n"
           f"disk         {disk / 1e9:.2f} GB at most, {checkpoint / 1e9:.2f} a checkpoint")


if __name__ == "__main__":
    runtime.run_script(main, CFG)
