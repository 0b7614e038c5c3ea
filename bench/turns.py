"""Taking turns: each side of a comparison is a process of its own, and they go A B A B.

A side is a generator: the first next() sets up and warms up, each later one does a turn of work
and yields its amount, or {"rate": a rate that it measured itself, more figures ...}.
"""

import functools
import importlib.util
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from configurator import OPENMP
from runtime import UserError

SHAPE = {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}  # GPT-2 124M
BF16 = "bf16 matrix product, GFLOP/s"
COPY = "copy, GB/s read and written"


class Side(NamedTuple):
    """One side of a comparison."""

    name: str
    function: Callable  # function(*args) is the generator; both must be picklable
    args: tuple = ()
    limit: str = ""  # the limit of the machine that holds for it: BF16 or COPY
    cost: float = 0.0  # how much of that one unit of work costs at least
    needs: str = ""  # a package; where it is missing the side is skipped, by name
    ours: bool = False  # with the OpenMP settings of our scripts; a peer has OpenMP's own


def serve(pipe, function, args):
    """In the side's process: a next() for each message, answered by the rate and the figures."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the table is no place for a peer's words
    turns = function(*args)
    while pipe.recv():
        began = time.perf_counter()
        done = next(turns)
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # until then it has only been told what to do
        seconds = time.perf_counter() - began
        pipe.send(done if isinstance(done, dict) else {"rate": done / seconds})


def take_turns(sides, rounds):
    """For each side the list of its answers, one a round. Raises UserError where a side fails,
    which has then printed why."""
    context = multiprocessing.get_context("spawn")
    children = []
    pipes = []
    for side in sides:
        pipe, its_end = context.Pipe()
        for name, value in OPENMP.items():
            os.environ.pop(name, None)
            if side.ours:
                os.environ[name] = value
        child = context.Process(target=serve, args=(its_end, side.function, side.args))
        child.start()
        its_end.close()  # else recv() would not notice that the side has ended
        children.append(child)
        pipes.append(pipe)
    answers = [[] for _ in sides]
    try:
        # round 0 sets all sides up: doing it later would disturb another's turn
        for _ in range(1 + rounds):
            for i, pipe in enumerate(pipes):
                pipe.send("go")
                answers[i].append(pipe.recv())
    except (EOFError, OSError):
        raise UserError(f"the side {sides[i].name!r} ended; why stands above") from None
    finally:  # Ctrl-C, too: no side goes on alone
        for child in children:
            child.kill()
            child.join()
    return [answer[1:] for answer in answers]


# ---------------------------------------------------------------------------------------------
# the machine, the table


@functools.cache
def limits():
    """The machine's own speed: {name: median rate in 1e9 a second}."""
    import torch  # only here: a side's process may not need it
    from torch.utils.benchmark import Timer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = {"cpu": 2048, "cuda": 8192}[device]
    matrix = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    source = torch.randn(16 * width**2, device=device)
    tensors = {"matrix": matrix, "source": source, "target": torch.empty_like(source)}
    measured = {}
    for name, statement, amount in ((BF16, "matrix @ matrix", 2 * width**3),
                                    (COPY, "target.copy_(source)", 2 * source.nbytes)):
        timer = Timer(statement, globals=tensors, num_threads=torch.get_num_threads())
        measured[name] = amount / timer.blocked_autorange(min_run_time=2).median / 1e9
        print(f"{name}: {measured[name]:,.0f}")
    return measured


def print_table(rows):
    """Print rows of words, the first one the heads, as a Markdown table for docs/LOG.md."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |", flush=True)


def mean_and_deviation(values):
    """[1.37, 1.38, 1.36] -> '1.370 +- 0.010'."""
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def compare(cfg, comparisons, rounds=5):
    """Let the sides of each {work: sides} take turns, ours first. Prints a table a work: medians,
    ours over each peer's with its spread, and the share of its limit. Returns it all, for JSON."""
    rounds = cfg.rounds or rounds
    skipped = {side.name: side.needs for side in itertools.chain(*comparisons.values())
               if side.needs and not importlib.util.find_spec(side.needs)}
    for name, package in skipped.items():  # before anything slow
        print(f"skipped: {name} needs the package {package}, which is not installed")
    known = limits()
    results = []
    for work, sides in comparisons.items():
        sides = [side for side in sides if side.name not in skipped]
        rows = [(work, f"median of {rounds}", "ours / it (spread)", "of limit", "figures")]
        answers = take_turns(sides, rounds)
        ours = [answer["rate"] for answer in answers[0]]
        for side, answer in zip(sides, answers, strict=True):
            figures = {name: [turn[name] for turn in answer] for name in answer[0]}
            rates = figures.pop("rate")
            median = statistics.median(rates)
            ratio = statistics.median(ours) / median
            ratios = [a / b for a, b in zip(ours, rates, strict=True)]
            share = median * side.cost / 1e9 / known[side.limit] if side.limit else None
            rows.append((side.name, f"{median:,.1f}",
                         f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                         f"{share:.0%}" if share else "",
                         ", ".join(f"{k} {mean_and_deviation(v)}" for k, v in figures.items())))
            results.append({"work": work, "side": side.name, "rates": rates, "ratio": ratio,
                            "share": share, "figures": figures})
        print()
        print_table(rows)
    return {"limits": known, "skipped": skipped, "table": results}
