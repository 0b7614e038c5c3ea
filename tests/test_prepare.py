"""prepare.py: every byte comes back, nothing is left half-written, bad input is one UserError."""

import base64
import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import regex
import tiktoken
from conftest import ROOT, SHARED, needs_gpt2, needs_shared, one_line, snapshot
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import normalizers

import configurator
import prepare
import runtime
from prepare import SPLITS

HARD = (  # what loses bytes in careless code: see test_every_byte_comes_back
    "\ufeffƏdəbiyyat: ağ, ığ, ö, şən, çöl — <|endoftext|> is text\r\nline\rline\n\n\n"
    "  don't \t🙂👩‍👩‍👧 e\u0301 \u200b\u3000中文。\x00\x1c\x7f [UNK] <s> ▁Ġ 1234567 ﬁ\r\n"
)
WORDS = "Güllər açdı, quşlar oxudu; hər kəs sevindi və yola düşdü. "
HINDI = "किताबें पढ़ना मुझे बहुत अच्छा लगता है। "  # a combining mark in each word


@pytest.fixture
def make(tmp_path):
    """make(source, **options) -> the folder that prepare.main wrote."""

    def make(source, dataset="d", **options):
        options = {"tokenizer": "char", "data_dir": str(tmp_path / "data"), **options}
        return prepare.main(prepare.Config(dataset, source=(str(source),), **options))

    return make


@pytest.fixture
def text_file(tmp_path):
    """A text of a few thousand characters."""
    path = tmp_path / "text.txt"
    path.write_bytes((HARD + WORDS * 50).encode())
    return path


@pytest.fixture
def documents(tmp_path):
    """61 documents in a folder."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(61):
        text = f"document {i}\n" + WORDS * (1 + i % 5)
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    """So many pieces that their borders and their order matter."""
    monkeypatch.setattr(prepare, "PIECE", 64)


@pytest.fixture(scope="module", params=[WORDS, HINDI])
def bpe(request):
    """A small BPE, trained as prepare.py trains one, with either of its patterns of words."""
    text = HARD + request.param * 20
    return prepare.make_tokenizer("bpe", lambda: [("train", text, False)], 1, 300)


def tokens(folder, split):
    return prepare.open_split(folder, split)[:]


def text_of(folder):
    """What both splits decode to, one after the other."""
    tokenizer = prepare.load_tokenizer(folder)
    return tokenizer.decode(np.concatenate([tokens(folder, split) for split in SPLITS]))


def texts_of(folder, split):
    """The documents of a split, each of which must end with the end-of-text token."""
    tokenizer, ids = prepare.load_tokenizer(folder), tokens(folder, split)
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    assert not len(ids) or ends[-1] == len(ids) - 1
    return [tokenizer.decode(d[:-1]) for d in np.split(ids, ends + 1) if len(d)]


def byte_level(monkeypatch):
    """gpt2 without its vocabulary: 256 bytes and the end-of-text token."""
    ranks = {bytes([i]): i for i in range(256)}
    engine = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks,
                               special_tokens={prepare.END_OF_TEXT: 257})  # and a gap at 256
    monkeypatch.setattr(prepare.tiktoken, "get_encoding", lambda name: engine)


# ---------------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize("tokenizer", ["bpe", "char", pytest.param("gpt2", marks=needs_gpt2)])
def test_every_byte_comes_back(make, text_file, small_pieces, tokenizer):
    """A dropped byte-order mark, a CRLF made LF, a letter lost between pieces, an end-of-text
    token made from the text, a split in the wrong place: each changes what comes back."""
    folder = make(text_file, tokenizer=tokenizer, vocab_size=300 if tokenizer == "bpe" else None)
    raw, meta = text_file.read_bytes(), prepare.read_meta(folder)
    assert text_of(folder).encode() == raw
    cut = int(len(raw.decode()) * 0.9)
    assert prepare.load_tokenizer(folder).decode(tokens(folder, "train")) == raw.decode()[:cut]
    assert meta["train_bytes"] == len(raw.decode()[:cut].encode())
    assert meta["train_bytes"] + meta["val_bytes"] == len(raw)
    for split in SPLITS:
        ids = np.load(folder / f"{split}.npy", mmap_mode="r")
        assert ids.ndim == 1 and ids.dtype == meta["dtype"] == "uint16"
        assert len(ids) == meta[f"{split}_tokens"] and meta["eot_id"] not in ids
    assert meta["source_sha256"] == hashlib.sha256(raw).hexdigest()
    assert (meta["source"], meta["format_version"]) == (str(text_file), 1)
    assert meta["lossless"] is True
    assert (folder / "tokenizer.json").exists() == (tokenizer != "gpt2")


@needs_shared
@needs_gpt2
def test_the_verdict(make):
    """The figures the book prints for this text."""
    text = (SHARED / "the-verdict.txt").read_bytes().decode()
    folder = make(SHARED / "the-verdict.txt", tokenizer="gpt2")
    assert len(text) == 20_479 and len(prepare.load_tokenizer(folder).encode(text)) == 5_145
    assert prepare.load_tokenizer(folder).decode(tokens(folder, "val")) == text[18_431:]
    assert [(len(tokens(folder, split)) - 1) // 256 for split in SPLITS] == [18, 2]


@settings(deadline=None)
@given(st.text())
@example("\r\n\r")
@example("\ufeff<|endoftext|>")
def test_round_trip(bpe, text):
    """Any text, the tokens in range and the end-of-text token never among them. tiktoken refuses
    the text <|endoftext|> unless told that it is text. One token a character."""
    with pytest.MonkeyPatch.context() as patch:
        byte_level(patch)
        for tokenizer in (bpe, prepare.open_tiktoken("gpt2")):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot_id for i in ids)
    characters = prepare.make_tokenizer("char", lambda: [("train", text, False)])
    ids = characters.encode(text)
    assert len(ids) == len(text) and characters.decode(ids) == text


def test_ids_of_no_token(bpe, monkeypatch):
    """A head padded to 50,304 draws ids past the vocabulary, and some vocabularies have gaps: that
    was a KeyError in the middle of a run."""
    byte_level(monkeypatch)
    for tokenizer in (bpe, prepare.open_tiktoken("gpt2")):
        odd = [*tokenizer.encode("ağ"), 256 if tokenizer.tiktoken else 300, 999_999]
        assert tokenizer.decode(np.array(odd)) == "ağ"


@pytest.mark.parametrize("characters, dtype", [(65_535, "uint16"), (65_536, "uint32")])
def test_dtype_follows_the_vocabulary(make, tmp_path, characters, dtype):
    """One token more than 65,536 does not fit 16 bits: ids would wrap around silently."""
    (tmp_path / "wide.txt").write_text("".join(map(chr, range(0x10000, 0x10000 + characters))))
    folder = make(tmp_path / "wide.txt")
    assert tokens(folder, "val").dtype == dtype
    assert text_of(folder) == (tmp_path / "wide.txt").read_text()
    assert tokens(folder, "val").max() == characters - 1


FRAGMENTS = [*" .,'/_-=\n\r\t9xƏ中🙂\u3000\xa0\x1c\u0301", "  ", "\r\n", "\n\n", "'s", "'LL", "123",
             "...", "https://", "<|endoftext|>", "\n/", " \n ", "Ab", "\ufeff"]


@st.composite
def adversarial(draw):
    """Text that tokenizers split in odd places, with a word and a space now and then."""
    groups = st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), max_size=20)
    return "word ".join(draw(groups))


def encoding_patterns():
    """The regular expressions that split text, of every encoding of tiktoken."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, name, lambda *args, **kwargs: {})
        makers = openai_public.ENCODING_CONSTRUCTORS
        return {make()["pat_str"] for make in makers.values()}


PATTERNS = encoding_patterns()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=adversarial())
@example(text="word " + "x" * 33 + ".\nyes")  # the 40th character is what '.\n' would lose
def test_pieces_split_as_the_whole(bpe, text):
    """A piece that ends inside what a tokenizer joins ('.\\n', ' \\n', \\n/) gives other tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", 40)
        pieces = list(prepare.read_pieces(io.StringIO(text, newline="")))
    assert "".join(pieces) == text and all(len(piece) <= 4 * 40 + 40 for piece in pieces)
    assert sum((bpe.encode(piece) for piece in pieces), []) == bpe.encode(text)
    for pattern in PATTERNS:
        split = [word for piece in pieces for word in regex.findall(pattern, piece)]
        assert split == regex.findall(pattern, text)


@pytest.mark.parametrize("kind", ["dna", "base64", "blanks"])
def test_text_without_breaks(make, tmp_path, kind):
    """One endless word must neither be merged in quadratic time (400 kB of DNA took 34 s, 4 MB
    never ended), nor be gathered in memory, nor lose a character."""
    draw = random.Random(1)
    text = {"dna": "".join(draw.choices("acgt", k=400_001)), "blanks": " " * 400_001,
            "base64": base64.b64encode(draw.randbytes(300_001)).decode()}[kind]
    (tmp_path / "t.txt").write_text(text)
    began = time.process_time()
    folder = make(tmp_path / "t.txt", tokenizer="bpe")
    assert text_of(folder) == text and time.process_time() - began < 12
    pieces = [len(piece) for piece in prepare.read_pieces(io.StringIO(text))]
    assert sum(pieces) == len(text) and max(pieces) <= 5 * prepare.PIECE


@given(st.text(alphabet="ab1 _.é\n", max_size=100))
def test_long_runs_alone_are_cut(text):
    """Ordinary text must be split as GPT-2's is: its tokens would all be others."""
    words = prepare.pre_tokenizers.Split(prepare.Regex(prepare.WORDS), "isolated")
    usual = prepare.pre_tokenizers.ByteLevel(add_prefix_space=False)  # it has GPT-2's pattern
    spans = [[span for _, span in cut.pre_tokenize_str(text)] for cut in (words, usual)]
    assert spans[0] == spans[1]
    assert max(len(part) for part, _ in words.pre_tokenize_str(text + "x" * 1000)) <= 129


def test_marks_stay_in_their_words():
    """GPT-2's words end at every combining mark: three times the tokens for Hindi. One mark among
    much else is no reason for other words than GPT-2's."""

    def made_from(*texts):
        pieces = [(split, text, True) for split, text in zip(["train", "val"], texts, strict=False)]
        return prepare.make_tokenizer("bpe", lambda: pieces, 1, 400)

    def pattern(tokenizer):
        saved = json.loads(tokenizer.engine.to_str())
        return saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]

    hindi = made_from(HINDI * 20)
    assert [hindi.decode([i]) for i in hindi.encode(HINDI.strip())] == re.findall(
        r" ?[^ ।]+|।", HINDI.strip())
    assert pattern(hindi) == prepare.MARKED_WORDS == pattern(made_from(HINDI + "x" * 500))
    assert pattern(made_from(HARD + WORDS * 20, HINDI * 20)) == prepare.WORDS


@given(adversarial() | st.text(alphabet="ab \n", max_size=200))
@example(HINDI + "e\u0301\r\n\r\n (किताबें) \u0301")
@example("it" + "x" * 300 + " is " + "\n" * 200 + "'ll <|endoftext|>")
@example("\x1c".join("ab" * 60))
def test_tiktoken_gives_the_ids_of_our_bpe(bpe, text):
    """Would catch merges in another order, bytes under another letter, text cut elsewhere."""
    assert bpe.fast is not None
    assert bpe.encode(text) == bpe.engine.encode(text, add_special_tokens=False).ids


def test_threads_keep_the_order():
    """Results that come when they are ready would shuffle the text; all at once fill memory."""
    started = []

    def slow_first(i):
        started.append(i)
        threading.Event().wait(0.02 if i % 3 == 0 else 0)
        return i

    seen = []
    for i in prepare.in_order(slow_first, range(41), 4):
        seen.append(i)
        assert max(started) - i <= 8
    assert seen == list(range(41))


def test_bpe_sample_is_bounded_and_spread(make, tmp_path, monkeypatch, small_pieces):
    """A BPE trained on the head of a corpus, or on all of it, is what sampling prevents."""
    counted = []

    def train(self, texts, trainer):
        counted.extend(texts)

    monkeypatch.setattr(prepare.HFTokenizer, "train_from_iterator", train)
    monkeypatch.setattr(prepare, "as_tiktoken", lambda *_: None)  # nothing was trained
    monkeypatch.setattr(prepare, "SAMPLE", 1000)
    pieces = [("train", f"{i:064}", False) for i in range(1000)]
    prepare.make_tokenizer("bpe", lambda: pieces, 64_000, 300)
    assert 800 <= sum(map(len, counted)) <= 1064 and int(counted[-1]) > 900
    counted.clear()
    prepare.make_tokenizer("bpe", lambda: iter(lambda: pieces[0], None), None, 300)  # endless
    assert 0 < len(counted) < 1000


def test_bpe_has_not_seen_the_validation_text(make, tmp_path):
    """It had, so that words which only validate were tokens: on 20 kB a tenth fewer of them."""
    text = "to be or not to be " * 90 + "zyzzyva quux " * 15
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    folder = make(tmp_path / "t.txt", tokenizer="bpe", vocab_size=270)
    assert text_of(folder) == text
    assert len(tokens(folder, "train")) < 1000 and len(tokens(folder, "val")) > 130


def test_vocabulary_fits_the_text(make, text_file):
    """4,096 tokens for every text were more than a small one bears; where it cannot even give the
    size that was chosen for it, that is no error."""
    sizes = (10, 100_000, 343_000, 1_000_000, 3_000_000, 10**9)
    assert [*map(prepare.default_vocab_size, sizes)] == [1024, 1024, 1024, 2048, 4096, 4096]
    for dataset in ("d", "stdlib"):  # a preset's size is no promise of another text's either
        folder = make(text_file, dataset, tokenizer="bpe")
        assert 257 < prepare.read_meta(folder)["vocab_size"] < 512


# ---------------------------------------------------------------------------------------------
# sources and splits


def test_documents_go_whole_to_one_split(make, documents, small_pieces, capsys):
    """Half of a document in each split would let validation see its training text."""
    (documents / "empty.txt").touch()
    (documents / "table.csv").write_text("1,2")
    folder = make(documents)
    texts = {split: texts_of(folder, split) for split in SPLITS}
    wanted = [p.read_text(encoding="utf-8") for p in sorted(documents.glob("[0-9]*.txt"))]
    assert sorted(texts["train"] + texts["val"]) == sorted(wanted)
    assert texts["train"] == [t for t in wanted if t in texts["train"]], "out of order"
    out = capsys.readouterr().out
    assert f"{len(texts['val'])} of 61 documents validate" in out and "left out 1 .csv" in out
    assert "reading 61 file(s)" in out
    n_bytes = {split: sum(len(t.encode()) for t in texts[split]) for split in SPLITS}
    assert 0.05 <= n_bytes["val"] / sum(n_bytes.values()) <= 0.2


def test_split_depends_on_the_text_alone(make, documents):
    """A split by name, place or number of documents moves text into validation after training."""
    before = set(texts_of(make(documents), "val"))
    for path in sorted(documents.glob("*.txt"))[::-1]:
        path.rename(documents / f"{int(path.stem) * 7 % 61:03}-renamed.md")
    (documents / "another.md").write_text("one more")
    assert set(texts_of(make(documents, "renamed"), "val")) - {"one more"} == before


@pytest.mark.parametrize("sizes", [[3, 5, 4], [9] * 2, [1000] + [1] * 30, [1] * 21])
def test_few_or_uneven_documents(make, tmp_path, sizes, capsys):
    """Of 2 to 4 documents up to 80 % validated, or one language wholly; of equal ones none
    trained. A tenth of the bytes validates, and the output says how."""
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * (size > 1) + "abcdefghi " * 10 * size)
    for _ in range(2):  # the second asks where hashes would hold out one of a thousand, or none
        folder = make(tmp_path / "*.txt", "x")
        meta = prepare.read_meta(folder)
        share = meta["val_bytes"] / (meta["train_bytes"] + meta["val_bytes"])
        assert 0.09 < share < 0.12
    assert all(len(texts_of(folder, split)) == len(sizes) for split in SPLITS)
    whole = [a + b for a, b in zip(*(texts_of(folder, s) for s in SPLITS), strict=True)]
    assert whole == [p.read_text() for p in sorted(tmp_path.glob("*.txt"), key=str)]
    assert f"each of the {len(sizes)} documents validate" in capsys.readouterr().out


def test_folder_and_glob(tmp_path):
    """Folders give .txt and .md at any depth, globs what they match, in one order everywhere; a
    file that two sources name is read once."""
    for name in ("b.txt", "a/c.MD", "a/d.py", "e.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*sources):
        files = prepare.source_files(tuple(map(str, sources)), tmp_path)
        return [p.relative_to(tmp_path).as_posix() for p in files]

    assert names(tmp_path) == ["a/c.MD", "b.txt"]
    assert names(tmp_path / "**/*.py") == ["a/d.py"]
    assert names(tmp_path / "e.json", tmp_path, tmp_path / "b.txt") == ["e.json", "a/c.MD", "b.txt"]
    assert prepare.source_files(str(tmp_path / "e.json"), tmp_path) == [tmp_path / "e.json"]


def test_stdlib_is_real_and_readable():
    """The offline default: code of this Python, without tests and installed packages."""
    files = prepare.source_files("stdlib", "unused")
    names = {p.name for p in files}
    assert len(files) > 300 and {"argparse.py", "json", "ast.py"} - names == {"json"}
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(p.parts) for p in files)
    for path in files:
        path.read_text(encoding="utf-8")


def test_a_source_needs_a_name(fails):
    """`--source` without `--dataset` replaced data/stdlib, and with it the next training run."""
    for options, words in ((["--source", "book.txt"], "--source needs a name"),
                           (["--dataset=", "--source", "book.txt"], "--dataset ''"),
                           (["--source"], "--source needs a name"),
                           (["--dataset=a", "--source"], "--source is empty")):  # $UNSET
        cfg = configurator.load(prepare.Config, options)
        fails(2, lambda cfg=cfg: prepare.main(cfg), words)
    assert prepare.resolve(prepare.Config())[0].dataset == "stdlib"


def test_several_sources_and_replacing(run, tmp_path):
    """The command line takes several; a data set made from something else is not replaced without
    a word."""
    (tmp_path / "a.txt").write_text("first text " * 20)
    (tmp_path / "b.md").write_text("second text " * 20)
    run("prepare.py", "--dataset=a-b", "--source", "a.txt", "b.md")
    assert len(texts_of(tmp_path / "data/a-b", "val")) == 2
    (tmp_path / "c.py").write_text('source = ["b.md"]\ndataset = "a-b"\n')
    out = run("prepare.py", "c.py").stdout
    assert "replacing data/a-b, made from a.txt b.md" in out
    assert prepare.read_meta(tmp_path / "data/a-b")["source"] == "b.md"
    with contextlib.suppress(OSError):  # a system that has no such names
        shutil.copy(tmp_path / "a.txt", tmp_path / "c\udcff.txt")
        run("prepare.py", "--dataset=c", "--source", "c\udcff.txt")  # a traceback
        prepare.read_meta(tmp_path / "data/c")["source"].encode()  # a report's, too


@pytest.fixture
def hub(tmp_path):
    """A folder with 41 rows of text as jsonl, another with the same as parquet; the texts."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": i, "text": f"sətir {i}\r\n{WORDS}", "title": f"t{i}"} for i in range(41)]
    rows[3]["text"], rows[4]["text"] = None, ""
    for kind in ("jsonl", "parquet"):
        (tmp_path / kind).mkdir()
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "jsonl/train.jsonl").write_text(lines, encoding="utf-8")
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "parquet/train.parquet")
    return [row["text"] or "" for row in rows]


def test_hub_data_set(make, tmp_path, hub, fails):
    """Rows are documents; jsonl and parquet of the same rows are the same data set."""
    folders = [make(f"hf:{tmp_path / kind}", kind) for kind in ("jsonl", "parquet")]
    for folder in folders:
        train, val = (texts_of(folder, split) for split in SPLITS)
        assert sorted(train + val) == sorted(hub) and train and val
    for split in SPLITS:
        files = [folder / f"{split}.npy" for folder in folders]
        assert files[0].read_bytes() == files[1].read_bytes()
    titles = make(f"hf:{tmp_path / 'jsonl'}::title", "titles")
    assert "t7" in sum((texts_of(titles, split) for split in SPLITS), [])
    rows = tmp_path / "jsonl/train.jsonl"
    rows.write_text(rows.read_text("utf-8").replace("sətir 7", "sətir yeni"), encoding="utf-8")
    changed = make(f"hf:{tmp_path / 'jsonl'}", "jsonl")  # it was "ready; nothing to do"
    assert any("yeni" in text for split in SPLITS for text in texts_of(changed, split))
    fails(2, lambda: make(f"hf:{tmp_path / 'jsonl'}::body", "x"), "'body'", "id, text, title")
    fails(2, lambda: make(f"hf:{tmp_path / 'jsonl'}::id", "x"), "no text column 'id'")
    rows.write_text('{"text": 0}\n' * 9)  # a number 0 was taken for an empty text
    fails(2, lambda: make(f"hf:{tmp_path / 'jsonl'}", "x"), "no text column 'text'")
    fails(1, lambda: make(f"hf:{tmp_path / 'nothing'}", "x"), "nothing", "--dataset=stdlib")
    fails(1, lambda: make(f"hf:{tmp_path / 'jsonl'}:nope", "x"), "nope")


# ---------------------------------------------------------------------------------------------
# downloads


@pytest.fixture
def server():
    """A web server; server.answers are the statuses to come, then 200; see Handler."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, status = WORDS.encode() * 2000, next(server.answers, 200)
            server.asked.append(self.path)
            if status == "stall":
                server.stalled.set()
                server.go_on.wait(300)
            self.send_response(status if isinstance(status, int) else 200)
            length = "3, 4" if status == "length" else len(body)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2 if status == "truncate" else None])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = [], iter(())
    server.stalled, server.go_on = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.mark.network_loopback
def test_download(make, server, fails):
    """What is there is not fetched twice; half a file kept as if it were whole would train half a
    model for ever after."""
    folder = make(f"{server.url}/dir/text.txt")
    make(f"{server.url}/dir/text.txt", val_fraction=0.2)
    assert text_of(folder) == WORDS * 2000 and len(server.asked) == 1
    raw = [p.name for p in folder.glob("raw-*")]
    assert len(raw) == 1 and raw[0].endswith("-text.txt")
    (folder / raw[0]).write_bytes(b"")  # what came once was nothing, and was kept for ever
    make(f"{server.url}/dir/text.txt")
    assert text_of(folder) == WORDS * 2000 and len(server.asked) == 2
    for answer, word in ((404, "404"), ("truncate", "ChunkedEncodingError"), ("length", "Header")):
        server.answers = iter([answer])
        url = f"{server.url}/bad.txt"
        fails(1, lambda url=url: make(url), url, word, "raw-", "preset stdlib")
        assert [p.name for p in folder.glob("*raw-*")] == raw


@pytest.mark.network_loopback
def test_secrets_stay_secret(make, server, fails, tmp_path, capsys):
    """A URL's user, password and query stood in meta.json, every checkpoint and the published card
    of an export."""
    host = server.url.removeprefix("http://")
    make(f"http://ann:pa%40ss@{host}/t.txt?token=tok#frag")
    server.answers = iter([404])
    fails(1, lambda: make(f"http://ann:pass@{host}/u.txt?token=tok"), f"http://{host}/u.txt (404)")
    for wrong in ("ftp://ann:pass@host/f", "http://ann:pa/ss@host/f", "https:/ann:pass@host",
                  "http://ann:pass@h o"):
        with pytest.raises(runtime.UserError) as stop:
            make(wrong)
        assert "ann" not in str(stop.value) and stop.value.code == 2
    out = capsys.readouterr()
    written = "".join(p.name + p.read_text() for p in (tmp_path / "data").rglob("*")
                      if p.suffix == ".json" or "raw" in p.name)
    for secret in ("ann", "pass", "pa%40", "tok=", "=tok", "frag"):
        assert secret not in out.out + out.err + written
    assert prepare.read_meta(tmp_path / "data/d")["source"] == f"http://{host}/t.txt"


@pytest.mark.network_loopback
def test_checksum(make, server, monkeypatch, fails):
    """Another text under a preset's name must not pass for the preset."""
    right = hashlib.sha256(WORDS.encode() * 2000).hexdigest()
    for name, checksum in (("good", right), ("bad", "0" * 64)):
        preset = (f"{server.url}/{name}", "char", None, checksum)
        monkeypatch.setitem(prepare.PRESETS, name, preset)
    assert prepare.read_meta(make("good"))["source_sha256"] == right
    fails(1, lambda: make("bad"), "SHA-256", "0" * 64, "delete it")
    assert prepare.read_meta(make("good"))["source_sha256"] == right


@pytest.mark.network_loopback
@pytest.mark.parametrize("path", ["/%2e%2e/%2e%2e/up", "/a/..", "/..\\..\\up", "/" + "x" * 4000])
def test_download_stays_in_its_folder(make, server, tmp_path, path):
    """The last part of a URL becomes a file name: it may not lead out of the folder."""
    folder = make(server.url + path)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
    assert {p.parent for p in files} == {folder}


@pytest.mark.parametrize("options", [
    ["--source=http://nowhere.invalid/t.txt"], ["--tokenizer=gpt2", "--source=text.txt"],
    ["--source=hf:someone/something"]])
def test_no_network(run, text_file, tmp_path, options):
    """One line says how to go on."""
    proxy = "http://127.0.0.1:9"
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    env |= dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), proxy)
    result = run("prepare.py", "--dataset=mine", *options, env=env)
    assert result.returncode == 1
    one_line(result.stderr, "--tokenizer=bpe" if "--tokenizer=gpt2" in options else "stdlib")


def test_hub_offline(monkeypatch, fails):
    """HF_HUB_OFFLINE users have their cache; others learn at once that the hub is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    prepare.require_network("use --dataset=stdlib")  # conftest sets HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fails(1, lambda: prepare.require_network("use x"), "cannot reach http", "use x")


# ---------------------------------------------------------------------------------------------
# again, killed, twice at once, no space


def test_second_run_does_nothing(make, text_file, capsys):
    """Preparing a day's corpus again because the command was repeated wastes a day."""
    folder = make(text_file)
    before = snapshot(folder)
    capsys.readouterr()
    make(text_file)
    assert snapshot(folder) == before and "nothing to do" in capsys.readouterr().out
    (folder / "tokenizer.json").write_text("{")  # no "nothing to do" for what cannot be read
    make(text_file)
    assert {name: content[0] for name, content in snapshot(folder).items() if content} == {
        name: content[0] for name, content in before.items() if content}
    make(text_file, val_fraction=0.3)
    assert len(tokens(folder, "val")) > 2 * before["val.npy"][0].__len__() // 6
    text_file.write_text("another text")
    make(text_file)
    assert text_of(folder) == "another text"


KILLED = """
    import os, pathlib, signal, sys
    sys.path.insert(0, {root!r})
    import prepare
    steps = int(sys.argv.pop(1))
    def counted(function):
        def call(*args, **kwargs):
            global steps
            steps -= 1
            if steps < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    os.fsync = counted(os.fsync)
    for name in ("replace", "unlink", "write_text"):
        setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
    prepare.tqdm.update = counted(prepare.tqdm.update)
    prepare.main(prepare.load(prepare.Config))
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize("before", ["nothing", "old data"])
def test_killed_leaves_old_data_or_none(make, tmp_path, text_file, before):
    """kill -9 before every step that touches the disk, over old data and over none: a folder with
    a meta.json is always whole, and the next run is not hindered by what was left."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED).format(root=str(ROOT)))
    (tmp_path / "new.txt").write_text(WORDS)
    old_text, folder = text_file.read_bytes().decode(), tmp_path / "data/d"
    options = ["--source=new.txt", "--tokenizer=char", "--dataset=d", "--data_dir=data"]
    outcomes = set()
    for steps in range(30):
        if before == "old data":
            make(text_file)
        command = [sys.executable, script, str(steps), *options]
        code = subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
        outcomes.add(text_of(folder) if (folder / "meta.json").exists() else "none")
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and steps > 6 and not list(folder.glob(".tmp-*"))
    assert outcomes == {"none", WORDS} | ({old_text} if before == "old data" else set())


@pytest.mark.network_loopback
def test_two_at_once_and_interrupt(run, server, tmp_path):
    """Two that write the same files would mix them; Ctrl-C must not print a traceback."""
    server.answers = iter(["stall"])
    options = [f"--source={server.url}/t", "--dataset=d", "--tokenizer=char"]
    command = [sys.executable, str(ROOT / "prepare.py"), *options]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert server.stalled.wait(60)
    second = run("prepare.py", *options)
    assert second.returncode == 1
    one_line(second.stderr, "another run is writing into", "data/d")
    first.send_signal(signal.SIGINT)
    err = first.communicate(timeout=60)[1]
    assert first.returncode == 130 and "Traceback" not in err
    assert list(snapshot(tmp_path)) == ["data"]


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
def test_no_space(run, make, tmp_path, text_file):
    """The disk fills up in the middle: one line, and the data that was there is as it was."""
    import resource

    folder = make(text_file)
    before = snapshot(folder)
    (tmp_path / "long.txt").write_text(WORDS * 500)
    options = ["--dataset=d", "--source=long.txt", "--tokenizer=char"]
    limit = (4096, 4096)
    result = run("prepare.py", *options,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert result.returncode == 1
    one_line(result.stderr, "data/d", os.strerror(errno.EFBIG), "as it was")
    assert snapshot(folder) == before


# ---------------------------------------------------------------------------------------------
# bad input: one line, the promised code, nothing on disk changed

BAD = {  # name: (options, exit code, words of the line)
    "no such file": ({"source": "none.txt"}, 1, ["none.txt", "no such file", "stdlib, verdict"]),
    "folder without text": ({"source": "folder"}, 1, ["folder", "**/*.py"]),
    "empty files": ({"source": "empty*.txt"}, 1, ["empty*.txt is empty"]),
    "not UTF-8, bpe": ({"source": "latin1.txt", "tokenizer": "bpe"}, 1, ["unpack", "iconv"]),
    "not UTF-8, document": ({"source": "*.txt"}, 1, ["latin1.txt is not UTF-8"]),
    "empty source": ({"source": ""}, 2, ["--source is empty"]),
    "hub and no name": ({"source": "hf:"}, 2, ["give your text too"]),
    "hub and a part of no name": ({"source": "hf::en"}, 2, ["give your text too"]),
    "hub and more": ({"source": ("hf:a", "text.txt")}, 2, ["stands alone"]),
    "vocabulary too large": (
        {"tokenizer": "bpe", "vocab_size": 50_000}, 1, ["50000", "leave it out", "more text"]),
    "vocabulary too small": ({"tokenizer": "bpe", "vocab_size": 256}, 2, ["256", "257"]),
    "vocabulary absurd": ({"tokenizer": "bpe", "vocab_size": 10**15}, 2, ["1048576"]),
    "vocabulary of gpt2": ({"tokenizer": "gpt2", "vocab_size": 300}, 2, ["goes with", "gpt2"]),
    "val too short": ({"source": "tiny.txt"}, 1, ["9 and 1 tokens", "--val_fraction"]),
    "unknown tokenizer": ({"tokenizer": "gpt9"}, 2, ["gpt9", "gpt2", "cl100k_base", "bpe"]),
    "no tokenizer file": ({"tokenizer": "no.json"}, 1, ["no.json", "No such file"]),
    "broken tokenizer": ({"tokenizer": "broken.json"}, 1, ["broken.json cannot be read"]),
    "binary tokenizer": ({"tokenizer": "binary.json"}, 1, ["binary.json cannot be read"]),
    "no end-of-text": ({"tokenizer": "no-end.json"}, 1, ["no-end.json", "<|endoftext|>"]),
    **{f"name {name[:9]!r}": ({"dataset": name}, 2, [repr(name)[:20], "plain folder name"])
       for name in ("..", "a/b", "a\\b", "", "/tmp", ".hidden", "a..b", "a\n", "x" * 300)},
    "no source": ({"source": ()}, 2, ["mine", "--source PATH"]),
    "val_fraction 1": ({"val_fraction": 1.0}, 2, ["--val_fraction 1.0"]),
    "val_fraction nan": ({"val_fraction": float("nan")}, 2, ["--val_fraction nan"]),
    "shard of one text": ({"shard": "0/2", "tokenizer": "t.json"}, 1, ["needs 2 documents", "1"]),
    **{f"shard {shard}": ({"shard": shard, "tokenizer": "t.json"}, 2, [f"--shard {shard}", "0/4"])
       for shard in ("2/2", "first", "-1/2", "0/1000", "1/2/3", "1")},
    "shard with bpe": ({"shard": "0/2", "tokenizer": "bpe"}, 2, ["--tokenizer=bpe"]),
    "endless name": ({"source": "x" * 5000}, 1, ["name too long"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch, fails, bpe):
    """Each is one line that names the value and the remedy, and changes no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes(WORDS.encode() * 100 + "ş".encode("iso-8859-9"))
    (tmp_path / "text.txt").write_text(WORDS * 5)
    (tmp_path / "tiny.txt").write_text("0123456789")
    (tmp_path / "folder").mkdir()
    for name in ("empty.txt", "empty2.txt"):
        (tmp_path / name).touch()
    (tmp_path / "broken.json").write_text('{"version": "1.0"}')
    (tmp_path / "binary.json").write_bytes(b"\xff\x00\xfe")
    bpe.engine.save(str(tmp_path / "t.json"))
    no_end = (tmp_path / "t.json").read_text().replace("<|endoftext|>", "<other>")
    (tmp_path / "no-end.json").write_text(no_end)
    options, code, words = BAD[case]
    options = {"dataset": "mine", "source": "text.txt", "tokenizer": "char", **options}
    before = snapshot(tmp_path)
    fails(code, lambda: prepare.main(prepare.Config(**options)), *words)
    after = {name: file for name, file in snapshot(tmp_path).items() if file}
    assert after == {name: file for name, file in before.items() if file}


# ---------------------------------------------------------------------------------------------
# data and tokenizers that others made


@pytest.mark.parametrize("content", [
    b"\xff\xfe{}", b"", b"[]", b"null", b"{}", b'{"tokenizer": 7}', b"[" * 100_000,
    b'{"vocab_size": Infinity}', b'{"vocab_size": 1000000000000}', b'{"vocab_size": 0}',
    b'{"eot_id": 5000}', b'{"val_tokens": -1}', b'"format_version": 2'])
def test_bad_meta_json(make, text_file, fails, content):
    """A damaged or foreign meta.json is named by every reader, prepare.py among them."""
    folder = make(text_file)
    good = (folder / "meta.json").read_text()
    if b":" in content:  # one value of a good file is replaced
        key, value = content.decode().strip("{}").split(": ")
        content = re.sub(rf"{key}: [^,]+", f"{key}: {value}", good).encode()
    (folder / "meta.json").write_bytes(content)
    for reader in (prepare.read_meta, prepare.load_tokenizer, lambda f: make(text_file)):
        fails(1, lambda reader=reader: reader(folder), "meta.json cannot be read", "again")
    assert (folder / "meta.json").read_bytes() == content


def npy(array, **changes):
    """The bytes of an .npy file, its header changed."""
    file = io.BytesIO()
    np.save(file, array)
    for old, new in changes.items():
        old, new = old.encode(), new.encode()
        file = io.BytesIO(file.getvalue().replace(old, new.ljust(len(old)), 1))
    return file.getvalue()


def test_damaged_tokens(make, text_file, fails):
    """A cut-off, missing or foreign train.npy is found when it is opened, not after an hour; an
    npz, a negative length, a struct, text or negative ids were tracebacks."""
    folder = make(text_file)
    whole = (folder / "train.npy").read_bytes()
    n = prepare.read_meta(folder)["train_tokens"]
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(n, np.uint16))
    contents = [whole[:-1000], whole[:20], b"", None, archive.getvalue(), npy(np.zeros((n, 1))),
                whole.replace(str(n).encode(), b"-" + str(n)[1:].encode(), 1),
                whole.replace(str(n).encode(), b"7" * len(str(n)), 1),
                npy(np.zeros(7, np.uint16)), npy(np.full(n, -1, np.int32)), npy(np.zeros(n, ">u2"))]
    contents += [npy(np.zeros(n, dtype)) for dtype in ("f4", "c8", "U3", "?", "M8[s]", "u2,u2")]
    contents += [npy(np.array([None] * n))]
    for content in contents:
        (folder / "train.npy").unlink()
        if content is not None:
            (folder / "train.npy").write_bytes(content)
        fails(1, lambda: prepare.open_split(folder, "train"), "train.npy is damaged", "again")
        fails(1, lambda: make(text_file), "train.npy is damaged")
        (folder / "train.npy").touch()


def test_tokenizer_of_another_data_set(make, text_file, tmp_path, fails):
    """A stranger's meta.json may not name a file elsewhere, and a tokenizer.json of other data,
    even of equal size, would print gibberish."""
    folder = make(text_file)
    mine = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(mine.replace('"a"', '"b"', 1))
    fails(1, lambda: prepare.load_tokenizer(folder), "not the tokenizer that meta.json names")
    (folder / "tokenizer.json").rename(tmp_path / "secret.json")
    meta = (folder / "meta.json").read_text().replace('"tokenizer.json"', '"../../secret.json"')
    (folder / "meta.json").write_text(meta)
    fails(1, lambda: prepare.load_tokenizer(folder), str(folder / "tokenizer.json"))


def test_tokenizer_files(make, text_file, tmp_path):
    """A run that reads the tokenizer at each checkpoint saves that of a data set made meanwhile:
    what is read once must be enough to load it again, byte for byte."""
    folder = make(text_file, tokenizer="bpe", vocab_size=300)
    old = prepare.load_tokenizer(folder)
    files = prepare.tokenizer_files(folder, old)
    text_file.write_text((HARD + WORDS * 20)[::-1], encoding="utf-8")
    make(text_file, tokenizer="bpe", vocab_size=300)
    for name, text in files.items():
        runtime.write_text(tmp_path / name, text)
    assert prepare.load_tokenizer(tmp_path).encode(HARD) == old.encode(HARD)
    ids = [prepare.read_meta(place)["tokenizer_sha256"] for place in (tmp_path, folder)]
    assert ids[0] == hashlib.sha256(files["tokenizer.json"].encode()).hexdigest() != ids[1]


def test_tokenizer_file(make, text_file, bpe, tmp_path):
    """A file's own truncation and padding would cut the text; a gap in its ids would make
    vocab_size too small for the embedding."""
    bpe.engine.save(str(tmp_path / "t.json"))
    said = json.loads((tmp_path / "t.json").read_text())
    said["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst",
                          "stride": 0}
    said["model"]["vocab"]["extra"] = 999
    (tmp_path / "t.json").write_text(json.dumps(said))
    folder = make(text_file, tokenizer=str(tmp_path / "t.json"))
    assert text_of(folder).encode() == text_file.read_bytes()
    assert prepare.read_meta(folder)["vocab_size"] == 1000
    bpe.engine.save(str(tmp_path / "t.json"))  # another tokenizer: not "nothing to do"
    make(text_file, tokenizer=str(tmp_path / "t.json"))
    assert prepare.read_meta(folder)["vocab_size"] == 300


@pytest.mark.parametrize("name, config, token", [
    ("tokenizer_config.json", {"eos_token": "ə"}, "ə"),
    ("tokenizer_config.json", {"eos_token": {"content": "ü"}}, "ü"),
    ("tokenizer_config.json", {"eos_token": "no such"}, None), ("tokenizer_config.json", [], None),
    ("tokenizer_config.json", {"eos_token": None}, None), ("other.json", {}, None)])
def test_folder_of_a_transformers_model(make, text_file, tmp_path, name, config, token):
    """Its own end-of-text token ends documents, whatever else the vocabulary holds."""
    (tmp_path / "model").mkdir()
    folder = make(text_file, "char")
    engine = prepare.load_tokenizer(folder).engine
    engine.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model" / name).write_text(json.dumps(config))
    expected = engine.token_to_id(token or prepare.END_OF_TEXT)
    for tokenizer in ("model", "model/tokenizer.json"):
        folder = make(text_file, tokenizer=str(tmp_path / tokenizer))
        assert prepare.load_tokenizer(folder).eot_id == expected


def test_folder_named_as_an_encoding(make, text_file, tmp_path, monkeypatch):
    """A folder gpt2/ must not hide the encoding gpt2, nor char/ what char is; a tokenizer.json that
    the data had before would be copied into checkpoints."""
    monkeypatch.chdir(tmp_path)
    byte_level(monkeypatch)
    for name, said in (("char", "tokenizer.json"), ("gpt2", "gpt2")):
        (tmp_path / name).mkdir()
        folder = make(text_file, tokenizer=name)
        assert prepare.read_meta(folder)["tokenizer"] == said
        assert (folder / "tokenizer.json").exists() == (name == "char")


def test_tokenizer_that_loses_text(make, text_file, tmp_path, bpe, fails, capsys):
    """Japanese became 100 % <|endoftext|> and 0.000 bits per byte. Refused above 1 %; below, a
    warning and no bits per byte; what only adds a blank loses nothing."""
    make(text_file)
    characters = str(tmp_path / "data/d/tokenizer.json")
    (tmp_path / "ja.txt").write_text("これは日本語の文章です。" * 50)
    fails(1, lambda: make(tmp_path / "ja.txt", "x", tokenizer=characters), "100.0%", "bpe")
    assert not (tmp_path / "data/x").exists()
    (tmp_path / "rare.txt").write_text(WORDS * 50 + "語" + WORDS * 50)
    folder = make(tmp_path / "rare.txt", "x", tokenizer=characters)
    assert prepare.read_meta(folder)["lossless"] is False
    assert "warning" in capsys.readouterr().out
    for normalizer, lossless in (("Lowercase", None), ("NFC", False), ("Prepend", True)):
        engine = prepare.HFTokenizer.from_str(bpe.engine.to_str())
        options = [" "] if normalizer == "Prepend" else []
        engine.normalizer = getattr(normalizers, normalizer)(*options)
        engine.save(str(tmp_path / "n.json"))
        if lossless is None:
            fails(1, lambda: make(text_file, "n", tokenizer=str(tmp_path / "n.json")), "lost")
        else:
            folder = make(text_file, "n", tokenizer=str(tmp_path / "n.json"))
            assert prepare.read_meta(folder)["lossless"] is lossless


# ---------------------------------------------------------------------------------------------
# shards


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_concatenated_arrays_slice_as_one(lengths, data):
    """Every slice of the view is the slice of the concatenation, over any borders."""
    arrays = [np.arange(100 * i, 100 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)]
    joined, whole = prepare.ConcatTokens(arrays), np.concatenate(arrays)
    edge = st.none() | st.integers(-60, 60)
    window = slice(data.draw(edge), data.draw(edge))
    assert len(joined) == len(whole) and joined.dtype == whole.dtype
    assert joined[window].tolist() == whole[window].tolist()
    assert joined[window].dtype == np.uint16
    with pytest.raises(ValueError, match="step"):
        joined[::2]


@pytest.fixture
def sharded(make, documents, bpe, tmp_path):
    """documents prepared whole and in three shards with the same tokenizer: two folders."""
    bpe.engine.save(str(tmp_path / "t.json"))
    options = {"tokenizer": str(tmp_path / "t.json"), "val_fraction": 0.3}
    for i in (2, 0, 1):
        folder = make(documents, "parts", shard=f"{i}/3", **options)
    return make(documents, "whole", **options), folder


def test_shards_are_the_whole(sharded, documents, make, tmp_path, capsys):
    """Shards together hold each document once, in the split it has without shards."""
    whole, folder = sharded
    assert prepare.is_prepared(folder) and not prepare.is_prepared(folder.parent)
    assert sorted(p.name for p in folder.iterdir()) == [f"shard-00{i}-of-003" for i in range(3)]
    for split in SPLITS:
        assert sorted(texts_of(folder, split)) == sorted(texts_of(whole, split))
        assert isinstance(prepare.open_split(folder, split), prepare.ConcatTokens)
    meta, expected = prepare.read_meta(folder), prepare.read_meta(whole)
    same = [*prepare.COUNTS, "vocab_size", "eot_id", "tokenizer", "dtype", "source"]
    assert meta["settings"] == [*expected["settings"], 61]  # documents of all shards
    assert {k: meta[k] for k in same} == {k: expected[k] for k in same}
    assert prepare.load_tokenizer(folder).encode(HARD) == prepare.load_tokenizer(whole).encode(HARD)
    before = snapshot(folder)
    capsys.readouterr()
    make(documents, "parts", shard="1/3", tokenizer=str(tmp_path / "t.json"), val_fraction=0.3)
    assert snapshot(folder) == before and "nothing to do" in capsys.readouterr().out
    last = folder / "shard-002-of-003" / "meta.json"  # a resume must see another text in any shard
    other = json.loads(last.read_text("utf-8")) | {"source_sha256": "0"}
    last.write_text(json.dumps(other), "utf-8")
    assert prepare.read_meta(folder)["source_sha256"] != meta["source_sha256"]


def test_shards_that_do_not_fit(sharded, documents, make, tmp_path, fails):
    """A missing, foreign or differing shard would silently shorten or bend the data."""
    whole, folder = sharded
    one, away = folder / "shard-001-of-003", tmp_path / "away"
    one.rename(away)
    for read in (prepare.read_meta, prepare.load_tokenizer, lambda f: prepare.open_split(f, "val")):
        fails(1, lambda read=read: read(folder), "shard-001-of-003 is missing", "--shard=0/3")
    away.rename(one)
    options = {"tokenizer": str(tmp_path / "t.json")}
    make(documents, "parts", shard="0/2", **options)
    fails(1, lambda: prepare.open_split(folder, "train"), "belongs to other shards")
    runtime.remove(folder / "shard-000-of-002")
    make(documents, "parts", shard="1/3", val_fraction=0.5, **options)
    fails(1, lambda: prepare.read_meta(folder), "shard-001-of-003 has settings", "0.5", "0.3")
    make(documents, "parts", shard="1/3", val_fraction=0.3, **options)
    (documents / "0.txt").write_text("a file more: each slice has other ones")
    make(documents, "parts", shard="2/3", val_fraction=0.3, **options)
    fails(1, lambda: prepare.read_meta(folder), "shard-002-of-003 has settings", "62", "61")
    fails(1, lambda: make(documents, "whole", shard="0/3", **options), "without --shard")
    fails(1, lambda: make(documents, "x", shard="0/99", **options), "needs 99 documents", "62")


def test_hub_shards(make, hub, tmp_path, bpe):
    """Rows of a streamed data set: each in one shard, none twice, as few as one file on disk."""
    bpe.engine.save(str(tmp_path / "t.json"))
    for i in range(3):
        options = {"tokenizer": str(tmp_path / "t.json"), "shard": f"{i}/3"}
        folder = make(f"hf:{tmp_path / 'jsonl'}", val_fraction=0.3, **options)
    assert sorted(sum((texts_of(folder, split) for split in SPLITS), [])) == sorted(hub)


# ---------------------------------------------------------------------------------------------
# speed and memory


def test_starts_at_once(run):
    """--help must not import torch, nor must prepare.py itself: it runs on bare machines."""
    result = run("prepare.py", "--help")
    assert result.returncode == 0 and "--val_fraction FLOAT" in result.stdout
    code = "import sys, prepare; assert not {'torch', 'transformers', 'datasets'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


MEMORY = """
    import resource, sys
    sys.path[:0] = {paths!r}
    import pytest, prepare, test_prepare
    test_prepare.byte_level(pytest.MonkeyPatch())
    prepare.main(prepare.Config("d", sys.argv[1], "gpt2"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB")
def test_memory_does_not_grow(tmp_path):
    """Ten times the text, the same peak: nothing may hold the corpus, its tokens or a queue."""
    code = textwrap.dedent(MEMORY).format(paths=[str(ROOT), str(ROOT / "tests")])
    peaks = []
    for megabytes in (6, 60):
        with open(tmp_path / "text.txt", "w", encoding="utf-8") as f:
            for _ in range(megabytes):
                f.write((WORDS * 17_000)[:900_000] + "\n")
        command = [sys.executable, "-c", code, "text.txt"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        peaks.append(int(result.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 40
