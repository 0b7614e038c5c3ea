"""Stage 1: text -> data/NAME/{train,val}.npy, meta.json and, where made here, tokenizer.json.

    python prepare.py                                    # Python's standard library: no network
    python prepare.py --dataset=verdict                  # a preset; see PRESETS below
    python prepare.py --dataset=mine --source=book.txt   # own text: file, folder, glob, URL, hf:...

One file is one text: its first 90 % of characters train, the rest validates. Several files, or
the rows of a hub data set, are documents: each goes whole to one split and ends with the
end-of-text token. `--shard=i/n` prepares one slice of the documents, on as many machines as you
like; train.py reads data/NAME/shard-* as one data set, without a copy.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sysconfig
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from itertools import accumulate
from pathlib import Path

from configurator import fail, load

GITHUB = "https://raw.githubusercontent.com"
PRESETS = {  # name: (source, tokenizer, vocab_size, SHA-256 of the download where it is fixed)
    "stdlib": ("stdlib", "bpe", 4096, None),
    "verdict": (
        f"{GITHUB}/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
        "gpt2", None, "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"),
    "shakespeare": (
        f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "gpt2", None, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "kant": (
        f"{GITHUB}/PacktPublishing/Transformers-for-Natural-Language-Processing/master"
        "/Chapter03/kant.txt", "bpe", 4096, None),
    "azwiki": ("hf:wikimedia/wikipedia:20231101.az:text", "bpe", 16384, None),
    "fineweb": ("hf:HuggingFaceFW/fineweb-edu:sample-10BT:text", "gpt2", None, None),
}  # fmt: skip


@dataclass
class Config:
    """Turn text into token files."""

    dataset: str = "stdlib"  # name of the folder under data_dir; a preset's name fills in the rest
    source: str | None = None  # file, folder, 'glob/**/*.py', URL or hf:REPO[:CONFIG[:COLUMN]]
    tokenizer: str | None = None  # any tiktoken encoding (gpt2), bpe, char or a tokenizer.json
    vocab_size: int | None = None  # of a bpe trained here; None: 4096
    val_fraction: float = 0.1  # share of the characters, or of the documents, that validates
    shard: str | None = None  # i/n: only slice i of n of the documents, i from 0 to n - 1
    data_dir: str = "data"  # where the folder is made


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import numpy as np
import requests
import tiktoken
from requests.adapters import HTTPAdapter, Retry
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from tqdm import tqdm

from runtime import lock_folder, say, sha256

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 18  # characters tokenized at a time
SAMPLE = 1 << 26  # characters that train a BPE: more change little and cost memory
FORMAT_VERSION = 1
SPLITS = ("train", "val")
COUNTS = ("train_tokens", "val_tokens", "train_bytes", "val_bytes")
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # first one found closes texts


# ---------------------------------------------------------------------------------------------
# sources: what the user named -> local files -> (split, text, ends a document)


def fetch(url, path):
    """Download `url` to `path` unless it is there: retries, progress, whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".tmp-{path.name}")
        session = requests.Session()
        retry = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        try:
            with session.get(url, stream=True, timeout=(10, 60)) as response:
                response.raise_for_status()
                size = int(response.headers.get("Content-Length", 0))
                bar = dict(total=size, unit="B", unit_scale=True, desc=path.name, disable=None)
                with open(beside, "wb") as f, tqdm(**bar) as progress:
                    for block in response.iter_content(1 << 16):
                        progress.update(f.write(block))
        except OSError as error:  # those of requests too
            beside.unlink(missing_ok=True)
            answer = getattr(error, "response", None)
            why = error.strerror or type(error).__name__ if answer is None else answer.status_code
            fail(f"cannot download {url} ({why}); put the file at {path} by hand, or use text "
                 "that needs no network: python prepare.py --dataset=stdlib")  # fmt: skip
        beside.replace(path)
        say(f"downloaded {url} -> {path} ({path.stat().st_size:,} bytes)")
    wanted, found = {preset[0]: preset[3] for preset in PRESETS.values()}.get(url), sha256(path)
    if wanted and found != wanted:
        fail(f"{path} has SHA-256 {found}, not {wanted}; delete it to download it again")


def source_files(source, raw_dir):
    """A preset's name, a file, folder, glob or URL -> the local text files (list of Path)."""
    if source in PRESETS and not Path(source).exists():
        source = PRESETS[source][0]
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        return sorted(files, key=lambda p: p.relative_to(root).as_posix())
    if source.startswith(("https://", "http://")):
        name = re.sub(r"[^\w.-]", "_", source.rstrip("/").rsplit("/", 1)[-1])[-80:]  # no path
        path = Path(raw_dir, f"raw-{hashlib.sha256(source.encode()).hexdigest()[:8]}-{name}")
        fetch(source, path)
        return [path]
    if Path(source).is_dir():
        files = [p for p in Path(source).rglob("*") if p.suffix.lower() in (".txt", ".md")]
    else:
        files = map(Path, [source] if Path(source).is_file() else glob(source, recursive=True))
    files = sorted(p for p in files if p.is_file())
    if not files:
        fail(f"--source {source}: no such file, no folder with .txt or .md files, no glob such as "
             f"'{source}/**/*.py' and no preset ({', '.join(PRESETS)})")  # fmt: skip
    return files


def read_pieces(f, left=math.inf):
    """Yield the next `left` characters of a text file in pieces of about PIECE characters.

    A piece ends between a letter or digit and white space, which no byte-level tokenizer joins:
    the pieces' tokens are those of the whole text. Text without such a place is cut anywhere.
    """
    rest = ""
    try:
        while block := f.read(min(PIECE, left)):
            left -= len(block)
            rest += block
            last = re.match(r"(?s:.*)(?<=[^\W_])(?=\s)", rest)
            if last or len(rest) > 4 * PIECE:
                cut = last.end() if last else len(rest)
                yield rest[:cut]
                rest = rest[cut:]
    except UnicodeDecodeError as error:
        at = f.buffer.tell() - len(error.object) + error.start
        fail(f"{f.name} is not UTF-8: byte {error.object[error.start]:#04x} at offset {at}; "
             f"convert it: iconv -f ENCODING -t utf-8 {f.name}")  # fmt: skip
    if rest:
        yield rest


def read_files(files, sums, val_fraction, one_text):
    """Yield (split, text, ends a document) over local files; `sums` are their SHA-256."""
    for file, checksum in zip(files, sums, strict=True):
        with open(file, encoding="utf-8", newline="") as f:  # keeps byte-order mark and CRLF
            split = "val" if one_text or lot(checksum) <= val_fraction else "train"
            if one_text:
                total = sum(len(piece) for piece in read_pieces(f))
                f.seek(0)
                for piece in read_pieces(f, int(total * (1 - val_fraction))):
                    yield "train", piece, False
            for piece in read_pieces(f):
                yield split, piece, False
        if not one_text:
            yield split, "", True


def lot(checksum):
    """A number in [0, 1) for a document's SHA-256: the same text, the same split."""
    return int(checksum[:12], 16) / 2**48


def read_hub(source, val_fraction, i, n):
    """Yield (split, text, True) over slice i of n of hf:REPO[:CONFIG[:COLUMN]], streamed."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    repo, config, column = (source.removeprefix("hf:").split(":") + ["", ""])[:3]
    column = column or "text"
    try:
        rows = datasets.load_dataset(repo, config or None, split="train", streaming=True)
        for row in split_dataset_by_node(rows, i, n):
            text = row.get(column, 0) or ""
            if column not in row or not isinstance(text, str):
                fail(f"{source}: no text column {column!r}; the columns are {', '.join(row)}: "
                     f"--source hf:{repo}:{config}:COLUMN", 2)  # fmt: skip
            place = lot(hashlib.sha256(text.encode()).hexdigest())
            yield "val" if place <= val_fraction else "train", text, True
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        fail(f"cannot read {source}: {str(error)[:300]}; the hub needs a network, "
             "--dataset=stdlib does not")  # fmt: skip


# ---------------------------------------------------------------------------------------------
# tokenizers


class Tokenizer:
    """tiktoken and Hugging Face tokenizers behind one face. Special tokens in text are text.

    name: what meta.json says; vocab_size; eot_id: the end-of-text token's id, or None.
    """

    def __init__(self, name, engine):
        self.name, self.engine = name, engine
        self.tiktoken = isinstance(engine, tiktoken.Encoding)
        if self.tiktoken:
            self.vocab_size, self.eot_id = engine.n_vocab, engine.eot_token
        else:
            engine.encode_special_tokens = True
            engine.no_truncation()  # what the file asks for is meant for other uses
            engine.no_padding()
            vocabulary = engine.get_vocab()
            self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
            self.eot_id = next((vocabulary[name] for name in ENDS if name in vocabulary), None)

    def encode_batch(self, texts):
        """list of str -> list of integer arrays."""
        if self.tiktoken:
            return [self.engine.encode_to_numpy(t, disallowed_special=()) for t in texts]
        rows = self.engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(row.ids, dtype=np.uint32) for row in rows]

    def encode(self, text):
        """str -> list of token ids."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids):
        """Token ids -> str; bytes that are no UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if self.tiktoken:
            return self.engine.decode(ids)
        return self.engine.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder):
    """The Tokenizer of a data folder or checkpoint (it holds meta.json)."""
    name = Path(read_meta(folder)["tokenizer"]).name  # a stranger's file may not lead elsewhere
    if name.endswith(".json"):
        return Tokenizer(name, open_tokenizer_file(parts(folder)[0] / name))
    return open_tiktoken(name)


def open_tokenizer_file(path):
    """The Hugging Face tokenizer in a tokenizer.json, or in the folder that holds one."""
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        return HFTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        fail(f"tokenizer file {path} cannot be read: {error}")


def open_tiktoken(name):
    """The tiktoken encoding `name`; exits with code 2 if there is none, 1 if it cannot be had."""
    if name not in tiktoken.list_encoding_names():
        names = ", ".join(["bpe", "char", *tiktoken.list_encoding_names()])
        fail(f"tokenizer {name}: neither a tokenizer.json that is there nor one of {names}", 2)
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        fail(f"cannot download the vocabulary of {name} ({type(error).__name__}); point "
             "TIKTOKEN_CACHE_DIR to a copy, or train one here: --tokenizer=bpe")  # fmt: skip


def make_tokenizer(cfg, texts, size):
    """The Tokenizer that `cfg` asks for. `texts()` iterates over the text; `size`: its bytes, or
    None where they are not known. 'bpe' and 'char' are made from the text, the rest is loaded."""
    if cfg.tokenizer == "char":
        seen = set()
        for text in texts():
            seen.update(text)
        vocabulary = {c: i for i, c in enumerate([*sorted(seen), END_OF_TEXT])}
        engine = HFTokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        engine.decoder = decoders.Fuse()
        engine.add_special_tokens([END_OF_TEXT])
    elif cfg.tokenizer == "bpe":
        engine = HFTokenizer(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=cfg.vocab_size, special_tokens=[END_OF_TEXT],
                                      initial_alphabet=alphabet, show_progress=False)  # fmt: skip
        say(f"training a BPE of {cfg.vocab_size:,} tokens ...")
        engine.train_from_iterator(sample(texts(), size), trainer)
        if engine.get_vocab_size() < cfg.vocab_size:
            fail(f"--vocab_size {cfg.vocab_size}: this text gives only {engine.get_vocab_size()} "
                 f"tokens; use --vocab_size {engine.get_vocab_size()} or more text")  # fmt: skip
    elif cfg.tokenizer.endswith(".json"):
        engine = open_tokenizer_file(cfg.tokenizer)
    else:
        return open_tiktoken(cfg.tokenizer)
    return Tokenizer("tokenizer.json", engine)


def sample(texts, size):
    """About SAMPLE characters: every k-th piece where `size` is known, else the first ones."""
    every, taken = (size or 0) // SAMPLE + 1, 0
    for i, text in enumerate(texts):
        if i % every == 0:
            yield text
            taken += len(text)
        if taken > SAMPLE:
            return


# ---------------------------------------------------------------------------------------------
# tokens -> files


def groups(pieces):
    """Gather (split, text, ends) into lists of about PIECE characters."""
    group, characters = [], 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[1]) + 1
        if characters >= PIECE:
            yield group
            group, characters = [], 0
    yield group


def in_order(function, items, workers):
    """map() over threads that keeps the order and at most 2 * workers results in memory."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_splits(folder, pieces, tokenizer, size):
    """Tokenize on all cores into folder/.tmp-{train,val}.npy; returns meta.json's counts."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    counts = dict.fromkeys(COUNTS, 0)

    def header(n):  # 128 bytes, as numpy.lib.format says
        text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({n},), }}"
        return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"

    def tokenize(group):
        rows = tokenizer.encode_batch([text for _, text, _ in group])
        for row, (split, text, ends) in enumerate(group):
            ids = np.append(rows[row], tokenizer.eot_id) if ends else rows[row]
            rows[row] = split, ids.astype(dtype), len(text.encode())
        return rows

    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(folder / f".tmp-{s}.npy", "wb")) for s in SPLITS}
        bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, disable=None))
        for f in files.values():
            f.write(header(0))
        for rows in in_order(tokenize, groups(pieces), os.cpu_count() or 1):
            for split, ids, n_bytes in rows:
                files[split].write(ids)
                counts[f"{split}_tokens"] += len(ids)
                counts[f"{split}_bytes"] += n_bytes
                bar.update(n_bytes)
            tokens = counts["train_tokens"] + counts["val_tokens"]
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens", refresh=False)
        for split, f in files.items():
            f.seek(0)
            f.write(header(counts[f"{split}_tokens"]))
            f.flush()
            os.fsync(f.fileno())
    return {**counts, "dtype": dtype.name}


# ---------------------------------------------------------------------------------------------
# files -> tokens: what train.py reads


class Joined:
    """Token arrays read as one, without a copy: len(), .dtype and [start:stop]."""

    def __init__(self, arrays):
        self.arrays, self.dtype = arrays, arrays[0].dtype
        self.ends = list(accumulate(len(array) for array in arrays))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, place):
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"only slices with a step of 1 can be read, not {place}")
        found = []
        for array, end in zip(self.arrays, self.ends, strict=True):
            first = end - len(array)
            if max(start, first) < min(stop, end):
                found.append(array[max(start - first, 0) : stop - first])
        return np.concatenate(found) if len(found) > 1 else (found or [self.arrays[0][:0]])[0]


def parts(folder):
    """The folders that make up a data set: `folder` itself or all of its shards, in order."""
    folder, digits = Path(folder), "[0-9]" * 3
    shards = {p.parent for p in folder.glob(f"shard-{digits}-of-{digits}/meta.json")}
    if not shards or (folder / "meta.json").exists():
        return [folder]
    n = int(max(shards).name[-3:])
    wanted = [folder / f"shard-{i:03}-of-{n:03}" for i in range(n)]
    if odd := shards ^ set(wanted):
        fail(f"{min(odd)} is missing or no shard of the others; make all {n} with --shard=0/{n} "
             f"to {n - 1}/{n}, the other options alike")  # fmt: skip
    return wanted


def read_meta(folder):
    """meta.json of a data folder or checkpoint; of shards: the first one's with the sums of all."""
    metas = []
    for part in parts(folder):
        try:
            meta = json.loads((part / "meta.json").read_text(encoding="utf-8"))
            meta |= {name: int(meta[name]) for name in (*COUNTS, "vocab_size", "eot_id")}
            if meta["format_version"] != FORMAT_VERSION or not isinstance(meta["tokenizer"], str):
                raise ValueError("it is of another version")
        except Exception as error:  # it may be a stranger's: anything can be in it
            fail(f"{part / 'meta.json'} cannot be read ({error!r}); delete {part} and run "
                 "prepare.py again")  # fmt: skip
        metas.append(meta)
        for name in ("tokenizer", "vocab_size", "eot_id", "dtype", "source", "settings"):
            if meta.get(name) != metas[0].get(name):
                fail(f"{part} has {name} {meta.get(name)}, the first shard {metas[0].get(name)}; "
                     f"delete {part} and make it again with the options of the others")  # fmt: skip
    return {**metas[0], **{name: sum(meta[name] for meta in metas) for name in COUNTS}}


def open_split(folder, split):
    """The tokens of data/NAME/split.npy, or of all its shards one after another; nothing is
    copied into memory."""
    arrays = []
    for part in parts(folder):
        file, expected = part / f"{split}.npy", read_meta(part)[f"{split}_tokens"]
        try:
            arrays.append(np.load(file, mmap_mode="r" if expected else None))
            if arrays[-1].shape != (expected,):
                raise ValueError(f"{arrays[-1].shape} tokens, not {expected}")
        except (OSError, ValueError, EOFError) as error:
            fail(f"{file} is damaged ({error}); delete {part} and run prepare.py again")
    return arrays[0] if len(arrays) == 1 else Joined(arrays)


# ---------------------------------------------------------------------------------------------
# main


def resolve(cfg):
    """(`cfg` with the preset's values filled in, shard, shards), everything checked."""
    if not re.fullmatch(r"\w[\w.-]*", cfg.dataset) or ".." in cfg.dataset:
        fail(f"--dataset {cfg.dataset!r} must be one plain folder name, such as mine", 2)
    preset = PRESETS.get(cfg.dataset, (None, "bpe", None, None))
    source, tokenizer, size = cfg.source or preset[0], cfg.tokenizer or preset[1], cfg.vocab_size
    if source is None:
        fail(f"--dataset {cfg.dataset} is no preset ({', '.join(PRESETS)}); "
             "give your text too: --source PATH", 2)  # fmt: skip
    if not 0 < cfg.val_fraction < 1:
        fail(f"--val_fraction {cfg.val_fraction} must lie between 0 and 1, as 0.1 does", 2)
    if tokenizer == "bpe":
        size = (preset[2] or 4096) if size is None else size
        if not 257 <= size <= 2**20:  # 256 bytes and the end-of-text token
            fail(f"--vocab_size {size} must lie between 257 and {2**20}, as 4096 does", 2)
    elif size is not None:
        fail(f"--vocab_size {size} goes with --tokenizer=bpe; {tokenizer} brings its own", 2)
    found = re.fullmatch(r"(\d{1,3})/(\d{1,3})", cfg.shard or "0/1")
    i, n = map(int, found.groups()) if found else (0, 0)
    if i >= n:
        fail(f"--shard {cfg.shard} must be i/n with i from 0 to n - 1 and n up to 999, as 0/4", 2)
    if cfg.shard and tokenizer in ("bpe", "char"):
        fail(f"--shard {cfg.shard}: all shards need one tokenizer that is there already, not "
             f"--tokenizer={tokenizer}; use gpt2 or the tokenizer.json of a sample", 2)  # fmt: skip
    if Path(tokenizer).is_dir() and tokenizer not in tiktoken.list_encoding_names():
        tokenizer = str(Path(tokenizer, "tokenizer.json"))
    return replace(cfg, source=source, tokenizer=tokenizer, vocab_size=size), i, n


def main(cfg):
    """Prepare one data set, or one shard of it; does nothing where it is there already."""
    cfg, i, n = resolve(cfg)
    folder = whole = Path(cfg.data_dir, cfg.dataset)
    if cfg.shard:
        folder = whole / f"shard-{i:03}-of-{n:03}"
        if (whole / "meta.json").exists():
            fail(f"{whole} was prepared without --shard; delete it or choose another --dataset")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = lock_folder(folder)
    try:
        build(cfg, folder, i, n)
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}; {folder} is as it was")
    except KeyboardInterrupt:
        fail(f"interrupted; {folder} is as it was", 130)
    finally:
        with contextlib.suppress(OSError):
            clean(folder)
            if os.listdir(folder) == [".lock"]:  # it failed: leave no trace
                (folder / ".lock").unlink()
                for path in new:
                    path.rmdir()
        lock.release()


def clean(folder):
    """Remove what a run left that was killed or failed."""
    for leftover in folder.glob(".tmp-*"):
        leftover.unlink()


def build(cfg, folder, i, n):
    """Make slice i of n in `folder`: every file beside the old one, then all renamed."""
    clean(folder)
    if cfg.source.startswith("hf:"):
        size = digest = None
        pieces = partial(read_hub, cfg.source, cfg.val_fraction, i, n)
    else:
        files = [path for path in source_files(cfg.source, folder) if path.stat().st_size]
        one_text, share = len(files) == 1, cfg.val_fraction
        if not files:
            fail(f"--source {cfg.source} is empty: there is nothing to tokenize")
        if cfg.shard and len(files) < max(n, 2):
            fail(f"--shard {cfg.shard} needs {n} documents, and {cfg.source} has {len(files)}")
        files = files[i::n]
        sums, size = [sha256(path) for path in files], sum(path.stat().st_size for path in files)
        digest = sums[0] if one_text else hashlib.sha256("".join(sums).encode()).hexdigest()
        if not one_text and not cfg.shard:
            share = max(share, min(map(lot, sums)))  # of a handful of documents one validates
        pieces = partial(read_files, files, sums, share, one_text)
    name = sha256(cfg.tokenizer) if cfg.tokenizer.endswith(".json") else cfg.tokenizer
    asked = {"source": cfg.source, "source_sha256": digest, "format_version": FORMAT_VERSION,
             "settings": [name, cfg.vocab_size, cfg.val_fraction]}  # fmt: skip
    if (folder / "meta.json").exists():
        there = read_meta(folder)
        if {key: there.get(key) for key in asked} == asked:
            train, val = (len(open_split(folder, split)) for split in SPLITS)
            say(f"{folder} is ready: {train:,} train and {val:,} val tokens from the same source; "
                "nothing to do")  # fmt: skip
            return
    tokenizer = make_tokenizer(cfg, lambda: (text for _, text, _ in pieces()), size)
    if tokenizer.eot_id is None:
        fail(f"--tokenizer {cfg.tokenizer} has no end-of-text token: one of {', '.join(ENDS)}")
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id, **write_splits(folder, pieces(), tokenizer, size),
            **asked}  # fmt: skip
    for split in SPLITS:
        if (tokens := meta[f"{split}_tokens"]) < 2 and not cfg.shard:
            fail(f"the {split} split has {tokens} token(s), too few to predict one; give more "
                 f"text or another --val_fraction (now {cfg.val_fraction})")  # fmt: skip
    if tokenizer.name == "tokenizer.json":
        text = tokenizer.engine.to_str(pretty=True)
        (folder / ".tmp-tokenizer.json").write_text(text, encoding="utf-8")
    (folder / ".tmp-meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    (folder / "meta.json").unlink(missing_ok=True)  # without it nothing counts as prepared
    (folder / "tokenizer.json").unlink(missing_ok=True)
    for made in ("train.npy", "val.npy", "tokenizer.json", "meta.json"):  # meta.json last
        if (folder / f".tmp-{made}").exists():
            (folder / f".tmp-{made}").replace(folder / made)
    say(f"{folder}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, "
        f"vocabulary {meta['vocab_size']:,}, from {cfg.source}")  # fmt: skip


if __name__ == "__main__":
    main(CFG)
