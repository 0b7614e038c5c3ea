"""text to GPT-2 tokens, prepare.py end to end beside tiktoken alone, MB/s; 2 minutes"""

import itertools
import os

import prepare
from bench.scripts import prepare_data, read_text
from bench.turns import Side, compare


def ours(file):
    """Megabytes of a text file, read, tokenized and written by prepare.py."""
    for turn in itertools.count():  # a data set that is there would not be made again
        prepare_data(f"turn{turn}", file, "gpt2", file.parent)
        yield file.stat().st_size / 1e6


def tiktoken(file):
    """The same in memory, in pieces of 1 MB on all cores, nothing written."""
    encoding = prepare.open_tiktoken("gpt2").engine
    text = file.read_text(encoding="utf-8")
    pieces = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    while True:
        for i in range(0, len(pieces), 64):  # all tokens of a gigabyte would fill the memory
            encoding.encode_ordinary_batch(pieces[i : i + 64], num_threads=os.cpu_count())
        yield file.stat().st_size / 1e6


def run(cfg, folder):
    """The text as often as makes 100 MB at least."""
    text = read_text(cfg.text)
    file = folder / "text.txt"
    file.write_text(text * (1 + 10**8 // len(text)), encoding="utf-8")
    return compare(cfg, {"prepare.py --tokenizer=gpt2, 100 MB or more (MB/s)": [
        Side("prepare.py, end to end", ours, (file,)), Side("tiktoken alone", tiktoken, (file,))]})
