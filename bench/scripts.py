"""Sides that are whole scripts, and the data for them."""

import contextlib
import importlib
import io
import itertools
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prepare
from runtime import read_log

ROOT = Path(__file__).parent.parent
FIGURES = {name: rf"(?<!best ){name} ([\d.]+)" for name in ("train loss", "val loss")}
FIGURES |= {name: r"([\d.,]+) ?" + name for name in ("bits per byte", "tokens/s", "M parameters")}


def read_text(path):
    """The text of a file, or of the standard library."""
    files = prepare.source_files(path or "stdlib", ".")
    return "".join(Path(file).read_text(encoding="utf-8") for file in files)


def prepare_data(name, source, tokenizer, folder, vocab_size=None):
    """prepare.py's data set folder/name, without its words. Returns its vocabulary's size."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main(prepare.Config(name, (str(source),), tokenizer, vocab_size,
                                    data_dir=str(folder)))
    return prepare.read_meta(folder / name)["vocab_size"]


def command(words, folder, checkout=ROOT):
    """A Python command from start to end: runs an hour, the last FIGURES that it printed, and the
    peak memory of its largest process. In `words` OUT becomes a new folder each turn, SEED another
    number."""
    yield 0  # all of the work is in the turns
    for seed in itertools.count(1337):
        filled = [word.replace("OUT", tempfile.mkdtemp(dir=folder)).replace("SEED", str(seed))
                  for word in words]
        began = time.perf_counter()
        said = subprocess.run([sys.executable, *filled], cwd=checkout, stdout=subprocess.PIPE,
                              text=True, check=True).stdout
        answer = {"rate": 3600 / (time.perf_counter() - began)}
        for name, pattern in FIGURES.items():
            if found := re.findall(pattern, said):
                answer[name] = float(found[-1].replace(",", ""))
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        yield answer | {"GB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9}


def logged_speed(script, options, folder):
    """The tokens/s that a training script itself logs for its last iterations: its real loop,
    warmed up, without start, evaluation and saving."""
    module = importlib.import_module(script)
    yield 0
    while True:
        with tempfile.TemporaryDirectory(dir=folder) as out:  # checkpoints are large
            module.main(module.Config(**options, out_dir=out))
            speeds = [row["tokens_per_s"] for row in read_log(Path(out, "log.csv"))]
        yield {"rate": [speed for speed in speeds if speed][-1]}
