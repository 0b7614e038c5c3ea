"""text to GPT-2 tokens, prepare.py end to end beside tiktoken alone, MB/s; 2 minutes"""

import os

import prepare
from bench.turns import Side, compare, read_text


def ours(file, folder):
    """Megabytes of a text file, read, tokenized and written by prepare.py."""
    turn = 0
    while True:
        turn += 1  # a data set that is there would not be made again
        prepare.main(prepare.Config(f"turn{turn}", (file,), "gpt2", data_dir=folder))
        yield os.path.getsize(file) / 1e6


def tiktoken(file, folder):
    """The same in memory, in pieces of 1 MB on all cores, nothing written."""
    encoding = prepare.open_tiktoken("gpt2").engine
    with open(file, encoding="utf-8", newline="") as f:
        text = f.read()
    pieces = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    while True:
        for i in range(0, len(pieces), 64):  # all tokens of a gigabyte would fill the memory
            encoding.encode_ordinary_batch(pieces[i : i + 64], num_threads=os.cpu_count())
        yield os.path.getsize(file) / 1e6


def run(cfg, folder):
    """The text as often as makes 100 MB at least."""
    text = read_text(cfg.text)
    text = text[:10**6] if cfg.tiny else text * (1 + 10**8 // len(text))
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
    work = (str(folder / "text.txt"), str(folder))
    return compare(cfg, {"prepare.py --tokenizer=gpt2, 100 MB or more (MB/s)": [
        Side("prepare.py, end to end", ours, work), Side("tiktoken alone", tiktoken, work)]})
