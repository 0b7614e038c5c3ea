"""Stage 1: text to token files: data/NAME/{train,val}.npy, meta.json, tokenizer.json.

python prepare.py                                    # Python's standard library: no network
python prepare.py --dataset=verdict                  # a preset; see PRESETS below
python prepare.py --dataset=mine --source=book.txt   # your own text, into data/mine
python prepare.py --dataset=mine --source a.txt docs 'notes/*.org'

Of one text the first 90 % of the characters train and the rest validates. Several files, or the
rows of a hub data set, are documents; each ends with the end-of-text token. `--shard=i/n` prepares
one slice of the documents; train.py reads data/NAME/shard-* as one data set, without a copy.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sysconfig
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path

from configurator import load

GITHUB = "https://raw.githubusercontent.com"
LESSONS = f"{GITHUB}/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code"
PACKT = f"{GITHUB}/PacktPublishing/Transformers-for-Natural-Language-Processing/master"
# name: (source, tokenizer, vocab_size, SHA-256 of the download where it never changes)
PRESETS = {
    "stdlib": ("stdlib", "bpe", 4096, None),
    "verdict": (f"{LESSONS}/the-verdict.txt", "gpt2", None,
                "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"),
    "shakespeare": (f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", "gpt2",
                    None, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "kant": (f"{PACKT}/Chapter03/kant.txt", "bpe", 4096, None),
    "azwiki": ("hf:wikimedia/wikipedia:20231101.az:text", "bpe", 16384, None),
    "fineweb": ("hf:HuggingFaceFW/fineweb-edu:sample-10BT:text", "gpt2", None, None),
}


@dataclass
class Config:
    """Turn text into token files."""

    dataset: str | None = None  # folder under data_dir, a preset's or a new name; None: stdlib
    source: tuple[str, ...] = ()  # files, folders, globs, URLs, or one hf:REPO[:CONFIG[:COLUMN]]
    tokenizer: str | None = None  # bpe, char, a tiktoken encoding (gpt2), a tokenizer.json, folder
    vocab_size: int | None = None  # of a bpe trained here; None: fits the size of the text
    val_fraction: float = 0.1  # share of the text that validates
    shard: str | None = None  # i/n: only slice i of n of the documents, i from 0 to n - 1
    data_dir: str = "data"  # where the folder is made


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import huggingface_hub
import numpy as np
import requests
import tiktoken
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from tqdm import tqdm

import runtime
from runtime import UserError, lock_folder, one_line, print0, remove, run_script, sha256

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")  # by preference
PIECE = 1 << 16  # characters tokenized at a time; a thread takes 32 pieces
SAMPLE = 1 << 26  # characters that train a BPE: more change little and cost memory
FORMAT_VERSION = 1
SPLITS = ("train", "val")
COUNTS = ("train_tokens", "val_tokens", "train_bytes", "val_bytes")
# GPT-2's words, but of 128 characters at most: merging costs the square of a word's length, and DNA
# or base64 is one word. tokenizers and tiktoken read this pattern alike.
WORDS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,128}| ?\p{N}{1,128}| ?[^\s\p{L}\p{N}]{1,128}"
         r"|\s{1,128}(?!\S)|\s{1,128}")
# They end at every combining mark, of which Bengali, Hindi or Arabic with its vowels have one in
# most syllables. Qwen3.5's, which llama.cpp knows, keep them; again of 128 characters at most.
MARKED_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]{1,128}|\p{N}"
                r"| ?[^\s\p{L}\p{M}\p{N}]{1,128}[\r\n]{0,128}|\s{0,128}[\r\n]{1,128}"
                r"|\s{1,128}(?!\S)|\s{1,128}")

# --- sources: what the user named -> local files -> (split, text, ends a document) -----------


def hide_secrets(source):
    """`source`; a URL without user, password and query, so that it may be shown and stored."""
    if not re.match(r"(?!hf:)\w{2,}:/", source):
        return source
    host = r"(?:[\w.-]+|\[[\da-f:.]+\])(?::\d+)?"
    url = re.fullmatch(rf"(https?://)(?:[^/?#\s]*@)?({host}(?:/[^?#\s]*)?)(?:[?#]\S*)?", source,
                       re.I)
    if not url:  # not quoted: it may hold a password
        raise UserError("--source: a URL must read https://host/path, without blanks", 2)
    return url[1] + url[2]


def require_network(remedy):
    """Raise UserError at once where the hub cannot be reached: its clients retry for half a minute.
    With HF_HUB_OFFLINE nothing is tested: they look into their cache only."""
    if huggingface_hub.is_offline_mode():
        return
    hub = huggingface_hub.constants.ENDPOINT
    try:
        with contextlib.suppress(requests.ReadTimeout):  # slow, but there
            requests.head(hub, timeout=2)
    except OSError:
        raise UserError(f"cannot reach {hub}; {remedy}") from None


def fetch(url, raw_dir):
    """Download `url` into raw_dir unless it is there: whole or not at all. Returns the path."""
    shown = hide_secrets(url)
    name = re.sub(r"[^\w.-]", "_", shown.rstrip("/").rsplit("/", 1)[-1])[-80:]  # no path
    # Two queries are two files; 32 bits of a hash do not give away a token in one.
    plain = re.sub(r"//[^/?#]*@", "//", url).encode(errors="replace")
    digest = hashlib.sha256(plain).hexdigest()[:8]
    path = Path(raw_dir, f"raw-{digest}-{name}")
    if not path.exists() or not path.stat().st_size:  # an empty one is no download
        print0(f"downloading {shown} to {path}")
        aside = path.with_name(f".tmp-{path.name}")
        with one_line(f"cannot write into {path.parent}", kinds=OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with requests.get(url, stream=True, timeout=(10, 60)) as answer, open(aside, "wb") as f:
                answer.raise_for_status()
                f.writelines(answer.iter_content(1 << 16))
        except (requests.RequestException, ValueError) as error:
            why = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
            raise UserError(f"cannot download {shown} ({why}); put it at {path} by hand, or use "
                            "the preset stdlib, which needs no network") from None
        aside.replace(path)
    wanted = {source: checksum for source, _, _, checksum in PRESETS.values()}.get(url)
    if wanted and sha256(path) != wanted:
        raise UserError(f"{path} does not have SHA-256 {wanted}; delete it and run again")
    return path


def preset_source(source):
    """The source of the preset of that name, or `source` itself."""
    return PRESETS[source][0] if source in PRESETS and not Path(source).exists() else source


def source_files(sources, raw_dir):
    """Presets' names, files, folders, globs and URLs (a str or several) -> the local text files, a
    list of Paths in one order everywhere. Prints what a folder leaves out; downloads to raw_dir."""
    sources = (sources,) if isinstance(sources, str) else sources
    if "" in sources:  # an unset shell variable, which would be the current folder
        raise UserError("--source is empty; name a file, folder, glob or URL", 2)
    files = []
    for source in map(preset_source, sources):
        if source == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            skip = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
            found = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        elif re.match("https?://", hide_secrets(source), re.I):
            found = [fetch(source, raw_dir)]
        elif Path(source).is_dir():
            there = {p for p in Path(source).rglob("*") if p.is_file()}
            found = {p for p in there if p.suffix.lower() in (".txt", ".md")}
            kinds = Counter(p.suffix or p.name for p in there - found).most_common(5)
            left_out = ", ".join(f"{n:,} {kind}" for kind, n in kinds) or "nothing"
            print0(f"{source}: {len(found):,} .txt and .md files; left out {left_out}")
        else:
            names = [source] if Path(source).is_file() else glob(source, recursive=True)
            found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            raise UserError(f"--source {source}: no such file, no folder with .txt or .md files, "
                            f"no glob as '{source}/**/*.py', no preset ({', '.join(PRESETS)})")
        files += sorted(found, key=lambda p: p.as_posix())
    return list(dict.fromkeys(files))


def split_of(checksum, val_fraction):
    """'train' or 'val' by a document's SHA-256, so that the same text lands in the same split."""
    return "val" if int(checksum[:12], 16) / 2**48 <= val_fraction else "train"


def choose_splits(files, splits, val_fraction):
    """`splits`, what the hashes say of each file, or 'both' (its last characters validate) for all
    where documents are few or uneven: a hash could hold out a whole language or none."""
    if len(files) == 1:
        return ["both"]
    val = [path for path, split in zip(files, splits, strict=True) if split == "val"]
    share = sum(p.stat().st_size for p in val) / sum(p.stat().st_size for p in files)
    if len(files) >= 20 and val_fraction / 2 <= share <= min(2 * val_fraction, 0.99):
        print0(f"{len(val):,} of {len(files):,} documents validate, {share:.1%} of the bytes: "
               f"{', '.join(path.name for path in val[:3])}, ...")
        return splits
    print0(f"the last {val_fraction:.0%} of the characters of each of the {len(files):,} "
           "documents validate: they are too few or uneven to hold out whole ones")
    return ["both"] * len(files)


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
        raise UserError(f"{f.name} is not UTF-8 ({error.reason}); unpack it if it is compressed, "
                        f"or convert it: iconv -f ENCODING -t utf-8 {f.name}") from None
    if rest:
        yield rest


def read_files(files, splits, val_fraction, one_text):
    """Yield (split, text, ends a document) over files; splits: what becomes of each."""
    for file, split in zip(files, splits, strict=True):
        with open(file, encoding="utf-8", newline="") as f:  # keeps byte-order mark and CRLF
            parts = [(split, math.inf)]
            if split == "both":
                total = sum(map(len, read_pieces(f)))
                f.seek(0)
                parts = [("train", int(total * (1 - val_fraction))), ("val", math.inf)]
            for part, length in parts:
                for piece in read_pieces(f, length):
                    yield part, piece, False
                yield part, "", not one_text


def read_hub(source, val_fraction, i, n):
    """Yield (split, text, True) over slice i of n of hf:REPO[:CONFIG[:COLUMN]], streamed."""
    repo, config, column = (source.removeprefix("hf:").split(":") + ["", ""])[:3]
    column = column or "text"
    if not Path(repo).exists():
        require_network(remedy=f"{source} needs a network, --dataset=stdlib does not")
    import datasets  # it takes seconds
    from datasets.distributed import split_dataset_by_node

    # of datasets, fsspec, httpx or pyarrow: their exceptions have no common class
    with one_line(f"cannot read {source}", "--dataset=stdlib needs no network"):
        rows = datasets.load_dataset(repo, config or None, split="train", streaming=True)
        for row in split_dataset_by_node(rows, i, n):
            text = row.get(column, 0)
            if not isinstance(text, str | None):
                raise UserError(f"{source}: no text column {column!r} among {', '.join(row)}: "
                                f"--source hf:{repo}:{config}:COLUMN", 2)
            text = text or ""
            checksum = hashlib.sha256(text.encode()).hexdigest()
            yield split_of(checksum, val_fraction), text, True


# --- tokenizers ------------------------------------------------------------------------------


class Tokenizer:
    """tiktoken and Hugging Face tokenizers behind one interface. Special tokens in text are text.

    name: what meta.json says; vocab_size; eot_id: the end-of-text token's id, or None.
    """

    def __init__(self, name, engine, eot_id=None, made_here=False):
        self.name, self.engine, self.made_here = name, engine, made_here
        self.tiktoken = isinstance(engine, tiktoken.Encoding)
        self.fast = engine if self.tiktoken else None  # a tiktoken.Encoding with the same ids
        if self.tiktoken:
            self.vocab_size, self.eot_id = engine.n_vocab, engine.eot_token
            return
        engine.encode_special_tokens = True
        engine.no_truncation()  # what the file asks for is meant for other uses
        engine.no_padding()
        vocabulary = engine.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        known = (vocabulary[end] for end in ENDS if end in vocabulary)
        self.eot_id = next(known, None) if eot_id is None else eot_id

    def encode_batch(self, texts):
        """list of str -> list of integer arrays."""
        if self.fast:
            return [self.fast.encode_to_numpy(text, disallowed_special=()) for text in texts]
        rows = self.engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(row.ids, dtype=np.uint32) for row in rows]

    def encode(self, text):
        """str -> list of token ids."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids):
        """Token ids -> str; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        if not self.tiktoken:
            return self.engine.decode([int(i) for i in ids], skip_special_tokens=False)
        known = []
        for i in ids:
            with contextlib.suppress(KeyError):  # a head padded past the vocabulary, or a gap
                known.append(self.engine.decode_single_token_bytes(int(i)))
        return b"".join(known).decode("utf-8", "replace")

    def count_lost(self, text, ids):
        """About how many characters of `text` do not come back from its token ids."""
        # tiktoken's encodings and what is made here hold every byte or character of the text
        again = text if self.tiktoken or self.made_here else self.decode(ids)
        if again in (text, " " + text):  # a blank in front of every text is no loss
            return 0
        wrong = sum(a != b for a, b in zip(again, text, strict=False))
        return min(len(text), wrong if len(again) == len(text) else abs(len(again) - len(text)))


def tokenizer_files(folder, tokenizer):
    """{file name: text} of a data folder's or checkpoint's meta.json and tokenizer.json, if any. A
    run reads them once, and writes them into its checkpoints: the folder may be made anew."""
    files = {"meta.json": json.dumps(read_meta(folder), indent=2) + "\n"}
    if not tokenizer.tiktoken:
        files[tokenizer.name] = (shard_folders(folder)[0] / tokenizer.name).read_bytes().decode()
    return files


def load_tokenizer(folder):
    """The Tokenizer of a data folder or checkpoint (it holds meta.json)."""
    meta = read_meta(folder)
    if not meta["tokenizer"].endswith(".json"):
        return open_tiktoken(meta["tokenizer"])
    path = shard_folders(folder)[0] / "tokenizer.json"  # a stranger's name may lead elsewhere
    tokenizer = open_tokenizer_file(path, meta["eot_id"])
    same = meta["tokenizer_sha256"] in (None, sha256(path))
    if tokenizer.vocab_size != meta["vocab_size"] or not same:
        raise UserError(f"{path} is not the tokenizer that meta.json names; prepare the data again")
    return tokenizer


def open_tokenizer_file(path, eot_id=None):
    """The Tokenizer of a tokenizer.json; eot_id None: of the end-of-text token that the
    tokenizer_config.json beside it names, or else of the first of ENDS."""
    path = Path(path)
    with one_line(f"tokenizer file {path} cannot be read"):  # tokenizers raises plain Exceptions
        engine = HFTokenizer.from_file(str(path))
    if eot_id is None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not there, not said
            said = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8"))
            token = said["eos_token"]
            eot_id = engine.token_to_id(token["content"] if isinstance(token, dict) else token)
    return Tokenizer("tokenizer.json", engine, eot_id)


def open_tiktoken(name):
    """The Tokenizer of tiktoken's encoding `name`. UserError if there is none or no network."""
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UserError(f"tokenizer {name} is no tokenizer.json and none of bpe, char, "
                        + ", ".join(names), 2)
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot download the vocabulary of {name} ({type(error).__name__}); point "
                        "TIKTOKEN_CACHE_DIR to a copy, or use --tokenizer=bpe") from None


def default_vocab_size(n_bytes):
    """Vocabulary of a BPE: 2 sqrt(bytes) as a power of two, 1024 to 4096, so that tokens repeat."""
    return min(4096, max(1024, 2 ** round(math.log2(2 * math.sqrt(n_bytes)))))


def make_tokenizer(name, pieces, n_bytes=None, vocab_size=None):
    """The Tokenizer `name` of Config: 'bpe' and 'char' are made from the text, others loaded.
    pieces: returns an iterator over (split, text, ends a document). n_bytes: the text's size."""
    if name.endswith(".json"):
        return open_tokenizer_file(name)
    if name not in ("bpe", "char"):
        return open_tiktoken(name)
    if name == "char":
        characters = sorted(set(itertools.chain.from_iterable(text for _, text, _ in pieces())))
        vocabulary = {c: i for i, c in enumerate([*characters, END_OF_TEXT])}
        engine = HFTokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        engine.decoder = decoders.Fuse()
        engine.add_special_tokens([END_OF_TEXT])
        return Tokenizer("tokenizer.json", engine, made_here=True)
    # Every k-th piece, so that about SAMPLE characters are counted; of a stream the first ones.
    stop = None if n_bytes else SAMPLE // PIECE * 16

    def sample():
        # Of train: a token for a word that only validates would make its bits per byte too low.
        texts = (text for split, text, _ in pieces() if split == "train" and text)
        return itertools.islice(texts, 0, stop, (n_bytes or 0) // SAMPLE + 1)

    seen = "".join(text[:1_000] for text in itertools.islice(sample(), 1_000))
    marks = sum(unicodedata.category(c)[0] == "M" for c in seen)
    pattern = MARKED_WORDS if marks > len(seen) / 100 else WORDS
    engine = HFTokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT],
                                  initial_alphabet=byte_level.alphabet(), show_progress=False)
    print0(f"training a BPE of {vocab_size:,} tokens ...")
    engine.train_from_iterator(sample(), trainer)
    tokenizer = Tokenizer("tokenizer.json", engine, made_here=True)
    tokenizer.fast = as_tiktoken(engine, pattern)
    return tokenizer


def as_tiktoken(engine, pattern):
    """A tiktoken.Encoding with the merges of a byte-level BPE: the same ids, six times as fast."""
    as_they_are = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes as letters
    others = [b for b in range(256) if b not in as_they_are]
    byte_of = {chr(b): b for b in as_they_are} | {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary = engine.get_vocab()
    special = {END_OF_TEXT: vocabulary.pop(END_OF_TEXT)}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocabulary.items()}
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# --- tokens -> files -------------------------------------------------------------------------


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


def write_splits(folder, pieces, tokenizer, n_bytes):
    """Tokenize on all cores into folder/.tmp-{train,val}.npy.

    Returns (meta.json's counts and dtype, the share of the text that the tokenizer lost).
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    counts = dict.fromkeys(COUNTS, 0)
    lost = characters = 0

    def write_header(f, n):  # the header has the same length for every n
        f.seek(0)
        fields = {"descr": dtype.str, "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(f, fields)

    def tokenize(group):
        rows = []
        texts = [text for _, text, _ in group]
        for (split, text, ends), ids in zip(group, tokenizer.encode_batch(texts), strict=True):
            missing = tokenizer.count_lost(text, ids)
            ids = np.append(ids, tokenizer.eot_id) if ends else ids
            rows.append((split, text, ids.astype(dtype), missing))
        return rows

    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(folder / f".tmp-{s}.npy", "wb")) for s in SPLITS}
        bar = stack.enter_context(tqdm(total=n_bytes, unit="B", unit_scale=True, disable=None))
        for f in files.values():
            write_header(f, 0)
        groups = iter(lambda: list(itertools.islice(pieces, 32)), [])
        results = in_order(tokenize, groups, os.cpu_count() or 1)
        for split, text, ids, missing in itertools.chain.from_iterable(results):
            files[split].write(ids)
            size = len(text.encode())
            counts[f"{split}_tokens"] += len(ids)
            counts[f"{split}_bytes"] += size
            lost += missing
            characters += len(text)
            bar.update(size)
        for split, f in files.items():
            write_header(f, counts[f"{split}_tokens"])
            f.flush()
            os.fsync(f.fileno())
    return {**counts, "dtype": dtype.name}, lost / max(1, characters)


# --- files -> tokens: what train.py reads ----------------------------------------------------


class ConcatTokens:
    """Token arrays read as one, without a copy of the whole: len(), .dtype and [start:stop]."""

    def __init__(self, arrays):
        self.arrays, self.dtype = arrays, arrays[0].dtype
        self.starts = [0, *itertools.accumulate(map(len, arrays))]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, window):
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"only slices with a step of 1 can be read, not {window}")
        return np.concatenate([array[max(start - first, 0) : max(stop - first, 0)]
                               for array, first in zip(self.arrays, self.starts, strict=False)])


def shard_folders(folder):
    """The folders that make up a data set: `folder` itself or all of its shards, in order."""
    folder, digits = Path(folder), "[0-9]" * 3
    shards = {p.parent for p in folder.glob(f"shard-{digits}-of-{digits}/meta.json")}
    if not shards or (folder / "meta.json").exists():
        return [folder]
    n = int(max(shards).name[-3:])
    wanted = [folder / f"shard-{i:03}-of-{n:03}" for i in range(n)]
    odd = shards ^ set(wanted)
    if odd:
        raise UserError(f"{min(odd)} is missing, or belongs to other shards; make all {n} with "
                        f"--shard=0/{n} to {n - 1}/{n}, the other options alike")
    return wanted


def is_prepared(folder):
    """Whether `folder` holds a data set, whole or in shards."""
    return (shard_folders(folder)[0] / "meta.json").exists()


def read_meta(folder):
    """meta.json of a data folder or checkpoint; of shards: the first one's with the sums of all."""
    metas = []
    for part in shard_folders(folder):
        with one_line(f"{part / 'meta.json'} cannot be read", f"if {part} is a data folder, delete "
                      "it and run prepare.py again"):  # a stranger's: anything can be in it
            meta = json.loads((part / "meta.json").read_text(encoding="utf-8"))
            meta |= {name: int(meta[name]) for name in (*COUNTS, "vocab_size", "eot_id")}
            in_range = 0 <= meta["eot_id"] < meta["vocab_size"] <= 2**31
            if (meta["format_version"] != FORMAT_VERSION or not isinstance(meta["tokenizer"], str)
                    or not in_range or min(meta[name] for name in COUNTS) < 0):
                raise ValueError("another version, or damaged")
        metas.append({"lossless": True, "tokenizer_sha256": None, **meta})  # older ones do not say
        for name in ("tokenizer", "vocab_size", "eot_id", "dtype", "source", "settings"):
            if meta.get(name) != metas[0].get(name):
                raise UserError(f"{part} has {name} {meta.get(name)}, the first shard "
                                f"{metas[0].get(name)}; make it again with the others' options")
    sums = {name: sum(meta[name] for meta in metas) for name in COUNTS}
    if len(metas) > 1:
        digests = " ".join(str(meta.get("source_sha256")) for meta in metas)
        sums["source_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
    return {**metas[0], **sums, "lossless": all(meta["lossless"] for meta in metas)}


def open_split(folder, split):
    """The tokens of split.npy, or of all shards one after another, not copied into memory."""
    arrays = []
    for part in shard_folders(folder):
        expected = read_meta(part)[f"{split}_tokens"]
        file = part / f"{split}.npy"
        with one_line(f"{file} is damaged", f"delete {part} and run prepare.py again"):
            array = np.load(file, mmap_mode="r" if expected else None)  # no memory map is empty
            if array.dtype not in (np.uint16, np.uint32) or array.shape != (expected,):
                raise ValueError(f"{array.dtype} {array.shape} is not {expected} token ids")
        arrays.append(array)
    return arrays[0] if len(arrays) == 1 else ConcatTokens(arrays)


# --- main ------------------------------------------------------------------------------------


def resolve(cfg):
    """(`cfg` with the preset's values filled in, shard, shards), everything checked."""
    sources = (cfg.source,) if isinstance(cfg.source, str) else tuple(cfg.source or ())
    if "source" in runtime.given_names(cfg):
        sources = sources or ("",)  # an unset shell variable: source_files refuses it
    if cfg.dataset is None and sources:
        raise UserError("--source needs a name for the data: --dataset=mine", 2)
    dataset = "stdlib" if cfg.dataset is None else cfg.dataset
    preset, tokenizer, _, _ = PRESETS.get(dataset, (None, "bpe", None, None))
    sources = tuple(map(preset_source, sources)) or (preset,)
    tokenizer = cfg.tokenizer or tokenizer
    # A folder of that name must not hide an encoding, or what is made here.
    named = ("bpe", "char", *tiktoken.list_encoding_names())
    if tokenizer not in named and Path(tokenizer).is_dir():
        tokenizer += "/tokenizer.json"
    size = cfg.vocab_size
    shard = re.fullmatch(r"(\d{1,3})/(\d{1,3})", cfg.shard or "0/1")
    i, n = map(int, shard.groups()) if shard else (0, 0)
    for holds, message in (
        (re.fullmatch(r"\w[\w.-]{0,99}", dataset) and ".." not in dataset,
         f"--dataset {dataset!r} must be one plain folder name, such as mine"),
        (sources[0] is not None and not re.match("hf:(:|$)", sources[0]),  # hf: and no name
         f"--dataset {dataset} is no preset ({', '.join(PRESETS)}); give your text too:"
         " --source PATH"),
        (len(sources) == 1 or not any(source.startswith("hf:") for source in sources),
         "--source: a hub data set (hf:...) stands alone, not beside others"),
        (0 < cfg.val_fraction < 1, f"--val_fraction {cfg.val_fraction} is not between 0 and 1"),
        (size is None or tokenizer == "bpe",
         f"--vocab_size {size} goes with --tokenizer=bpe, not {tokenizer}"),
        # 256 bytes and the end-of-text token
        (size is None or 257 <= size <= 2**20, f"--vocab_size {size} is not from 257 to {2**20}"),
        (i < n, f"--shard {cfg.shard} must be i/n with i from 0 to n - 1, as 0/4"),
        (not cfg.shard or tokenizer not in ("bpe", "char"),
         f"--shard {cfg.shard}: shards share a tokenizer that is there already, not "
         f"--tokenizer={tokenizer}; use gpt2 or the tokenizer.json of a sample"),
    ):
        if not holds:
            raise UserError(message, 2)
    return replace(cfg, dataset=dataset, source=sources, tokenizer=tokenizer), i, n


def main(cfg):
    """Prepare one data set, or one shard of it; does nothing where it is there already. Returns
    the folder, for load_tokenizer and open_split."""
    cfg, i, n = resolve(cfg)
    whole = Path(cfg.data_dir, cfg.dataset)
    folder = whole / f"shard-{i:03}-of-{n:03}" if cfg.shard else whole
    if cfg.shard and (whole / "meta.json").exists():
        raise UserError(f"{whole} was made without --shard; delete it or take another --dataset")
    with lock_folder(folder):
        try:
            build(cfg, folder, i, n)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror or error}; {folder} is "
                            "as it was") from error
    return whole


def open_sources(cfg, folder, i, n):
    """Slice i of n of the sources: (a function that returns an iterator over (split, text, ends a
    document), size in bytes, SHA-256, files of all slices), None where a hub data set has none."""
    if cfg.source[0].startswith("hf:"):
        there = sorted(Path(cfg.source[0].split(":")[1]).rglob("*"))  # none of one on the hub
        sums = "".join(sha256(path) for path in there if path.is_file())
        digest = hashlib.sha256(sums.encode()).hexdigest() if sums else None
        return partial(read_hub, cfg.source[0], cfg.val_fraction, i, n), None, digest, None
    files = [path for path in source_files(cfg.source, folder) if path.stat().st_size]
    sources = " ".join(map(hide_secrets, cfg.source))
    if not files:
        raise UserError(f"--source {sources} is empty: there is nothing to tokenize")
    if cfg.shard and len(files) < max(n, 2):
        raise UserError(f"--shard {cfg.shard} needs {max(n, 2)} documents, {sources} has "
                        f"{len(files)}")
    count = len(files)
    one_text = count == 1
    files = files[i::n]
    size = sum(path.stat().st_size for path in files)
    print0(f"reading {len(files):,} file(s), {size:,} bytes, from {sources}")
    sums = [sha256(path) for path in files]
    digest = sums[0] if one_text else hashlib.sha256("".join(sums).encode()).hexdigest()
    splits = [split_of(checksum, cfg.val_fraction) for checksum in sums]
    if not cfg.shard:  # which does not see the others' documents
        splits = choose_splits(files, splits, cfg.val_fraction)
    return partial(read_files, files, splits, cfg.val_fraction, one_text), size, digest, count


def build(cfg, folder, i, n):
    """Make slice i of n in `folder`: every file beside the old one, then all renamed."""
    pieces, n_bytes, digest, count = open_sources(cfg, folder, i, n)
    source = " ".join(map(hide_secrets, cfg.source)).encode(errors="backslashreplace").decode()
    vocab_size = cfg.vocab_size
    if cfg.tokenizer == "bpe" and vocab_size is None:
        preset_size = PRESETS.get(cfg.dataset, (None, None, None))[2]
        vocab_size = preset_size or default_vocab_size(n_bytes or SAMPLE)
    name = sha256(cfg.tokenizer) if cfg.tokenizer.endswith(".json") else cfg.tokenizer
    asked = {"source": source, "source_sha256": digest, "format_version": FORMAT_VERSION,
             "settings": [name, vocab_size, cfg.val_fraction]}
    if cfg.shard and count:  # with a file more or less each slice has other ones
        asked["settings"].append(count)
    if (folder / "meta.json").exists():
        there = read_meta(folder)
        file = folder / "tokenizer.json"
        intact = there["tokenizer"] != file.name or (
            file.is_file() and there["tokenizer_sha256"] in (None, sha256(file)))
        if intact and {key: there.get(key) for key in asked} == asked:
            sizes = [f"{len(open_split(folder, split)):,} {split}" for split in SPLITS]
            print0(f"{folder} is ready: {' and '.join(sizes)} tokens; nothing to do")
            return
        print0(f"replacing {folder}, made from {there.get('source')}")
    tokenizer = make_tokenizer(cfg.tokenizer, pieces, n_bytes, vocab_size)
    if tokenizer.eot_id is None:
        raise UserError(f"--tokenizer {cfg.tokenizer} has no end-of-text token: {', '.join(ENDS)}")
    if tokenizer.vocab_size < (cfg.vocab_size or 0):
        raise UserError(f"--vocab_size {cfg.vocab_size}: this text gives only "
                        f"{tokenizer.vocab_size} tokens; leave it out, or give more text")
    counts, lost = write_splits(folder, pieces(), tokenizer, n_bytes)
    if lost > 0.01:
        raise UserError(f"--tokenizer {cfg.tokenizer} cannot write this text: {lost:.1%} of it is "
                        "lost; use --tokenizer=bpe, or one that is made for it")
    if lost:
        print0(f"warning: --tokenizer {cfg.tokenizer} loses about {lost:.2%} of the text")
    train, val = counts["train_tokens"], counts["val_tokens"]
    if min(train, val) < 2 and not cfg.shard:
        raise UserError(f"train and val have {train} and {val} tokens, too few to predict one; "
                        f"give more text or another --val_fraction (now {cfg.val_fraction})")
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.name, "eot_id": tokenizer.eot_id, **counts,
            "lossless": not lost, **asked}
    if not tokenizer.tiktoken:
        (folder / ".tmp-tokenizer.json").write_bytes(tokenizer.engine.to_str(True).encode())
        meta["tokenizer_sha256"] = sha256(folder / ".tmp-tokenizer.json")
    (folder / ".tmp-meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for name in ("meta.json", "tokenizer.json"):  # without meta.json nothing counts as prepared
        remove(folder / name)
    for name in ("train.npy", "val.npy", "tokenizer.json", "meta.json"):  # meta.json last
        with contextlib.suppress(FileNotFoundError):  # tiktoken's vocabularies have no file
            (folder / f".tmp-{name}").replace(folder / name)
    print0(f"{folder}: {train:,} train and {val:,} val tokens, "
           f"vocabulary {meta['vocab_size']:,}, from {source}")


if __name__ == "__main__":
    run_script(main, CFG)
