"""Stage 2: train a GPT on what prepare.py wrote. Read it from main() down.

python train.py                                  # 2 minutes on a laptop CPU, no network
python train.py config/verdict.py                # a recipe; options after it win
python train.py config/verdict.py --resume=True  # go on from the newest whole checkpoint
accelerate launch train.py                       # several GPUs
torchrun --nproc_per_node 2 train.py             # several processes, GPUs or not
"""

import json
import math
import re
import shutil
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from configurator import at_least, changed, fail, load


@dataclass
class Config:
    """Train a GPT."""

    # data and run
    dataset: str = "stdlib"  # the folder under data_dir; a missing preset is prepared first
    data_dir: str = "data"  # where prepare.py writes
    out_dir: str | None = None  # None: out/<dataset>
    init_from: str = "scratch"  # scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder
    resume: bool = False  # go on from the newest whole checkpoint in out_dir
    overwrite: bool = False  # start again in an out_dir that holds a run
    seed: int = 1337  # of the weights, the order of the data and dropout
    # model; see model.GPTConfig
    block_size: int = 256  # tokens of context
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads a block
    n_embd: int = 256  # width
    dropout: float = 0.0  # pays when the data is seen many times
    bias: bool = True  # in LayerNorm and Linear
    qkv_bias: bool = True  # in c_attn
    tie_weights: bool = True  # one matrix for embedding and head
    init: Literal["gpt2", "torch"] = "gpt2"  # starting weights
    # one iteration = one update of batch_size x gradient_accumulation_steps x processes sequences
    batch_size: int = 8  # sequences a process computes at once
    gradient_accumulation_steps: int = 1  # micro-batches before an update
    max_iters: int = 560  # updates
    max_epochs: float = 0.0  # passes over the training split; above 0 it sets max_iters
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the matrices, AdamW for the rest
    learning_rate: float = 1e-2  # at its peak
    min_lr: float = 0.0  # at the last update
    warmup_iters: int = 40  # updates of linear warm-up
    weight_decay: float = 0.1  # of matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # norm the gradient is clipped to; 0: not clipped
    # once in a while
    eval_interval: int = 140  # iterations between evaluations; 0: only at the end
    eval_iters: int = 10  # batches of batch_size windows of each split
    log_interval: int = 10  # iterations between rows of log.csv
    save_interval: int = 0  # iterations between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # newest ones kept, besides best/
    sample_start: str = "def"  # prompt of the text written at each evaluation
    sample_tokens: int = 100  # its length; 0: none
    sample_temperature: float = 0.8  # 0: greedy
    # machine
    mixed_precision: Literal["auto", "fp16", "bf16", "no"] = "auto"  # weights stay fp32
    compile: bool = False  # torch.compile: slow to start, then faster
    log_with: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # tracker beside log.csv
    dry_run: bool = False  # only say what the run would cost, see plan.py; nothing is written
    tokens_per_s: float = 0.0  # speed for dry_run; 0: measured on two updates


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file

import prepare
from model import GPT, GPTConfig
from runtime import (
    StopSignal,
    checkpoints,
    damage,
    disk_errors,
    lock_folder,
    machine,
    make_accelerator,
    open_log,
    plot_log,
    progress_bar,
    remove,
    say,
    seal_folder,
    start_run,
)

BAD_UPDATES = 10  # non-finite in a row: the run is broken

# ---------------------------------------------------------------------------------------------
# data: windows of block_size tokens, never overlapping; window i is tokens i*T .. (i+1)*T


def load_data(cfg):
    """Return (meta, {split: token array}) of the data set; prepares a missing preset."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if not (prepare.parts(folder)[0] / "meta.json").exists():  # parts: one folder, or all shards
        if cfg.dataset not in prepare.PRESETS:
            fail(f"{folder} holds no prepared data; make it: "
                 f"python prepare.py --dataset={cfg.dataset} --source=PATH")  # fmt: skip
        say(f"{folder} is not there yet: preparing it")
        prepare.main(prepare.Config(dataset=cfg.dataset, data_dir=cfg.data_dir))
    meta = prepare.read_meta(folder)
    return meta, {split: prepare.open_split(folder, split) for split in ("train", "val")}


def check_data(cfg, data, vocab_size, rows):
    """Fail early where a split cannot fill a window or a batch, or holds an unknown token."""
    for split, tokens in data.items():
        file = f"{cfg.data_dir}/{cfg.dataset}/{split}.npy"
        if len(tokens) < cfg.block_size + 1:
            fail(f"{file} has {len(tokens):,} tokens, too few for one window of --block_size "
                 f"{cfg.block_size} + 1; "
                 f"use --block_size {max(1, len(tokens) - 1)} or more text")  # fmt: skip
        if split == "train" and n_windows(tokens, cfg.block_size) < rows:
            fail(f"{file} has {n_windows(tokens, cfg.block_size)} windows of {cfg.block_size} "
                 f"tokens, fewer than the {rows} sequences of one iteration; lower --batch_size, "
                 "--gradient_accumulation_steps or --block_size")  # fmt: skip
        highest = int(tokens[: 2**26].max())  # the rest is checked as it is read
        if highest >= vocab_size:
            fail(f"{file} holds token {highest}, past the vocabulary of {vocab_size} tokens; "
                 f"run prepare.py again or use a model of that vocabulary")  # fmt: skip


def n_windows(tokens, block_size):
    """Windows of block_size tokens, each followed by at least one more to predict."""
    return (len(tokens) - 1) // block_size


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """A permutation of the n windows that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def windows_of(iteration, rows, n, seed):
    """The `rows` windows of one iteration: a pure function, so any iteration is found at once.

    The stream of rows runs on over the ends of epochs; each epoch holds each window once.
    """
    places = range(iteration * rows, (iteration + 1) * rows)
    return np.array([epoch_order(seed, place // n, n)[place % n] for place in places])


def read_windows(tokens, windows, block_size, vocab_size, device):
    """Window numbers (B,) -> idx, targets (B, T) on `device`, targets one token ahead."""
    starts = windows * block_size
    x = np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64)
    if x.max() >= vocab_size:
        fail(f"the data holds token {x.max()}, past the vocabulary of {vocab_size} tokens")
    x = torch.from_numpy(x)
    if device.type == "cuda":
        x = x.pin_memory().to(device, non_blocking=True)
    x = x.to(device)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------
# optimisation


def lr_at(iteration, cfg, max_iters):
    """Learning rate of update `iteration` (from 0): linear warm-up, whose first value is above 0,
    then a cosine to min_lr at the last update (Loshchilov & Hutter 2017)."""
    step = iteration + 1
    if step < cfg.warmup_iters:
        return cfg.learning_rate * step / cfg.warmup_iters
    done = (step - cfg.warmup_iters) / max(1, max_iters - cfg.warmup_iters)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(model, cfg, device):
    """AdamW, weight decay on matrices only; with muon two optimizers (Jordan et al. 2024)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = []
    if cfg.optimizer == "muon":
        hidden = [p for p in model.transformer.h.parameters() if p.dim() >= 2]
        known = {id(p) for p in hidden}
        matrices = [p for p in matrices if id(p) not in known]
        # match_rms_adamw: updates as large as AdamW's, so one learning rate serves both
        optimizers.append(torch.optim.Muon(hidden, cfg.learning_rate, cfg.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    betas = (cfg.beta1, cfg.beta2)
    optimizers.append(torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=fused))
    return optimizers


def step(scaler, optimizers, finite):
    """One update, none if the gradient is not finite. scaler: fp16's or None; accelerate's wrappers
    would update it after each optimizer, and the next one's gradients be divided by it again."""
    for optimizer in optimizers:
        if finite:
            scaler.step(optimizer.optimizer) if scaler else optimizer.step()
        optimizer.zero_grad()
    if scaler:
        scaler.update()


def mix(*numbers):
    """Whole numbers -> one well-mixed seed (torch's CPU generator takes 32 bits of it)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def try_compile(model, cfg, accelerator):
    """torch.compile `model` in place and try it once. Returns whether it worked."""
    bare = accelerator.unwrap_model(model)
    shape = (2, cfg.batch_size, cfg.block_size)
    idx, targets = torch.zeros(shape, dtype=torch.long, device=accelerator.device)
    bare.compile()
    try:
        with accelerator.no_sync(model):
            accelerator.backward(model(idx, targets, return_logits=False)[1])
    except Exception as error:  # a compiler can fail in any way; eager always works
        say(f"warning: --compile failed, going on without: {str(error).splitlines()[0][:120]}")
        bare._compiled_call_impl = None
    model.zero_grad()
    return bare._compiled_call_impl is not None


# ---------------------------------------------------------------------------------------------
# evaluation, samples, checkpoints


def describe(losses, meta):
    """One line: losses, perplexities and, where the bytes are known, bits per byte."""
    parts = []
    for split in ("train", "val"):
        loss = losses[f"{split}_loss"]
        parts.append(f"{split} loss {loss:.3f}, perplexity {math.exp(min(loss, 700)):.1f}")
    if meta.get("val_bytes"):
        bits = losses["val_loss"] / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
        parts.append(f"{bits:.3f} bits per byte of val")
    return " | ".join(parts)


def write_sample(model, tokenizer, cfg, out_dir, iteration):
    """Continue cfg.sample_start and append the text to samples.md."""
    ids = tokenizer.encode(cfg.sample_start) or [tokenizer.eot_id]
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(cfg.seed)  # leaves training's alone
    model.eval()
    out = model.generate(torch.tensor([ids], device=device), cfg.sample_tokens,
                         cfg.sample_temperature, generator=generator)  # fmt: skip
    model.train()
    with disk_errors(out_dir), open(out_dir / "samples.md", "a", encoding="utf-8") as f:
        f.write(f"## iteration {iteration}\n\n~~~~\n{tokenizer.decode(out[0])}\n~~~~\n\n")


def trim_samples(path, iteration):
    """Drop what samples.md says of iterations past `iteration`: a resumed run writes it again."""
    if path.exists():
        parts = re.split(r"(?m)^(?=## iteration \d+$)", path.read_text(encoding="utf-8"))
        kept = [p for p in parts if p and int(p.split()[2]) <= iteration]
        path.write_text("".join(kept), encoding="utf-8")


@torch.no_grad()
def evaluate(model, data, cfg, accelerator, vocab_size):
    """{"train_loss", "val_loss"}: nats a token over windows that are the same at every call.

    Windows are spread evenly over the split and dealt to the processes; no random state is touched.
    """
    model.eval()
    losses = {}
    with accelerator.autocast():  # around all: weights are cast once, not for every batch
        for split, tokens in data.items():
            n, rank, world = n_windows(tokens, cfg.block_size), *place(accelerator)
            count = min(n, cfg.eval_iters * cfg.batch_size)
            windows = np.arange(count) * n // count
            total = torch.zeros(2, device=accelerator.device)  # summed loss, windows
            for start in range(0, count, cfg.batch_size * world):  # as many on each process
                mine = windows[start : start + cfg.batch_size * world][rank::world]
                chosen = mine if len(mine) else windows[:1]  # nothing left: compute, do not count
                batch = read_windows(tokens, chosen, cfg.block_size, vocab_size, accelerator.device)
                loss = model(*batch, return_logits=False)[1]
                total += torch.stack((loss.float(), torch.ones_like(loss))) * len(mine)
            total = accelerator.reduce(total)
            losses[f"{split}_loss"] = (total[0] / total[1]).item()
    model.train()
    return losses


def place(accelerator):
    """(number of this process, number of processes)."""
    return accelerator.process_index, accelerator.num_processes


def save_weights(accelerator, model, folder):
    """model.safetensors; all processes call it, the first one writes."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        if accelerator.unwrap_model(model).config.tie_weights:
            state.pop("lm_head.weight", None)  # it is wte
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")


def save_folder(accelerator, model, folder, info, data_folder, whole_state):
    """Write a checkpoint beside its place, then rename it. whole_state: optimizer and all."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    with disk_errors(folder.parent):
        if accelerator.is_main_process:
            remove(temporary)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        if whole_state:
            accelerator.save_state(str(temporary))
        save_weights(accelerator, model, temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            text = json.dumps(info, indent=2)
            (temporary / "config.json").write_text(text, encoding="utf-8")
            meta = json.dumps(prepare.read_meta(data_folder), indent=2)
            (temporary / "meta.json").write_text(meta, encoding="utf-8")
            tokenizer = prepare.parts(data_folder)[0] / "tokenizer.json"
            if tokenizer.exists():
                shutil.copy(tokenizer, temporary)
            seal_folder(temporary, folder)
    accelerator.wait_for_everyone()


def pick_checkpoint(found, model_config):
    """The newest whole checkpoint and its config.json; names each damaged one it passes over."""
    for folder in found:
        wrong, saved = damage(folder), {}
        try:
            saved = wrong or json.loads((folder / "config.json").read_text(encoding="utf-8"))
            theirs = wrong or dict(saved["model"])
        except (OSError, ValueError, KeyError, TypeError):
            wrong = "config.json cannot be read"
        if wrong:
            say(f"warning: {folder} is skipped: {wrong}")
            continue
        for key, value in (model_config or {}).items():
            if theirs.get(key) != value:
                old = theirs.get(key)
                fail(f"--{key} is {value} but {folder} was made with {old}; "
                     f"resume with --{key}={old} or start a new --out_dir", 2)  # fmt: skip
        return folder, saved
    fail(f"no whole checkpoint is left in {found[0].parent}; start again with --overwrite=True")


# ---------------------------------------------------------------------------------------------


def check_config(cfg):
    """Everything about the options alone that can be wrong."""
    at_least(cfg, 1, "block_size", "batch_size", "gradient_accumulation_steps", "keep_checkpoints")
    at_least(cfg, 1, "eval_iters", "log_interval")
    at_least(cfg, 0, "max_iters", "max_epochs", "learning_rate", "min_lr", "warmup_iters", "seed")
    at_least(cfg, 0, "weight_decay", "grad_clip", "eval_interval", "save_interval")
    at_least(cfg, 0, "sample_tokens", "sample_temperature", "beta1", "beta2", "tokens_per_s")
    if max(cfg.beta1, cfg.beta2) >= 1:
        fail(f"--beta1 {cfg.beta1} and --beta2 {cfg.beta2} must be below 1", 2)
    if ".." in Path(cfg.out_dir or "").parts or ".." in Path(cfg.dataset).parts:
        fail(f"--out_dir {cfg.out_dir} and --dataset {cfg.dataset} must not contain '..'", 2)


def main(cfg):
    """Hold the run folder and the signals for as long as the run lasts."""
    check_config(cfg)
    if cfg.log_with != "none" and cfg.log_with not in map(str, get_available_trackers()):
        fail(f"--log_with={cfg.log_with} needs a package: pip install {cfg.log_with}")
    out_dir = Path(cfg.out_dir or f"out/{cfg.dataset}")
    accelerator = make_accelerator(
        cfg.mixed_precision,
        may_shard=True,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        log_with=None if cfg.log_with == "none" else cfg.log_with,
        project_dir=out_dir,
    )
    if cfg.optimizer == "muon" and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        fail(f"{accelerator.distributed_type.value} keeps the state of one optimizer, and muon is "
             "two; use --optimizer=adamw")  # fmt: skip
    if cfg.dry_run:
        import plan  # only here: a run does without it

        return plan.main(cfg, accelerator, make_optimizers)
    lock = lock_folder(out_dir) if accelerator.is_main_process else None
    stop = StopSignal()
    try:
        signum = train(cfg, accelerator, out_dir, stop)
    finally:
        stop.release()
        if lock:
            lock.release()
    if signum:
        raise SystemExit(128 + signum)


def train(cfg, accelerator, out_dir, stop):
    """The whole run, from top to bottom. Returns the signal that stopped it, 0 if none did."""
    device, main_process = accelerator.device, accelerator.is_main_process
    data_folder = Path(cfg.data_dir) / cfg.dataset

    # -- the run folder and the data; the first process goes ahead -----------------------------
    found = []
    if main_process:
        found = start_run(out_dir, cfg.resume, cfg.overwrite)
    with accelerator.main_process_first():
        meta, data = load_data(cfg)
    tokenizer = prepare.load_tokenizer(data_folder)
    vocab_size = meta["vocab_size"]
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
    check_data(cfg, data, vocab_size, rows)
    train_windows = n_windows(data["train"], cfg.block_size)
    max_iters = math.ceil(cfg.max_epochs * train_windows / rows) or cfg.max_iters

    # -- model and optimizer -------------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    model_config = None  # where weights come from elsewhere, they bring it
    if cfg.init_from == "scratch":
        names = GPTConfig.__dataclass_fields__
        model_config = {k: v for k, v in asdict(cfg).items() if k in names}
        model_config["vocab_size"] = vocab_size
    picked = [pick_checkpoint(found, model_config)] if found else [None]
    checkpoint, saved = broadcast_object_list(picked)[0] or (None, {})
    if checkpoint:
        model = GPT(GPTConfig(**saved["model"]))
    elif model_config:
        model = GPT(GPTConfig(**model_config))
    else:
        model = GPT.from_pretrained(cfg.init_from, cfg.dropout)
    c = model.config
    if c.vocab_size < vocab_size or c.block_size < cfg.block_size:
        fail(f"--init_from {cfg.init_from} has vocab_size {c.vocab_size} and block_size "
             f"{c.block_size}; the data needs {vocab_size} and {cfg.block_size}", 2)  # fmt: skip
    model.to(device).train()
    optimizers = make_optimizers(model, cfg, device)
    if plugin := accelerator.state.deepspeed_plugin:  # it would ask a data loader
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = cfg.batch_size
    model, *optimizers = accelerator.prepare(model, *optimizers)
    # save_weights writes the model, accelerate the rest
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    if checkpoint:
        try:
            accelerator.load_state(str(checkpoint))  # weights_only: no code of a stranger's runs
        except Exception as error:  # signed with the right sums, and still not what it should be
            fail(f"{checkpoint} cannot be loaded: {str(error).splitlines()[0][:150]}; "
                 "start a new --out_dir")  # fmt: skip
    compiled = cfg.compile and try_compile(model, cfg, accelerator)

    # -- say what is about to happen -----------------------------------------------------------
    bare = accelerator.unwrap_model(model)
    say("configuration:", ", ".join(f"{k}={v!r}" for k, v in changed(cfg).items()) or "defaults")
    say(f"{device.type}, precision {accelerator.mixed_precision}, "
        f"{'compiled' if compiled else 'not compiled'}, {accelerator.num_processes} process(es), "
        f"{bare.count_parameters() / 1e6:.1f}M parameters")  # fmt: skip
    say(f"{rows * cfg.block_size:,} tokens an iteration, {train_windows / rows:.1f} iterations an "
        f"epoch, {max_iters:,} iterations = {max_iters * rows / train_windows:.2f} epochs of "
        f"{train_windows * cfg.block_size:,} train tokens; "
        f"{n_windows(data['val'], cfg.block_size) * cfg.block_size:,} val tokens")  # fmt: skip
    start = it = saved.get("iter", 0)
    best = saved.get("best_val_loss") or math.inf
    bad_updates, skipped = 0, saved.get("skipped", 0)
    hardware = machine() | {"precision": accelerator.mixed_precision,
                            "processes": accelerator.num_processes}  # fmt: skip
    if checkpoint:
        say(f"resuming from {checkpoint} at iteration {it:,}")
    if main_process:
        with disk_errors(out_dir):
            (out_dir / "config.json").write_text(json.dumps(asdict(cfg), indent=2), "utf-8")
            known = it if checkpoint else -1
            write_row = open_log(out_dir / "log.csv", keep_until=known)
            trim_samples(out_dir / "samples.md", known)
    with disk_errors(out_dir):  # trackers take no None
        settings = {k: "None" if v is None else v for k, v in asdict(cfg).items()}
        accelerator.init_trackers(out_dir.name, settings)  # no tracker: nothing happens
    bar = progress_bar(max_iters, it, shown=main_process)
    tell = say if bar.disable else lambda line: bar.write(line) if main_process else None
    row, seconds, tokens_since, losses, signum = {"iter": 0, "tokens": 0}, 0.0, 0, {}, 0

    while True:
        last = it == max_iters
        fresh = it > start or not checkpoint  # a resumed run has done the rest of this already

        # -- once in a while: evaluate, sample, log, save --------------------------------------
        due = it % cfg.eval_interval == 0 if cfg.eval_interval else False
        if fresh and (due or last):
            losses = evaluate(model, data, cfg, accelerator, vocab_size)
            row |= losses
            tell(f"iteration {it}: {describe(losses, meta)}")
            if cfg.sample_tokens and main_process and accelerator.distributed_type != "FSDP":
                write_sample(bare, tokenizer, cfg, out_dir, it)
        if fresh and main_process and ("val_loss" in row or it and it % cfg.log_interval == 0):
            with disk_errors(out_dir):
                write_row(row)
                accelerator.log(row, step=it)  # to the trackers
        improved = fresh and it and row.get("val_loss", math.inf) < best
        best = row["val_loss"] if improved else best
        info = {"model": asdict(c), "train": asdict(cfg), "iter": it, "skipped": skipped,
                "best_val_loss": best if best < math.inf else None, "machine": hardware,
                **losses}  # fmt: skip
        if improved:
            save_folder(accelerator, model, out_dir / "best", info, data_folder, False)
        due = it % cfg.save_interval == 0 if cfg.save_interval else False
        if fresh and (due or last or signum) and it:
            folder = out_dir / f"checkpoint-{it:06d}"
            save_folder(accelerator, model, folder, info, data_folder, True)
            if main_process:
                for old in checkpoints(out_dir)[cfg.keep_checkpoints :]:
                    remove(old)
                with disk_errors(out_dir):
                    plot_log(out_dir / "log.csv", out_dir / "loss.png")
        if last or signum:
            break

        # -- one update ------------------------------------------------------------------------
        began = time.perf_counter()
        lr = lr_at(it, cfg, max_iters)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        # dropout is a pure function of (seed, iteration, process): nothing to save or disturb
        torch.manual_seed(mix(cfg.seed, it, accelerator.process_index))
        windows = windows_of(it, rows, train_windows, cfg.seed).reshape(
            cfg.gradient_accumulation_steps, accelerator.num_processes, cfg.batch_size
        )[:, accelerator.process_index]
        loss_sum = torch.zeros((), device=device)
        for micro in windows:
            idx, targets = read_windows(data["train"], micro, cfg.block_size, vocab_size, device)
            with accelerator.accumulate(model):  # processes exchange gradients after the last one
                loss = model(idx, targets, return_logits=False)[1]
                accelerator.backward(loss)
                loss_sum += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        finite = math.isfinite(norm)
        step(accelerator.scaler, optimizers, finite)
        report = torch.stack((loss_sum / len(windows), torch.tensor(float(stop.signum)).to(device)))
        loss, signum = accelerator.reduce(report).tolist()
        loss /= accelerator.num_processes
        signum = (stop.signum or 15) if signum else 0  # all stop here, whoever was told to
        seconds += time.perf_counter() - began
        it += 1

        # -- log -------------------------------------------------------------------------------
        bad_updates = 0 if finite else bad_updates + 1
        skipped += not finite
        if not finite:
            tell(f"warning: iteration {it}: gradient norm {norm}, update skipped")
        if bad_updates == BAD_UPDATES:
            fail(f"iteration {it}: {BAD_UPDATES} updates in a row had a non-finite gradient; lower "
                 f"--learning_rate or look at the data; {out_dir} is as last saved")  # fmt: skip
        tokens_since += rows * cfg.block_size
        row = {"iter": it, "tokens": it * rows * cfg.block_size, "lr": lr, "loss": loss,
               "grad_norm": float(norm), "tokens_per_s": tokens_since / seconds}  # fmt: skip
        bar.update()
        if it % cfg.log_interval == 0:
            words = f"loss {loss:.3f}, {row['tokens_per_s']:,.0f} tokens/s"
            bar.set_postfix_str(words)
            if bar.disable:
                say(f"iteration {it}: lr {lr:.2e}, {words}")
            seconds, tokens_since = 0.0, 0

    # -- the end -------------------------------------------------------------------------------
    bar.close()
    tell(f"{'stopped' if signum else 'done'} at iteration {it}: {out_dir}"
         + (f", {skipped} update(s) skipped" if skipped else ""))  # fmt: skip
    accelerator.wait_for_everyone()  # the first process may still be drawing
    accelerator.end_training()
    if accelerator.distributed_type == "FSDP":
        time.sleep(0.5)  # the caches of DTensor keep the threads of gloo; see make_accelerator
    return signum


if __name__ == "__main__":
    main(CFG)
