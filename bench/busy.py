"""training and decoding beside a busy two-thread process over the same when quiet; 5 minutes"""

import importlib
import os
import subprocess
import sys
import time

from bench import decode, plain, train
from bench.turns import Side, compare, shape

BUSY = """
import hashlib, os, threading
def work():
    while os.getppid() == {parent}:  # it ends with the benchmark, however that ends
        hashlib.sha256(bytes(2**20))
for _ in range(2):
    threading.Thread(target=work).start()
"""


def beside_busy(module, function, args):
    """The turns of another side, each while two threads of another process hash without a pause."""
    turns = getattr(importlib.import_module(module), function)(*args)
    yield next(turns)
    while True:
        code = BUSY.format(parent=os.getpid())
        with subprocess.Popen([sys.executable, "-c", code]) as busy:
            time.sleep(0.5)  # until it is at work
            began = time.perf_counter()
            amount = next(turns)
            seconds = time.perf_counter() - began
            busy.kill()
        yield amount, seconds, {}


def run(cfg, folder):
    """On 2 cores a fair share for two threads is half of the quiet speed."""
    decoding = (shape(cfg), 20 if cfg.tiny else 200)
    comparisons = {}
    for work, function, args in (
        ("train 124M, 2 x 256, train.py (tokens/s)", train.ours, train.cpu_work(cfg)),
        ("the same, transformers, plain fp32 loop", plain.updates, train.cpu_work(cfg)),
        ("decode 124M, fp32, sample.py (tokens/s)", decode.ours, (*decoding, "fp32")),
        ("the same, int8", decode.ours, (*decoding, "int8")),
        ("the same, transformers, fp32", decode.by_transformers, (*decoding, "fp32")),
    ):
        other = (function.__module__, function.__name__, args)
        comparisons[work] = [Side("beside a busy process", beside_busy, other),
                             Side("quiet", function, args)]
    return compare(cfg, comparisons)
