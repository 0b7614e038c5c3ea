"""training and decoding beside a busy two-thread process over the same when quiet; 5 minutes"""

import hashlib
import multiprocessing
import threading
import time

from bench import decode, plain, train
from bench.turns import Side, compare


def keep_busy():
    """Hash on two threads, without a pause, for as long as the side lives."""
    def work():
        while multiprocessing.parent_process().is_alive():
            hashlib.sha256(bytes(2**20))  # lets go of the interpreter's lock

    threading.Thread(target=work).start()
    work()


def beside_busy(function, args):
    """The rates of another side, each while a second process is busy."""
    turns = function(*args)
    yield next(turns)
    while True:
        busy = multiprocessing.get_context("spawn").Process(target=keep_busy)
        busy.start()
        time.sleep(5)  # until it has imported what this file does, and is at work
        began = time.perf_counter()
        amount = next(turns)
        seconds = time.perf_counter() - began
        busy.kill()
        yield {"rate": amount / seconds}


def run(cfg, folder):
    """On 2 cores a fair share for two threads is half of the quiet speed."""
    works = {"train 124M, 2 x 256, train.py (tokens/s)": (train.ours, train.CPU_WORK),
             "the same, transformers, plain fp32 loop": (plain.updates, train.CPU_WORK),
             "decode 124M, fp32, sample.py (tokens/s)": (decode.ours, ("fp32",)),
             "the same, int8": (decode.ours, ("int8",)),
             "the same, transformers, fp32": (decode.by_transformers, ("fp32",))}
    comparisons = {}
    for work, side in works.items():
        ours = "transformers" not in work
        comparisons[work] = [Side("beside a busy process", beside_busy, side, ours=ours),
                             Side("quiet", *side, ours=ours)]
    return compare(cfg, comparisons)
