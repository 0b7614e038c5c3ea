"""Stage 3: text from a trained model, printed as it is made.

python sample.py --start "Every effort moves you"      # the newest run under out/
python sample.py --out_dir=out/verdict --temperature=0 --start=FILE:prompt.txt
python sample.py --init_from=gpt2 --num_beams=4        # GPT-2's own weights
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import at_least, fail, load


@dataclass
class Config:
    """Generate text."""

    out_dir: str | None = None  # a run of train.py; None: the newest under out/
    checkpoint: str = "newest"  # newest, best or a checkpoint-... folder's name
    init_from: str | None = None  # instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, folder
    start: str = ""  # the prompt; FILE:path reads it from a file; empty: the end-of-text token
    num_samples: int = 1  # texts, made as one batch
    max_new_tokens: int = 200  # tokens a text at most
    temperature: float = 0.8  # below 1 bolder, above 1 wilder; 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the smallest set whose probability reaches p
    num_beams: int = 1  # above 1: search for the likeliest text instead of drawing
    stop_at_eos: bool = True  # end a text at the end-of-text token
    kv_cache: bool = True  # False: compute every token anew (slow, for comparison)
    seed: int = 1337  # the same seed gives the same text


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import torch

import prepare
from model import GPT
from runtime import checkpoints, say, tune_allocator


def newest_run(root="out"):
    """The folder under `root` whose checkpoint is the youngest."""
    runs = [
        (found[0].stat().st_mtime, p) for p in Path(root).glob("*/") if (found := checkpoints(p))
    ]
    if not runs:
        fail(f"no run under {root}/; train one: python train.py")
    return max(runs)[1]


def load_run(out_dir, checkpoint):
    """(model, tokenizer) of a run's checkpoint, named in the output."""
    out_dir = newest_run() if out_dir is None else Path(out_dir)
    found = checkpoints(out_dir)
    if checkpoint == "newest" and not found:
        fail(f"{out_dir} holds no checkpoint; train it or name another --out_dir")
    folder = found[0] if checkpoint == "newest" else out_dir / checkpoint
    if not folder.is_dir():
        names = ", ".join(p.name for p in out_dir.glob("*/")) or "nothing"
        fail(f"--checkpoint {checkpoint} is not in {out_dir}; it holds {names}")
    say(f"sampling from {folder}")
    return GPT.from_checkpoint(folder), prepare.load_tokenizer(folder)


def load_weights(name):
    """(model, tokenizer) of GPT-2 weights or a transformers folder."""
    model = GPT.from_pretrained(name)
    if (Path(name) / "tokenizer.json").exists():
        engine = prepare.open_tokenizer_file(name)
        return model, prepare.Tokenizer("tokenizer.json", engine)
    return model, prepare.open_tiktoken("gpt2")


def read_prompt(start):
    """The prompt's text: `start` itself, or the file named after FILE:."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--start {start}: {getattr(error, 'strerror', None) or error}")


def check_config(cfg):
    """Everything about the options alone that can be wrong."""
    at_least(cfg, 1, "num_samples", "max_new_tokens", "num_beams")
    at_least(cfg, 0, "temperature", "seed")
    if cfg.top_k is not None:
        at_least(cfg, 1, "top_k")
    if cfg.top_p is not None and not 0 < cfg.top_p <= 1:
        fail(f"--top_p {cfg.top_p} must lie above 0 and at most at 1", 2)


def main(cfg):
    """Generate, print, and return the texts (list of str, prompt included)."""
    check_config(cfg)
    tune_allocator()
    source = (cfg.init_from,) if cfg.init_from else (cfg.out_dir, cfg.checkpoint)
    model, tokenizer = (load_weights if cfg.init_from else load_run)(*source)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model.to(device)
    prompt = tokenizer.encode(read_prompt(cfg.start))
    hidden = 0 if prompt else 1  # an empty prompt is the end-of-text token, which is not shown
    prompt = prompt or [tokenizer.eot_id]
    if max(prompt) >= model.config.vocab_size:
        fail(f"the prompt has token {max(prompt)}, past the model's {model.config.vocab_size}")
    idx = torch.tensor([prompt] * cfg.num_samples, device=device)  # (B, T)
    eos_id = tokenizer.eot_id if cfg.stop_at_eos else None
    began, steps = time.perf_counter(), 0

    if cfg.num_beams > 1:
        out, logp = model.beam_search(
            idx[:1], cfg.max_new_tokens, cfg.num_beams, eos_id, cfg.kv_cache
        )
        texts, steps = [tokenizer.decode(out[0, hidden:])], out.size(1) - idx.size(1)
        say(texts[0])
        say(f"log-probability {logp.item():.4f}, {cfg.num_beams} beams")
    else:
        generator = torch.Generator(device).manual_seed(cfg.seed)
        settings = (cfg.temperature, cfg.top_k, cfg.top_p, eos_id, generator, cfg.kv_cache)
        shown = ""
        for new in model.stream(idx, cfg.max_new_tokens, *settings):
            idx, steps = torch.cat((idx, new), dim=1), steps + 1
            if cfg.num_samples == 1:
                text = tokenizer.decode(idx[0, hidden:]).rstrip(
                    "\ufffd"
                )  # the rest of a character follows
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
        texts = [
            tokenizer.decode(until_eos(row, len(prompt), eos_id)[hidden:]) for row in idx.tolist()
        ]
        if cfg.num_samples == 1:
            print(texts[0][len(shown) :])
        else:
            for i, text in enumerate(texts):
                print(f"--- sample {i + 1}\n{text}")
    seconds = time.perf_counter() - began
    made = steps * len(texts)
    say(f"{made} tokens in {seconds:.1f} s, {made / seconds:.1f} tokens/s")
    return texts


def until_eos(row, prompt_length, eos_id):
    """Token ids up to and without the first eos_id after the prompt."""
    return row[: row.index(eos_id, prompt_length)] if eos_id in row[prompt_length:] else row


if __name__ == "__main__":
    main(CFG)
