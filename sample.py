"""Stage 3: text from a trained model, printed as it is made.

python sample.py --start "Every effort moves you"      # the newest run under out/
python sample.py --out_dir=out/verdict --temperature=0 --start=FILE:prompt.txt
python sample.py --init_from=gpt2 --num_beams=4        # GPT-2's own weights
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import at_least, fail, load


@dataclass
class Config:
    """Generate text."""

    out_dir: str | None = None  # a run of train.py; None: the newest under out/
    checkpoint: str = "newest"  # newest, best or a checkpoint-... folder's name
    init_from: str | None = None  # instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, folder
    start: str | None = None  # the prompt, or FILE:path; '': end-of-text; None: the run's own
    num_samples: int = 1  # texts, made as one batch
    max_new_tokens: int = 200  # tokens a text at most
    temperature: float = 0.8  # below 1 bolder, above 1 wilder; 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the smallest set whose probability reaches p
    num_beams: int = 1  # above 1: search for the likeliest text instead of drawing
    stop_at_eos: bool = True  # end a text at the end-of-text token
    kv_cache: bool = True  # False: compute every token anew (slow, for comparison)
    seed: int = 1337  # the same seed gives the same text
    quantize: Literal["none", "bf16", "int8"] = "none"  # smaller weights, faster; int8: CPU only
    chat: bool = False  # prompts from the terminal, one line each; Ctrl-C stops a text, Ctrl-D ends


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import torch

import prepare
from model import GPT, pack
from runtime import checkpoints, say, tune_allocator


def load_run(out_dir, checkpoint):
    """(model, tokenizer, the run's prompt) of a checkpoint, named in the output.

    out_dir None: the newest run of train.py; the other scripts' checkpoints have no meta.json.
    """
    if out_dir is None:
        runs = [c[0] for folder in Path("out").glob("*/") if (c := checkpoints(folder))]
        runs = [newest for newest in runs if (newest / "meta.json").exists()]
        if not runs:
            fail("no run under out/; train one: python train.py")
        out_dir = max(runs, key=lambda newest: newest.stat().st_mtime).parent
    out_dir = Path(out_dir)
    found = checkpoints(out_dir)
    if checkpoint == "newest" and not found:
        fail(f"{out_dir} holds no checkpoint; train it or name another --out_dir")
    folder = found[0] if checkpoint == "newest" else out_dir / checkpoint
    if not folder.is_dir():
        names = ", ".join(p.name for p in sorted(out_dir.glob("*/"))) or "nothing"
        fail(f"--checkpoint {checkpoint} is not in {out_dir}; it holds {names}")
    say(f"sampling from {folder}")
    model, tokenizer = GPT.from_checkpoint(folder), prepare.load_tokenizer(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return model, tokenizer, str(saved.get("train", {}).get("sample_start", ""))


def load_weights(name):
    """(model, tokenizer, no prompt) of GPT-2 weights or a transformers folder."""
    model = GPT.from_pretrained(name)
    if (Path(name) / "tokenizer.json").exists():
        return model, prepare.Tokenizer("tokenizer.json", prepare.open_tokenizer_file(name)), ""
    return model, prepare.open_tiktoken("gpt2"), ""


def read_prompt(start):
    """The prompt's text: `start` itself, or the file named after FILE:."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--start {start}: {getattr(error, 'strerror', None) or error}")


def complete(model, tokenizer, text, cfg, generator):
    """Continue `text`: print it as it is made, then tokens/s. Returns the cfg.num_samples texts."""
    prompt = tokenizer.encode(text)
    if tokenizer.decode(prompt) != text:
        say("warning: the model's vocabulary cannot write this prompt; it sees something else")
    opener = 0 if prompt else 1  # an empty prompt is the end-of-text token, which is not shown
    prompt = prompt or [tokenizer.eot_id]
    if prompt == [None]:
        fail("this tokenizer has no end-of-text token to begin with; give a --start", 2)
    if max(prompt) >= model.config.vocab_size:
        fail(f"the prompt has token {max(prompt)}, past the model's {model.config.vocab_size}")
    idx = torch.tensor([prompt] * cfg.num_samples, device=generator.device)  # (B, T)
    eos_id = tokenizer.eot_id if cfg.stop_at_eos else None

    def text_of(row):  # without the end-of-text tokens that open and close it
        ids = row.tolist()[len(prompt) :]
        ids = ids[: ids.index(eos_id)] if eos_id in ids else ids
        known = [i for i in ids if i < tokenizer.vocab_size]  # a head can be padded
        return tokenizer.decode(prompt[opener:] + known)

    began, shown = time.perf_counter(), ""
    if cfg.num_beams > 1:
        search = (cfg.max_new_tokens, cfg.num_beams, eos_id, cfg.kv_cache)
        idx, logp = model.beam_search(idx, *search)
    else:
        settings = (cfg.temperature, cfg.top_k, cfg.top_p, eos_id, generator, cfg.kv_cache)
        for new in model.stream(idx, cfg.max_new_tokens, *settings):
            idx = torch.cat((idx, new), dim=1)
            if cfg.num_samples == 1:
                made = text_of(idx[0]).rstrip("\ufffd")  # the rest of a character is to come
                print(made[len(shown) :], end="", flush=True)
                shown = made
    seconds, texts = time.perf_counter() - began, [text_of(row) for row in idx]
    if cfg.num_samples == 1:
        print(texts[0][len(shown) :])
    else:
        print("\n".join(f"--- sample {i + 1}\n{text}" for i, text in enumerate(texts)))
    if cfg.num_beams > 1:
        print(f"log-probability {logp.item():.4f}, {cfg.num_beams} beams")
    count = (idx.size(1) - len(prompt)) * len(texts)
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", flush=True)
    return texts


def chat(model, tokenizer, text, cfg, generator):
    """Continue `text` where there is one, then what is typed, line by line, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # editing and history; Windows has its own
        import readline  # noqa: F401
    print("type the beginning of a text; Ctrl-C stops a text, Ctrl-D ends")
    while True:
        try:
            line, text = text or input("> "), ""
            complete(model, tokenizer, line, cfg, generator)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print()


def main(cfg):
    """Generate, print, and return the texts (list of str, prompt included; chat: None)."""
    at_least(cfg, 1, "num_samples", "max_new_tokens", "num_beams")
    at_least(cfg, 0, "temperature", "seed")
    if cfg.top_k is not None:
        at_least(cfg, 1, "top_k")
    if cfg.top_p is not None and not 0 < cfg.top_p <= 1:
        fail(f"--top_p {cfg.top_p} must lie above 0 and at most at 1", 2)
    if cfg.num_beams > 1 and cfg.num_samples > 1:
        fail("--num_beams finds one text, the likeliest: use it with --num_samples 1", 2)
    text = None if cfg.start is None else read_prompt(cfg.start)
    tune_allocator()
    source = (cfg.init_from,) if cfg.init_from else (cfg.out_dir, cfg.checkpoint)
    model, tokenizer, start = (load_weights if cfg.init_from else load_run)(*source)
    if text is None:
        text = "" if cfg.chat else start
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if cfg.quantize == "int8" and str(device) != "cpu":
        fail(f"--quantize=int8 runs on a CPU, not on {device}; use --quantize=bf16", 2)
    model.to(device)
    if cfg.quantize != "none":
        pack(model, cfg.quantize)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    return (chat if cfg.chat else complete)(model, tokenizer, text, cfg, generator)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the code page of a Windows pipe
    try:
        main(CFG)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
