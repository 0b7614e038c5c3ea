"""Plan before you pay: what a run of train.py would cost. `train.py --dry_run=True` prints it.

Bytes and FLOPs follow from shapes alone; only the speed is measured, over two updates.
Shapes: B batch, T block_size, C n_embd, V vocab_size, nh heads, L layers, N parameters.
"""

import json
import math
import platform
import time
from dataclasses import fields
from pathlib import Path

import psutil
import torch

import prepare
from configurator import fail
from model import GPT, GPTConfig
from runtime import say

GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}  # fmt: skip


def activations(c, B, T, width, fused=True):
    """Bytes that one forward of B x T tokens keeps for backward, the loss's own left out.

    width: bytes a number in matrix products (2 under bf16 and fp16, else 4); the residual stream
    and the LayerNorms are fp32. fused=False: on a CPU, where dropout needs the T x T attention
    weights and its masks are numbers, not bits.
    """
    BTC, C = B * T * c.n_embd, c.n_embd
    norm = 4 * BTC + 8 * B * T  # a LayerNorm keeps its input, mean and deviation
    block = 2 * norm + 14 * width * BTC  # norms' outputs 2, q k v 3, heads 1, MLP 4 + 4
    dropped = c.dropout > 0
    if fused or not dropped:
        block += 4 * B * c.n_head * T + 2 * dropped * BTC
    else:
        block += 3 * width * B * c.n_head * T * T + T * T + 2 * width * BTC
    outside = norm + width * BTC + dropped * (1 if fused else 4) * BTC
    copies = 2 * (12 * C * C * c.n_layer + c.vocab_size * C) if width == 2 else 0  # autocast's
    return c.n_layer * block + outside + copies


def optimizer_bytes(model, muon):
    """AdamW keeps two fp32 numbers a weight, Muon one for each weight of the blocks' matrices."""
    hidden = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() >= 2)
    return 8 * model.count_parameters() - (4 * hidden if muon else 0)


def memory(model, cfg, width, cpu, cards=1, sharded=False):
    """{part: bytes on one card}; "peak" is the largest sum of parts that live together."""
    c, accumulates = model.config, cfg.gradient_accumulation_steps > 1
    N, share = model.count_parameters(), cards if sharded else 1
    tokens = cfg.batch_size * cfg.block_size
    block = 12 * c.n_embd**2
    root = N - c.n_layer * block  # FSDP keeps the root gathered, and one block ahead
    parts = {
        "weights": 4 * N // share + (width * (root + 2 * block) if share > 1 else 0),
        "gradients": 4 * N // (1 if accumulates else share),
        "optimizer": optimizer_bytes(model, cfg.optimizer == "muon") // share,
        "activations": activations(c, cfg.batch_size, cfg.block_size, width, not cpu),
        # fp32 log-probabilities and two gradients of that size; small vocabularies: a block's own
        "logits": tokens * max(12 * c.vocab_size, 9 * width * c.n_embd),
        "buckets": 4 * N if cards > 1 and not sharded else 0,  # DDP's, for the exchange
    }
    stays = parts["weights"] + parts["optimizer"] + parts["buckets"]
    forward_end = parts["activations"] + parts["logits"] + accumulates * parts["gradients"]
    backward_end = parts["gradients"] + tokens * 9 * width * c.n_embd
    peak = stays + max(forward_end, backward_end)
    # runtime.tune_allocator's heap keeps what is freed, and an aligned block can miss its own hole:
    # 5 to 35 % more was measured, up to 60 % where 50,257-token logits are nearly all
    parts["holes"] = peak // 5 if cpu and platform.libc_ver()[0] == "glibc" else 0
    return parts | {"peak": peak + parts["holes"]}


def flops(model, cfg, tokens):
    """FLOPs of `tokens` trained on: 6N + 12 L C T each (Chowdhery et al. 2022, appendix B), N
    without the two look-up tables, whose rows are read and not multiplied."""
    c = model.config
    lookups = c.block_size + (0 if c.tie_weights else c.vocab_size)
    N = model.count_parameters() - lookups * c.n_embd
    return tokens * (6 * N + 12 * c.n_layer * c.n_embd * cfg.block_size)


def shape(cfg):
    """(GPTConfig, train tokens or None where the data is not prepared) of the run; no download."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if (prepare.parts(folder)[0] / "meta.json").exists():
        meta = prepare.read_meta(folder)
    elif cfg.dataset in prepare.PRESETS:
        meta = {"vocab_size": prepare.PRESETS[cfg.dataset][2] or 50257}
    else:
        fail(f"{folder} holds no prepared data: the vocabulary is not known")
    values = {f.name: getattr(cfg, f.name, None) for f in fields(GPTConfig)}
    values["vocab_size"] = meta["vocab_size"]
    if cfg.init_from != "scratch":
        if cfg.init_from in GPT2:
            found = dict(zip(("n_layer", "n_head", "n_embd"), GPT2[cfg.init_from], strict=True))
        else:
            try:
                found = json.loads((Path(cfg.init_from) / "config.json").read_text("utf-8"))
            except (OSError, ValueError) as error:
                fail(f"--init_from {cfg.init_from} is no transformers folder: {error}", 2)
        values |= {k: v for k, v in found.items() if k in ("n_layer", "n_head", "n_embd")}
        values |= {k: True for k in ("bias", "qkv_bias", "tie_weights")}
        values["vocab_size"] = found.get("vocab_size", 50257)
        values["block_size"] = found.get("n_positions", 1024)
    return GPTConfig(**values), meta.get("train_tokens")


def measure(config, cfg, accelerator, make_optimizers):
    """Seconds of one update here: the second of two on random tokens (the first one warms up)."""
    device = accelerator.device
    model = GPT(config).to(device).train()
    optimizers = make_optimizers(model, cfg, device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    idx = torch.randint(config.vocab_size, (cfg.batch_size, cfg.block_size), device=device)

    def now():
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    for _ in range(2):
        times = [now()]
        accelerator.backward(model(idx, idx, return_logits=False)[1])
        times.append(now())
        accelerator.clip_grad_norm_(model.parameters(), cfg.grad_clip or 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(now())
    return (times[1] - times[0]) * cfg.gradient_accumulation_steps + times[2] - times[1]


def size(number, unit="B"):
    """1234567 -> '1.23 MB'."""
    power = min(5, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def main(cfg, accelerator, make_optimizers):
    """Print the plan and return its figures as a dict; writes nothing."""
    config, train_tokens = shape(cfg)
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    N, cards = model.count_parameters(), accelerator.num_processes
    device, precision = accelerator.device, accelerator.mixed_precision
    width = 4 if precision == "no" else 2
    rows = cfg.batch_size * cfg.gradient_accumulation_steps  # of a process
    iteration, iters = rows * cfg.block_size, cfg.max_iters
    if cfg.max_epochs:
        if train_tokens is None:
            fail("--max_epochs needs the data: prepare it first, or plan with --max_iters")
        iters = math.ceil(cfg.max_epochs * ((train_tokens - 1) // cfg.block_size) / (rows * cards))
    tokens = iteration * cards * iters
    parts = memory(model, cfg, width, device.type == "cpu", cards)
    checkpoint = 4 * N + optimizer_bytes(model, cfg.optimizer == "muon")
    disk = checkpoint * (cfg.keep_checkpoints + 1) + 4 * N
    say(f"plan of {cfg.out_dir or f'out/{cfg.dataset}'}; nothing is written\n"
        f"parameters   {N:,}\n"
        f"compute      {size(flops(model, cfg, iteration * cards), 'FLOP')} an iteration, "
        f"{size(flops(model, cfg, tokens), 'FLOP')} in all\n"
        f"tokens       {iteration * cards:,} an iteration, {iters:,} iterations, {tokens:,} in all"
        + (f", {tokens / train_tokens:.2f} epochs" if train_tokens else "")
        + f"\nmemory       {size(parts['peak'])} at most "
        f"({device.type}, precision {precision})")  # fmt: skip
    for part, count in parts.items():
        if count and part != "peak":
            say(f"  {part:13}{size(count)}")
    say(f"checkpoint   {size(checkpoint)}, weights alone {size(4 * N)}; "
        f"on disk {size(disk)} at most")  # fmt: skip
    rate = cfg.tokens_per_s
    free = psutil.virtual_memory().available
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free
    if not rate and parts["peak"] > free:
        say(f"time         not measured: {size(free)} are free here; give --tokens_per_s")
    elif not rate:
        rate = iteration * cards / measure(config, cfg, accelerator, make_optimizers)
    if rate:
        speed = flops(model, cfg, rate)
        say(f"time         {tokens / rate / 3600:.3g} hours at {rate:,.0f} tokens/s "
            f"({'given' if cfg.tokens_per_s else 'measured'}; {size(speed, 'FLOP/s')}), "
            "evaluations left out")  # fmt: skip
    width = 4 if cfg.mixed_precision == "no" else 2  # what `auto` is on a card
    say(f"the same {tokens:,} tokens on cards, {8 * width}-bit products, fused attention; "
        "memory and bytes sent are a card's, "
        "the hours assume that no exchange costs time")  # fmt: skip
    say(f"{'cards':>5}  {'iterations':>10}  {'DDP memory':>10}  {'sent / it':>9}  "
        f"{'FSDP memory':>11}  {'sent / it':>9}  {'hours':>8}")  # fmt: skip
    for n in (1, 8, 64):
        ddp = memory(model, cfg, width, False, n)["peak"]
        fsdp = memory(model, cfg, width, False, n, sharded=True)["peak"]
        share = (n - 1) / n * N  # ring exchanges; FSDP gathers twice a micro-batch, reduces once
        gathers = 2 * cfg.gradient_accumulation_steps + 1
        hours = f"{tokens / rate * cards / n / 3600:.3g}" if rate else "?"
        say(f"{n:5}  {-(-tokens // (iteration * n)):10,}  {size(ddp):>10}  {size(8 * share):>9}  "
            f"{size(fsdp):>11}  {size(width * share * gathers):>9}  {hours:>8}")  # fmt: skip
    return parts | {"parameters": N, "tokens": tokens, "checkpoint": checkpoint, "rate": rate}
