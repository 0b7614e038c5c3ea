"""Stage 1: text -> data/NAME/{train,val}.npy, meta.json and, where made here, tokenizer.json.

    python prepare.py                                    # Python's standard library: no network
    python prepare.py --dataset=verdict                  # a preset; see PRESETS below
    python prepare.py --dataset=mine --source=book.txt   # own text: file, folder, glob, URL, hf:...

One file is one text: its first 90 % of characters train, the rest validates. Several files, or
the rows of a hub data set, are documents: each goes whole to one split and ends with the
end-of-text token.
"""

import hashlib
import io
import json
import os
import re
import sysconfig
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from configurator import at_least, fail, load

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

from runtime import lock_folder, say

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 18  # characters tokenized at a time
SAMPLE = 1 << 26  # characters that train a BPE: more change little and cost memory
FORMAT_VERSION = 1


# ---------------------------------------------------------------------------------------------
# sources: what the user named -> local files -> pieces of text


def fetch(url, path, sha256=None):
    """Download `url` to `path` unless it is there: retries, progress, whole or not at all."""
    path = Path(path)
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
        except requests.RequestException as error:
            beside.unlink(missing_ok=True)
            fail(
                f"cannot download {url} ({type(error).__name__}); put the file at {path} by hand, "
                "or use text that needs no network: python prepare.py --dataset=stdlib"
            )
        beside.replace(path)
        say(f"downloaded {url} -> {path} ({path.stat().st_size:,} bytes)")
    if sha256:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != sha256:
            fail(f"{path} has SHA-256 {found}, not {sha256}; delete it to download it again")


def source_files(source, raw_dir, sha256=None):
    """A preset's name, a file, folder, glob or URL -> the local text files (list of Path)."""
    if source in PRESETS and not Path(source).exists():
        source, _, _, sha256 = PRESETS[source]
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        return sorted(files, key=lambda p: p.relative_to(root).as_posix())
    if source.startswith(("https://", "http://")):
        name = re.sub(r"[^\w.-]", "_", source.rstrip("/").rsplit("/", 1)[-1])  # stays in raw_dir
        path = Path(raw_dir) / f"raw-{hashlib.sha256(source.encode()).hexdigest()[:8]}-{name}"
        fetch(source, path, sha256)
        return [path]
    if Path(source).is_dir():
        files = [p for p in Path(source).rglob("*") if p.suffix in (".txt", ".md") and p.is_file()]
        if not files:
            fail(f"--source {source}: no .txt or .md file below it; a glob takes others: "
                 f"--source '{source}/**/*.py'")  # fmt: skip
    else:
        files = [Path(p) for p in glob(source, recursive=True) if Path(p).is_file()]
        files = [Path(source)] if Path(source).is_file() else files
        if not files:
            fail(f"--source {source}: no such file, folder, glob or preset "
                 f"(presets: {', '.join(PRESETS)})")  # fmt: skip
    return sorted(files)


def read_pieces(path, start=0, stop=None):
    """Yield characters start..stop of a UTF-8 file in pieces of about PIECE characters.

    A byte-order mark and CRLF are kept. A piece ends where no pre-tokenizer used here joins its
    neighbours, after a lone newline or before a lone space, so the pieces' tokens are those of the
    whole text.
    """
    with open(path, encoding="utf-8", newline="") as f:
        try:
            for skipped in range(0, start, PIECE):
                f.read(min(PIECE, start - skipped))
            left, rest = float("inf") if stop is None else stop - start, ""
            while block := f.read(int(min(PIECE, left))):
                left -= len(block)
                rest += block
                if len(rest) >= PIECE:
                    newlines = [m.end() for m in re.finditer(r"(?<=\S)\n(?=\S)", rest)]
                    spaces = newlines or [m.start() for m in re.finditer(r"(?<=\S) (?=\S)", rest)]
                    cut = spaces[-1] if spaces else len(rest)
                    yield rest[:cut]
                    rest = rest[cut:]
            if rest:
                yield rest
        except UnicodeDecodeError as error:
            at = f.buffer.tell() - len(error.object) + error.start
            fail(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {at}; "
                 f"convert it: iconv -f ENCODING -t utf-8 {path}")  # fmt: skip


def read_files(files, val_fraction):
    """Yield (split, text, ends a document) over local files; see the module docstring."""
    if len(files) == 1:
        total = sum(len(piece) for piece in read_pieces(files[0]))
        cut = int(total * (1 - val_fraction))
        for split, start, stop in (("train", 0, cut), ("val", cut, total)):
            for piece in read_pieces(files[0], start, stop):
                yield split, piece, False
        return
    lots = [(document_hash(read_pieces(f)), f) for f in files]
    lowest = min(lots)[0]  # so that a handful of documents has a validation split too
    for lot, file in lots:
        split = "val" if lot < val_fraction or lot == lowest else "train"
        for piece in read_pieces(file):
            yield split, piece, False
        yield split, "", True


def document_hash(pieces):
    """A number in [0, 1) that depends on the text alone: the same document, the same split."""
    digest = hashlib.sha256()
    for text in pieces:
        digest.update(text.encode())
    return int.from_bytes(digest.digest()[:6], "big") / 2**48


def read_hub(source, val_fraction):
    """Yield (split, text, True) over the rows of hf:REPO[:CONFIG[:COLUMN]], streamed."""
    import datasets

    repo, config, column = (source.removeprefix("hf:").split(":") + ["", ""])[:3]
    try:
        rows = datasets.load_dataset(repo, config or None, split="train", streaming=True)
        for row in rows:
            text = row.get(column or "text")
            if not isinstance(text, str):
                fail(f"{source}: no text column {column or 'text'!r}; the columns are "
                     f"{', '.join(row)}: --source hf:{repo}:{config}:COLUMN", 2)  # fmt: skip
            split = "val" if document_hash([text]) < val_fraction else "train"
            yield split, text, True
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        fail(f"cannot read {source}: {str(error).splitlines()[0]}; the hub needs a network, "
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
            self.vocab_size = engine.get_vocab_size()
            names = (END_OF_TEXT, "</s>", "<eos>", "[SEP]")
            ids = [engine.token_to_id(name) for name in names]
            self.eot_id = next((i for i in ids if i is not None), None)

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
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
        name = Path(meta["tokenizer"]).name  # a name: what a stranger's file says stays in folder
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder}/meta.json cannot be read ({error}); prepare.py writes it")
    if name.endswith(".json"):
        return Tokenizer(name, open_tokenizer_file(Path(folder) / name))
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
        fail(f"--tokenizer {name}: neither a tokenizer.json nor one of {names}", 2)
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except (requests.RequestException, OSError) as error:
        fail(f"cannot download the vocabulary of {name} ({type(error).__name__}); point "
             "TIKTOKEN_CACHE_DIR to a copy, or train one here: --tokenizer=bpe")  # fmt: skip


def make_tokenizer(cfg, pieces, size):
    """The Tokenizer that `cfg` asks for. `pieces()` iterates over the text; `size`: its bytes, or
    None where they are not known. 'bpe' and 'char' are made from the text, the rest is loaded."""
    if cfg.tokenizer == "char":
        seen = set()
        for text in pieces():
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
        trainer = trainers.BpeTrainer(
            vocab_size=cfg.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        say(f"training a BPE of {cfg.vocab_size:,} tokens ...")
        engine.train_from_iterator(sample(pieces(), size), trainer)
        if engine.get_vocab_size() < cfg.vocab_size:
            fail(f"--vocab_size {cfg.vocab_size}: this text gives only {engine.get_vocab_size()} "
                 f"tokens; use --vocab_size {engine.get_vocab_size()} or more text")  # fmt: skip
    elif Path(cfg.tokenizer).exists():
        engine = open_tokenizer_file(cfg.tokenizer)
    else:
        return open_tiktoken(cfg.tokenizer)
    return Tokenizer("tokenizer.json", engine)


def sample(pieces, size):
    """About SAMPLE characters: every k-th piece where `size` is known, else the first ones."""
    every, taken = (size or 0) // SAMPLE + 1, 0
    for i, text in enumerate(pieces):
        if i % every == 0:
            yield text
            taken += len(text)
        if taken > SAMPLE:
            return


# ---------------------------------------------------------------------------------------------
# tokens -> files


def groups(pieces, size):
    """Gather (split, text, ends) into lists of at least `size` characters."""
    group, characters = [], 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[1])
        if characters >= size or len(group) >= size:
            yield group
            group, characters = [], 0
    if group:
        yield group


def tokenize(group, tokenizer):
    """One group -> {split: (token array, bytes of text)}, documents closed by end-of-text."""
    rows = tokenizer.encode_batch([text for _, text, _ in group])
    result = {}
    for split in ("train", "val"):
        parts, size = [], 0
        for (s, text, ends), ids in zip(group, rows, strict=True):
            if s == split:
                parts += [ids, [tokenizer.eot_id]] if ends else [ids]
                size += len(text.encode())
        result[split] = (np.concatenate(parts) if parts else np.empty(0, np.uint32), size)
    return result


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
    cores = os.cpu_count() or 1
    # tiktoken leaves the GIL and takes a thread a group; tokenizers is parallel inside a group
    workers, group_size = (cores, PIECE) if tokenizer.tiktoken else (1, PIECE * cores)
    count = {f"{s}_{what}": 0 for what in ("tokens", "bytes") for s in ("train", "val")}

    def header(n):  # numpy pads it for growth: as long for 0 tokens as for 10**20
        buffer, shape = io.BytesIO(), {"fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, **shape})
        return buffer.getvalue()

    files = {split: open(folder / f".tmp-{split}.npy", "wb") for split in ("train", "val")}
    try:
        for f in files.values():
            f.write(header(0))
        work = in_order(lambda g: tokenize(g, tokenizer), groups(pieces, group_size), workers)
        with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
            for result in work:
                for split, (ids, n_bytes) in result.items():
                    files[split].write(ids.astype(dtype).tobytes())
                    count[f"{split}_tokens"] += len(ids)
                    count[f"{split}_bytes"] += n_bytes
                    bar.update(n_bytes)
                tokens = count["train_tokens"] + count["val_tokens"]
                bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens")
        for split, f in files.items():
            f.seek(0)
            f.write(header(count[f"{split}_tokens"]))
            f.flush()
            os.fsync(f.fileno())
    finally:
        for f in files.values():
            f.close()
    return {**count, "dtype": dtype.name}


def resolve(cfg):
    """`cfg` with the preset's source, tokenizer and vocabulary filled in, and checked."""
    preset = PRESETS.get(cfg.dataset, (None, "bpe", None, None))
    source = cfg.source or preset[0]
    if not re.fullmatch(r"\w[\w.-]*", cfg.dataset) or ".." in cfg.dataset:
        fail(f"--dataset {cfg.dataset!r} must be one plain folder name, such as mine", 2)
    if source is None:
        fail(f"--dataset {cfg.dataset} is no preset ({', '.join(PRESETS)}); "
             "give your text too: --source PATH", 2)  # fmt: skip
    if not 0 < cfg.val_fraction < 1:
        fail(f"--val_fraction {cfg.val_fraction} must lie between 0 and 1, as 0.1 does", 2)
    cfg = Config(cfg.dataset, source, cfg.tokenizer or preset[1], cfg.vocab_size or preset[2],
                 cfg.val_fraction, cfg.data_dir)  # fmt: skip
    if cfg.tokenizer == "bpe":
        cfg.vocab_size = 4096 if cfg.vocab_size is None else cfg.vocab_size
        at_least(cfg, 257, "vocab_size")  # 256 bytes and the end-of-text token
    return cfg


def main(cfg):
    """Prepare one data set; says so and does nothing where it is there already."""
    cfg = resolve(cfg)
    folder = Path(cfg.data_dir) / cfg.dataset
    lock = lock_folder(folder)  # noqa: F841  held until this function ends
    for leftover in folder.glob(".tmp-*"):  # of a run that was killed
        leftover.unlink()
    digest, size, hub = hashlib.sha256(), None, cfg.source.startswith("hf:")
    if not hub:
        preset = PRESETS.get(cfg.dataset)
        files = source_files(cfg.source, folder, preset and cfg.source == preset[0] and preset[3])
        for path in files:
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        size = sum(path.stat().st_size for path in files)
        if size == 0:
            fail(f"--source {cfg.source} is empty: there is nothing to tokenize")
    asked = {"format_version": FORMAT_VERSION, "source": cfg.source,
             "source_sha256": None if hub else digest.hexdigest(), "settings":
             [cfg.tokenizer, cfg.vocab_size, cfg.val_fraction]}  # fmt: skip
    meta_file = folder / "meta.json"
    if meta_file.exists():
        there = json.loads(meta_file.read_text(encoding="utf-8"))
        if {key: there.get(key) for key in asked} == asked:
            say(f"{folder} is ready: {there['train_tokens']:,} train and {there['val_tokens']:,} "
                "val tokens from the same source; nothing to do")  # fmt: skip
            return

    def pieces():
        read, what = (read_hub, cfg.source) if hub else (read_files, files)
        return read(what, cfg.val_fraction)

    tokenizer = make_tokenizer(cfg, lambda: (text for _, text, _ in pieces()), size)
    if tokenizer.eot_id is None:
        fail(f"--tokenizer {cfg.tokenizer} has no end-of-text token ({END_OF_TEXT}, </s>, <eos>)")
    try:
        counts = write_splits(folder, pieces(), tokenizer, size)
        for split in ("train", "val"):
            if counts[f"{split}_tokens"] < 2:
                fail(f"the {split} split has {counts[f'{split}_tokens']} token(s), too few to "
                     f"predict one; give more text or another --val_fraction "
                     f"(now {cfg.val_fraction})")  # fmt: skip
        if tokenizer.name.endswith(".json"):
            tokenizer.engine.save(str(folder / ".tmp-tokenizer.json"))
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
                "eot_id": tokenizer.eot_id, **counts, **asked}  # fmt: skip
        text = json.dumps(meta, indent=2) + "\n"
        (folder / ".tmp-meta.json").write_text(text, encoding="utf-8")
        meta_file.unlink(missing_ok=True)  # without it the folder counts as not prepared
        for name in ("train.npy", "val.npy", "tokenizer.json", "meta.json"):  # meta.json last
            if (folder / f".tmp-{name}").exists():
                (folder / f".tmp-{name}").replace(folder / name)
    except OSError as error:
        fail(f"cannot write into {folder}: {error.strerror or error}; the data there is as it was")
    finally:
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink()
    say(f"{folder}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, "
        f"vocabulary {meta['vocab_size']:,}, from {cfg.source}")  # fmt: skip


if __name__ == "__main__":
    main(CFG)
