"""Taking turns: each side of a comparison is a process of its own, and they go A B A B.

A side is a generator: the first next() sets up and warms, each later one does a turn of work and
yields its amount; or (amount, seconds, {figure: number}), with seconds None for the whole turn's.
Imports the standard library only: a side may live in another Python, as llama.py's may.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BF16 = "bf16 matrix product, GFLOP/s"
COPY = "copy, GB/s read and written"
WIDTHS = (52, 32, 10, 26, 8, 0)  # of the table's columns, at least


class Side(NamedTuple):
    """One side of a comparison; args must be writable as JSON."""

    name: str
    function: Callable  # function(*args) is the generator
    args: tuple = ()
    limit: tuple = (None, 0)  # (a limit of the machine, how much of it one unit costs at least)
    needs: str = ""  # a package; where it is missing the side is skipped, by name
    python: str = sys.executable
    env: dict | None = None  # more environment variables


def serve(module, name, args):
    """In the side's process: set up, then do a turn for each line on stdin and answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the work itself prints is no answer
    turns = getattr(importlib.import_module(module), name)(*args)
    next(turns)
    print("ready", file=answers)
    for _ in sys.stdin:
        began = time.perf_counter()
        done = next(turns)
        finish()
        elapsed = time.perf_counter() - began
        amount, seconds, figures = done if isinstance(done, tuple) else (done, None, {})
        print(json.dumps([amount / (seconds or elapsed), figures]), file=answers)


def finish():
    """Wait until a GPU has done what it was told."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def is_missing(side):
    """Whether the side's Python lacks the package that it needs."""
    try:
        probe = [side.python, "-c", f"import {side.needs}"]
        return bool(side.needs) and subprocess.run(probe, capture_output=True).returncode != 0
    except OSError:  # there is no such Python
        return True


def start(side):
    """Start the side's process."""
    function = json.dumps([side.function.__module__, side.function.__name__, side.args])
    paths = [str(ROOT), *(filter(None, sys.path) if side.python == sys.executable else ())]
    env = {**os.environ, **(side.env or {}), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([side.python, "-m", "bench.turns", function], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def take_turns(sides, rounds):
    """For each side the list of its (rate, figures), one a round. Raises UserError where a side
    fails, which has then printed why."""
    children = [start(side) for side in sides]
    answers = [[] for _ in sides]

    def ask(i):
        line = children[i].stdout.readline()
        if not line:
            from runtime import UserError  # here, as it needs packages

            raise UserError(f"the side {sides[i].name!r} ended; why stands above")
        return line

    try:
        for i in range(len(sides)):  # all of them: setting up would disturb another's turn
            ask(i)
        for _ in range(rounds):
            for i, child in enumerate(children):
                child.stdin.write("go\n")
                child.stdin.flush()
                answers[i].append(json.loads(ask(i)))
    except BaseException:  # Ctrl-C, too: no side goes on alone
        for child in children:
            child.kill()
        raise
    finally:
        for child in children:
            child.communicate()  # closes stdin, which ends a side
    return answers


# ---------------------------------------------------------------------------------------------
# the machine, the table


def device_type():
    """Where the sides' models run: 'cuda' or 'cpu'."""
    import torch  # here and below: see the top

    return "cuda" if torch.cuda.is_available() else "cpu"


def shape(cfg):
    """The fields of model.GPTConfig that make GPT-2 124M, or a tiny one."""
    if cfg.tiny:
        return {"vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 64}
    return {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}


@functools.lru_cache(maxsize=1)
def limits(rounds, tiny):
    """The machine's own speed: {name: median rate in 1e9 a second}."""
    import torch

    device = device_type()
    width = 64 if tiny else {"cpu": 2048, "cuda": 8192}[device]
    a = torch.randn(width, width, device=device)
    b = a.bfloat16()
    source = torch.randn(width**2 * 16, device=device)
    target = torch.empty_like(source)
    measured = {}
    for name, work, amount in (
        ("fp32 matrix product, GFLOP/s", lambda: a @ a, 2 * width**3),
        (BF16, lambda: b @ b, 2 * width**3),
        (COPY, lambda: target.copy_(source), 2 * source.nbytes),
    ):
        rates = []
        for _ in range(rounds + 1):  # the first one warms up
            began = time.perf_counter()
            for _ in range(10):
                work()
            finish()
            rates.append(10 * amount / (time.perf_counter() - began) / 1e9)
        measured[name] = statistics.median(rates[1:])
        print(f"{name}: {measured[name]:,.0f}")
    return measured


def print_row(cells, widths):
    """One line of a Markdown table, to be pasted into docs/LOG.md."""
    cells = [str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)]
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(cells, widths):
    """The first two lines of a Markdown table."""
    print_row(cells, widths)
    print_row(["-" * max(3, width) for width in widths], widths)


def mean_and_deviation(values):
    """[1.37, 1.38, 1.36] -> '1.370 +- 0.010'."""
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def compare(cfg, comparisons, rounds=5):
    """Let the sides of each {work: sides} take turns, ours first. Prints medians, ours over each
    peer's with its spread, and ours as a share of its limit. Returns the same, for JSON."""
    rounds = cfg.rounds or rounds
    skipped = {s.name: s.needs for sides in comparisons.values() for s in sides if is_missing(s)}
    for name, package in skipped.items():  # before anything slow
        print(f"skipped: {name} needs the package {package}, which is not installed")
    known = limits(rounds, cfg.tiny)
    print(f"\nmedians of {rounds} round(s)\n")
    print_header(("work", "side", "rate", "ours / it (spread)", "of limit", "figures"), WIDTHS)
    table = []
    for work, sides in comparisons.items():
        sides = [side for side in sides if side.name not in skipped]
        answers = take_turns(sides, rounds)
        ours = [rate for rate, _ in answers[0]]
        for side, answer in zip(sides, answers, strict=True):
            rates = [rate for rate, _ in answer]
            median = statistics.median(rates)
            ratio = statistics.median(ours) / median
            ratios = [a / b for a, b in zip(ours, rates, strict=True)]
            spread = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            limit, cost = side.limit
            share = f"{median * cost / 1e9 / known[limit]:.0%}" if limit in known else ""
            figures = {name: [f[name] for _, f in answer] for name in answer[0][1]}
            words = ", ".join(f"{k} {mean_and_deviation(v)}" for k, v in figures.items())
            first = side is sides[0]
            print_row((work if first else "", side.name, f"{median:,.1f}", "" if first else spread,
                       share, words), WIDTHS)
            table.append({"work": work, "side": side.name, "rates": rates, "ratio": ratio,
                          "share": share, "figures": figures})
    return {"limits": known, "skipped": skipped, "table": table}


# ---------------------------------------------------------------------------------------------
# sides that are whole scripts


def read_text(path):
    """The text of a file, or of the standard library."""
    import prepare

    files = prepare.source_files(path or "stdlib", ".")
    return "".join(Path(file).read_text(encoding="utf-8") for file in files)


def prepare_data(name, source, tokenizer, folder, vocab_size=None):
    """prepare.py's data set folder/name, without its words."""
    import prepare

    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main(prepare.Config(name, (str(source),), tokenizer, vocab_size,
                                    data_dir=str(folder)))


def run_python(words, folder, checkout=ROOT, **env):
    """Run a Python command to its end, OUT in `words` being a new folder. Returns (what it printed,
    peak GB of its process, or of the largest where it starts others)."""
    out = tempfile.mkdtemp(dir=folder)
    child = subprocess.Popen([sys.executable, *(word.replace("OUT", out) for word in words)],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout), **env})
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)  # POSIX only: the peak memory of one child
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{words} failed:\n{said[-2000:]}")
    return said, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def command(words, folder, checkout=str(ROOT)):
    """A Python command from start to end: 3,600 a turn, hence runs an hour, with its last losses
    and its peak memory. SEED in `words` becomes another number each turn; OUT see run_python."""
    yield 0  # all of the work is in the turns
    seed = 1337
    while True:
        words_now = [word.replace("SEED", str(seed)) for word in words]
        said, memory = run_python(words_now, folder, checkout)
        figures = dict(re.findall(r"(train loss|val loss) ([\d.]+)", said))
        figures |= {name: n for n, name in re.findall(r"([\d.]+) (bits per byte)", said)}
        figures = {name: float(number) for name, number in figures.items()}
        yield 3600, None, figures | {"GB": memory}
        seed += 1


def logged_speed(script, options, folder):
    """The tokens/s that a training script itself logs for its last iterations: its real loop,
    warmed up, without start, evaluation and saving."""
    from runtime import read_log

    module = importlib.import_module(script)
    yield 0
    while True:
        out = tempfile.mkdtemp(dir=folder)
        module.main(module.Config(**options, out_dir=out))
        speeds = [row["tokens_per_s"] for row in read_log(Path(out, "log.csv"))]
        yield [speed for speed in speeds if speed][-1], 1.0, {}


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
