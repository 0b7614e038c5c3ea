"""prepare.py: every byte comes back, nothing is left half-written, bad input ends in one line."""

import errno
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from conftest import ROOT, SHARED, needs_gpt2, needs_shared, one_line, snapshot
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

import prepare
import runtime

SPLITS = ("train", "val")
HARD = (  # what loses bytes in careless code: see test_every_byte_comes_back
    "\ufeffƏdəbiyyat: ağ, ığ, ö, şən, çöl — <|endoftext|> is text\r\nline\rline\n\n\n"
    "  don't \t🙂👩‍👩‍👧 e\u0301 \u200b\u3000中文。\x00\x1c\x7f [UNK] <s> ▁Ġ 1234567 ﬁ\r\n"
)
WORDS = "Güllər açdı, quşlar oxudu; hər kəs sevindi və yola düşdü. "


@pytest.fixture
def make(tmp_path):
    """make(source, **options) -> the folder that prepare.main wrote."""

    def make(source, dataset="d", **options):
        options.setdefault("tokenizer", "char")
        options.setdefault("data_dir", str(tmp_path / "data"))
        prepare.main(prepare.Config(dataset, str(source), **options))
        return Path(options["data_dir"], dataset)

    return make


@pytest.fixture
def text_file(tmp_path):
    """A text of a few thousand characters."""
    path = tmp_path / "text.txt"
    path.write_bytes((HARD + WORDS * 50).encode())
    return path


@pytest.fixture
def documents(tmp_path):
    """60 documents in a folder; their texts."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"document {i}\n" + WORDS * (i % 5), encoding="utf-8")
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    """So many pieces that their borders and their order matter."""
    monkeypatch.setattr(prepare, "PIECE", 64)


@pytest.fixture(scope="module")
def bpe():
    """A small BPE, trained as prepare.py trains one."""
    cfg = prepare.Config("d", "x", "bpe", 300)
    return prepare.make_tokenizer(cfg, lambda: [HARD + WORDS * 20], None)


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
    assert (folder / "tokenizer.json").exists() == (tokenizer != "gpt2")


@needs_shared
@needs_gpt2
def test_the_verdict(make):
    """The figures the book prints for this text."""
    source = SHARED / "the-verdict.txt"
    text = source.read_bytes().decode()
    folder = make(source, tokenizer="gpt2")
    tokenizer = prepare.load_tokenizer(folder)
    assert len(text) == 20_479 and len(tokenizer.encode(text)) == 5_145
    assert tokenizer.decode(tokens(folder, "train")) == text[:18_431]
    assert tokenizer.decode(tokens(folder, "val")) == text[18_431:]
    windows = [(len(tokens(folder, split)) - 1) // 256 for split in SPLITS]
    assert windows == [4_608 // 256, 512 // 256]


@given(st.text())
@example("\r\n\r")
@example("\ufeff<|endoftext|>")
def test_bpe_round_trip(bpe, text):
    """Any text, the tokens in range and the end-of-text token never among them."""
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= i < bpe.vocab_size and i != bpe.eot_id for i in ids)


@given(st.text(alphabet=sorted(set(HARD + WORDS))))
def test_char_round_trip(text):
    """One token a character."""
    if not hasattr(test_char_round_trip, "tokenizer"):
        cfg = prepare.Config("d", "x", "char")
        test_char_round_trip.tokenizer = prepare.make_tokenizer(cfg, lambda: [HARD + WORDS], None)
    ids = test_char_round_trip.tokenizer.encode(text)
    assert len(ids) == len(text) and test_char_round_trip.tokenizer.decode(ids) == text


@needs_gpt2
@given(st.text())
@example("<|endoftext|>")
def test_gpt2_round_trip(text):
    """tiktoken refuses the text <|endoftext|> unless told that it is text."""
    tokenizer = prepare.open_tiktoken("gpt2")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eot_id not in ids


@pytest.mark.parametrize("characters, dtype", [(65_535, "uint16"), (65_536, "uint32")])
def test_dtype_follows_the_vocabulary(make, tmp_path, characters, dtype):
    """One token more than 65,536 does not fit 16 bits: ids would wrap around silently."""
    (tmp_path / "wide.txt").write_text("".join(map(chr, range(0x10000, 0x10000 + characters))))
    folder = make(tmp_path / "wide.txt")
    assert tokens(folder, "val").dtype == dtype
    assert text_of(folder) == (tmp_path / "wide.txt").read_text()
    assert tokens(folder, "val").max() == characters - 1


FRAGMENTS = [*" .,'/_-=\n\r\t9xƏ中🙂\u3000\xa0\x1c\u0301", "  ", "\r\n", "\n\n", "'s", "'LL", "123",
             "...", "https://", "<|endoftext|>", "\n/", " \n ", "Ab", "\ufeff"]  # fmt: skip


@st.composite
def adversarial(draw):
    """Text that tokenizers split in odd places, with a word and a space now and then."""
    groups = st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), max_size=20)
    return "word ".join(draw(groups))


def encoding_patterns():
    """name -> the regular expression that splits text, for every encoding of tiktoken."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, name, lambda *args, **kwargs: {})
        makers = openai_public.ENCODING_CONSTRUCTORS
        return {make()["pat_str"] for make in makers.values()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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


PATTERNS = encoding_patterns()


@needs_gpt2
@settings(max_examples=50)
@given(text=adversarial())
def test_pieces_have_the_tokens_of_the_whole(text):
    """The same, through tiktoken itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", 40)
        pieces = list(prepare.read_pieces(io.StringIO(text, newline="")))
    tokenizer = prepare.open_tiktoken("gpt2")
    assert sum((tokenizer.encode(piece) for piece in pieces), []) == tokenizer.encode(text)


def test_text_without_a_place_to_cut(make, tmp_path, small_pieces):
    """One endless word must neither be gathered whole in memory nor lose a character."""
    (tmp_path / "dna.txt").write_text("acgt" * 5000)
    assert text_of(make(tmp_path / "dna.txt")) == "acgt" * 5000
    lengths = [len(p) for p in prepare.read_pieces(io.StringIO("acgt" * 5000))]
    assert max(lengths) <= 5 * prepare.PIECE


def test_threads_keep_the_order():
    """Results that come when they are ready would shuffle the text; all at once fill memory."""
    started = []

    def slow_first(i):
        started.append(i)
        threading.Event().wait(0.02 if i % 3 == 0 else 0)
        return i

    seen = []
    for i in prepare.in_order(slow_first, range(40), 4):
        seen.append(i)
        assert max(started) - i <= 8
    assert seen == list(range(40))


def test_sample_is_bounded_and_spread(monkeypatch):
    """A BPE trained on the head of a corpus, or on all of it, is what sampling prevents."""
    monkeypatch.setattr(prepare, "SAMPLE", 1000)
    taken = list(prepare.sample((f"{i:010}" for i in range(1000)), 10_000))
    assert 800 <= sum(map(len, taken)) <= 1010 and int(taken[-1]) > 900
    endless = prepare.sample(iter(lambda: "0123456789", None), None)
    assert sum(map(len, endless)) <= 1010


# ---------------------------------------------------------------------------------------------
# sources


def test_documents_go_whole_to_one_split(make, documents, small_pieces):
    """Half of a document in each split would let validation see its training text."""
    (documents / "empty.txt").touch()
    folder = make(documents)
    texts = {split: texts_of(folder, split) for split in SPLITS}
    wanted = [p.read_text(encoding="utf-8") for p in sorted(documents.glob("[0-9]*.txt"))]
    assert sorted(texts["train"] + texts["val"]) == sorted(wanted)
    assert texts["train"] == [t for t in wanted if t in texts["train"]], "out of order"
    assert 1 <= len(texts["val"]) <= 15


def test_split_depends_on_the_text_alone(make, documents):
    """A split by name, place or number of documents moves text into validation after training."""
    before = set(texts_of(make(documents), "val"))
    for path in sorted(documents.glob("*.txt"))[::-1]:
        path.rename(documents / f"{int(path.stem) * 7 % 61:03}-renamed.md")
    (documents / "another.md").write_text("one more")
    assert set(texts_of(make(documents, "renamed"), "val")) - {"one more"} == before


def test_two_documents_have_a_validation_split(make, tmp_path):
    """A tenth of two documents is none: the folder of a beginner would be refused."""
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    folder = make(str(tmp_path / "?.txt"))
    assert [len(texts_of(folder, split)) for split in SPLITS] == [1, 1]


def test_folder_and_glob(tmp_path):
    """Folders give .txt and .md at any depth, globs what they match, in one order everywhere."""
    for name in ("b.txt", "a/c.MD", "a/d.py", "e.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = lambda source: [p.relative_to(tmp_path).as_posix() for p in  # noqa: E731
                            prepare.source_files(str(source), tmp_path)]  # fmt: skip
    assert names(tmp_path) == ["a/c.MD", "b.txt"]
    assert names(tmp_path / "**/*.py") == ["a/d.py"]
    assert names(tmp_path / "e.json") == ["e.json"]


def test_stdlib_is_real_and_readable():
    """The offline default: code of this Python, without tests and installed packages."""
    files = prepare.source_files("stdlib", "unused")
    names = {p.name for p in files}
    assert len(files) > 300 and {"argparse.py", "json", "ast.py"} - names == {"json"}
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(p.parts) for p in files)
    for path in files:
        path.read_text(encoding="utf-8")


@pytest.fixture
def hub(tmp_path):
    """A folder with 40 rows of text as jsonl, another with the same as parquet; the texts."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": i, "text": f"sətir {i}\r\n{WORDS}", "title": f"t{i}"} for i in range(40)]
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
        assert (folders[0] / f"{split}.npy").read_bytes() == (
            folders[1] / f"{split}.npy"
        ).read_bytes()
    titles = make(f"hf:{tmp_path / 'jsonl'}::title", "titles")
    assert "t7" in sum((texts_of(titles, split) for split in SPLITS), [])
    fails(2, lambda: make(f"hf:{tmp_path / 'jsonl'}::body", "x"), "'body'", "id, text, title")
    fails(2, lambda: make(f"hf:{tmp_path / 'jsonl'}::id", "x"), "no text column 'id'")
    fails(1, lambda: make(f"hf:{tmp_path / 'nothing'}", "x"), "nothing", "--dataset=stdlib")
    fails(1, lambda: make(f"hf:{tmp_path / 'jsonl'}:nope", "x"), "nope")
    assert not (tmp_path / "data/x").exists()


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
                status = 200
            self.send_response(200 if status == "truncate" else status)
            self.send_header("Content-Length", str(len(body)))
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


def test_download(make, server, tmp_path, monkeypatch, capsys):
    """A busy server is asked again; what is there is not fetched twice; its size is shown."""
    server.answers = iter([503, 503])
    folder = make(f"{server.url}/dir/text.txt")
    assert text_of(folder) == WORDS * 2000 and len(server.asked) == 3
    raw = list(folder.glob("raw-*"))
    assert len(raw) == 1 and raw[0].name.endswith("-text.txt")
    assert f"{raw[0].stat().st_size:,} bytes" in capsys.readouterr().out
    make(f"{server.url}/dir/text.txt", val_fraction=0.2)
    assert len(server.asked) == 3


def test_failed_download_leaves_nothing(make, server, tmp_path, fails):
    """Half a file kept as if it were whole would train half a model for ever after."""
    for answer, word in ((404, "404"), ("truncate", "ChunkedEncodingError")):
        server.answers = iter([answer])
        url = f"{server.url}/text.txt"
        fails(1, lambda url=url: make(url), url, word, "raw-", "--dataset=stdlib")
        assert snapshot(tmp_path) == {}
    server.server_close()
    server.shutdown()
    closed = f"http://127.0.0.1:{server.server_port}/x"
    fails(1, lambda: make(closed), closed)


def test_checksum(make, server, monkeypatch, fails):
    """Another text under a preset's name must not pass for the preset."""
    right = hashlib.sha256(WORDS.encode() * 2000).hexdigest()
    for name, checksum in (("good", right), ("bad", "0" * 64)):
        preset = (f"{server.url}/{name}", "char", None, checksum)
        monkeypatch.setitem(prepare.PRESETS, name, preset)
    data = lambda name: prepare.main(prepare.Config(name, data_dir=str(folder)))  # noqa: E731
    folder = make(f"{server.url}/x").parent
    data("good")
    assert prepare.read_meta(folder / "good")["source_sha256"] == right
    fails(1, lambda: data("bad"), "SHA-256", right, "delete it")
    assert not list((folder / "bad").glob("*.npy"))


@pytest.mark.parametrize("path", ["/%2e%2e/%2e%2e/up", "/a/..", "/..\\..\\up", "/" + "x" * 4000])
def test_download_stays_in_its_folder(make, server, tmp_path, path):
    """The last part of a URL becomes a file name: it may not lead out of the folder."""
    folder = make(server.url + path)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
    assert {p.parent for p in files} == {folder}


# ---------------------------------------------------------------------------------------------
# again, killed, twice at once, no space


def test_second_run_does_nothing(make, text_file, capsys):
    """Preparing a day's corpus again because the command was repeated wastes a day."""
    folder = make(text_file)
    before = snapshot(folder)
    capsys.readouterr()
    make(text_file)
    assert snapshot(folder) == before and "nothing to do" in capsys.readouterr().out
    make(text_file, val_fraction=0.3)
    assert len(tokens(folder, "val")) > 2 * before["val.npy"][0].__len__() // 6
    text_file.write_text("another text")
    make(text_file)
    assert text_of(folder) == "another text"


def test_new_data_takes_the_old_tokenizer_away(make, text_file, bpe, tmp_path):
    """A tokenizer.json beside data of another tokenizer would be copied into checkpoints."""
    folder = make(text_file, tokenizer="bpe", vocab_size=300)
    byte_level(pytest.MonkeyPatch())
    make(text_file, tokenizer="gpt2")
    assert not (folder / "tokenizer.json").exists()
    assert prepare.read_meta(folder)["tokenizer"] == "gpt2"


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
    new = tmp_path / "new.txt"
    new.write_text(WORDS)
    old_text, new_text = text_file.read_bytes().decode(), WORDS
    options = [f"--source={new}", "--tokenizer=char", "--dataset=d", "--data_dir=data"]
    outcomes = set()
    for steps in range(30):
        if before == "old data":
            folder = make(text_file, tokenizer="char")
        command = [sys.executable, script, str(steps), *options]
        code = subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
        folder = tmp_path / "data/d"
        whole = (folder / "meta.json").exists()
        outcomes.add(text_of(folder) if whole else "none")
        assert text_of(folder) in (old_text, new_text) if whole else True
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and steps > 6 and not list(folder.glob(".tmp-*"))
    assert outcomes == {"none", new_text} | ({old_text} if before == "old data" else set())


def test_two_at_once_and_interrupt(run, server, tmp_path):
    """Two that write the same files would mix them; Ctrl-C must not print a traceback."""
    server.answers = iter(["stall"])
    options = [f"--source={server.url}/t", "--dataset=d", "--tokenizer=char"]
    command = [sys.executable, str(ROOT / "prepare.py"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, cwd=tmp_path, **pipes)
    assert server.stalled.wait(60)
    second = run("prepare.py", *options)
    assert second.returncode == 1
    one_line(second.stderr, "another run is writing into", "data/d")
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130
    one_line(err, "interrupted")
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
def test_no_space(run, make, tmp_path, text_file):
    """The disk fills up in the middle: one line, and the data that was there is as it was."""
    import resource

    folder = make(text_file)
    before = snapshot(folder)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    (tmp_path / "long.txt").write_text(WORDS * 500)
    options = ["--dataset=d", "--source=long.txt", "--tokenizer=char"]
    result = run("prepare.py", *options, preexec_fn=limit)
    assert result.returncode == 1
    one_line(result.stderr, "data/d", os.strerror(errno.EFBIG), "as it was")
    assert snapshot(folder) == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_error(make, text_file, tmp_path, monkeypatch, fails, step):
    """An error of the disk while flushing or renaming is one line too."""

    def broken(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), broken)
    before = snapshot(tmp_path)
    fails(1, lambda: make(text_file), "No space left", str(tmp_path / "data/d"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["/dev/null", "/proc/self"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_unwritable_folder(make, text_file, fails, place):
    """A place that cannot be written is named before any work."""
    fails(1, lambda: make(text_file, data_dir=place), f"cannot write into {place}/d")


# ---------------------------------------------------------------------------------------------
# bad input: one line, the promised code, nothing on disk changed


def bad_utf8(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(WORDS.encode() * 100 + "ş".encode("iso-8859-9"))
    return len(WORDS.encode() * 100)


BAD = {  # name: (options, exit code, words of the line)
    "no such file": ({"source": "none.txt"}, 1, ["none.txt", "no such file", "stdlib, verdict"]),
    "no such glob": ({"source": "*.nope"}, 1, ["*.nope"]),
    "folder without text": ({"source": "folder"}, 1, ["folder", "**/*.py"]),
    "empty file": ({"source": "empty.txt"}, 1, ["empty.txt is empty"]),
    "empty files": ({"source": "empty*.txt"}, 1, ["empty*.txt is empty"]),
    "not UTF-8": ({"source": "latin1.txt"}, 1, ["latin1.txt", "0xfe at offset", "iconv"]),
    "not UTF-8, bpe": ({"source": "latin1.txt", "tokenizer": "bpe"}, 1, ["0xfe at offset"]),
    "not UTF-8, document": ({"source": "*.txt"}, 1, ["latin1.txt", "0xfe at offset"]),
    "vocabulary too large": (
        {"tokenizer": "bpe", "vocab_size": 50_000}, 1, ["50000", "use --vocab_size ", "more text"]),
    "vocabulary too small": ({"tokenizer": "bpe", "vocab_size": 256}, 2, ["256", "257"]),
    "vocabulary zero": ({"tokenizer": "bpe", "vocab_size": 0}, 2, ["--vocab_size 0", "257"]),
    "vocabulary absurd": ({"tokenizer": "bpe", "vocab_size": 10**15}, 2, ["1048576"]),
    "vocabulary of gpt2": ({"tokenizer": "gpt2", "vocab_size": 300}, 2, ["goes with", "gpt2"]),
    "val too short": ({"source": "tiny.txt"}, 1, ["val split has 1 token", "--val_fraction"]),
    "train too short": (
        {"source": "tiny.txt", "val_fraction": 0.9}, 1, ["train split", "0.9"]),
    "unknown tokenizer": ({"tokenizer": "gpt9"}, 2, ["gpt9", "gpt2", "cl100k_base", "bpe"]),
    "no tokenizer file": ({"tokenizer": "no.json"}, 1, ["no.json", "No such file"]),
    "folder without tokenizer": ({"tokenizer": "folder"}, 1, ["tokenizer.json", "No such file"]),
    "broken tokenizer": ({"tokenizer": "broken.json"}, 1, ["broken.json cannot be read"]),
    "binary tokenizer": ({"tokenizer": "binary.json"}, 1, ["binary.json cannot be read"]),
    "no end-of-text": ({"tokenizer": "no-end.json"}, 1, ["no-end.json", "<|endoftext|>"]),
    "name ..": ({"dataset": ".."}, 2, ["'..'", "plain folder name"]),
    "name a/b": ({"dataset": "a/b"}, 2, ["'a/b'"]),
    "name a\\b": ({"dataset": "a\\b"}, 2, ["a\\\\b"]),
    "name empty": ({"dataset": ""}, 2, ["''"]),
    "name absolute": ({"dataset": "/tmp"}, 2, ["'/tmp'"]),
    "name dotted": ({"dataset": ".hidden"}, 2, ["'.hidden'"]),
    "name a..b": ({"dataset": "a..b"}, 2, ["'a..b'"]),
    "name newline": ({"dataset": "a\n"}, 2, ["'a\\n'"]),
    "no source": ({"source": None}, 2, ["mine", "--source PATH"]),
    "val_fraction 0": ({"val_fraction": 0.0}, 2, ["--val_fraction 0.0"]),
    "val_fraction 1": ({"val_fraction": 1.0}, 2, ["--val_fraction 1.0"]),
    "val_fraction nan": ({"val_fraction": float("nan")}, 2, ["--val_fraction nan"]),
    "shard of one text": ({"shard": "0/2", "tokenizer": "t.json"}, 1, ["needs 2 documents", "1"]),
    "shard 2/2": ({"shard": "2/2", "tokenizer": "t.json"}, 2, ["--shard 2/2", "0/4"]),
    "shard words": ({"shard": "first", "tokenizer": "t.json"}, 2, ["--shard first"]),
    "shard -1/2": ({"shard": "-1/2", "tokenizer": "t.json"}, 2, ["--shard -1/2"]),
    "shard with bpe": ({"shard": "0/2", "tokenizer": "bpe"}, 2, ["--tokenizer=bpe"]),
    "endless name": ({"source": "x" * 5000}, 1, ["name too long"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch, fails, bpe):
    """Each is one line that names the value and the remedy, and leaves the disk as it was."""
    monkeypatch.chdir(tmp_path)
    bad_utf8(tmp_path)
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
    assert snapshot(tmp_path) == before


def test_offset_of_the_bad_byte(tmp_path, make, fails):
    """The offset leads to the byte, wherever it lies in the file."""
    for before in (b"", b"x" * 8191, "ə".encode() * 4096, b"y" * 400_000):
        (tmp_path / "t.txt").write_bytes(before + b"\xff" + b"z" * 9000)
        fails(1, lambda: make(tmp_path / "t.txt"), f"0xff at offset {len(before)};")
    (tmp_path / "t.txt").write_bytes(b"cut off \xc9")
    fails(1, lambda: make(tmp_path / "t.txt"), "0xc9 at offset 8;")


def test_bad_command_lines(run, tmp_path):
    """The same through the real command line, where a traceback would show."""
    for options, code, words in (
        (["--vocab_sizes=3"], 2, ["--vocab_sizes", "Perhaps you meant", "--vocab_size"]),
        (["--val_fraction=much"], 2, ["--val_fraction", "'much'"]),
        (["--dataset=../up"], 2, ["'../up'"]),
        (["mine"], 2, ["'mine'", "not there"]),
        (["--source=none.txt", "--dataset=m"], 1, ["none.txt"]),
    ):
        result = run("prepare.py", *options)
        assert result.returncode == code and not result.stdout
        one_line(result.stderr, *words)
    assert snapshot(tmp_path) == {}


def test_tokenizer_that_cannot_be_downloaded(run, text_file, tmp_path):
    """No network and no vocabulary: say how to go on without them."""
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    options = ["--tokenizer=gpt2", f"--source={text_file}", "--dataset=d"]
    result = run("prepare.py", *options, env={**env, "https_proxy": env["HTTPS_PROXY"]})
    assert result.returncode == 1
    one_line(result.stderr, "gpt2", "TIKTOKEN_CACHE_DIR", "--tokenizer=bpe")


# ---------------------------------------------------------------------------------------------
# data and tokenizers that others made


@pytest.mark.parametrize("content", [
    b"\xff\xfe{}", b"", b"[]", b"null", b"{}", b'{"tokenizer": 7}', b"[" * 100_000,
    b'{"vocab_size": Infinity}', b'"format_version": 2',
])  # fmt: skip
def test_bad_meta_json(make, text_file, fails, content):
    """A damaged or foreign meta.json is named by every reader, prepare.py among them."""
    folder = make(text_file)
    good = (folder / "meta.json").read_text()
    if b":" in content:  # one value of a good file is replaced
        key, value = content.decode().strip("{}").split(": ")
        content = re.sub(rf"{key}: [^,]+", f"{key}: {value}", good).encode()
    (folder / "meta.json").write_bytes(content)
    before = snapshot(folder)
    for reader in (prepare.read_meta, prepare.load_tokenizer, lambda f: make(text_file)):
        fails(1, lambda reader=reader: reader(folder), "meta.json cannot be read", "again")
    assert snapshot(folder) == before


def test_damaged_tokens(make, text_file, fails):
    """A cut-off or missing train.npy is found when it is opened, not after an hour."""
    folder = make(text_file)
    whole = (folder / "train.npy").read_bytes()
    other = io.BytesIO()
    np.save(other, np.zeros(7, np.uint16))
    for content in (whole[:-1000], whole[:20], b"", other.getvalue(), None):
        (folder / "train.npy").unlink()
        if content is not None:
            (folder / "train.npy").write_bytes(content)
        fails(1, lambda: prepare.open_split(folder, "train"), "train.npy is damaged", "again")
        fails(1, lambda: make(text_file), "train.npy is damaged")
        (folder / "train.npy").touch()


def test_tokenizer_name_cannot_leave_its_folder(make, text_file, tmp_path, fails):
    """A stranger's meta.json may not name a file elsewhere."""
    folder = make(text_file)
    (folder / "tokenizer.json").rename(tmp_path / "secret.json")
    meta = (folder / "meta.json").read_text().replace("tokenizer.json", "../../secret.json")
    (folder / "meta.json").write_text(meta)
    fails(1, lambda: prepare.load_tokenizer(folder), str(folder / "secret.json"))


def test_tokenizer_file(make, text_file, bpe, tmp_path):
    """A file's own truncation and padding would cut the text; a gap in its ids would make
    vocab_size too small for the embedding. A folder is as good as the file in it."""
    bpe.engine.save(str(tmp_path / "tokenizer.json"))
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    said["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst",
                          "stride": 0}  # fmt: skip
    said["model"]["vocab"]["extra"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    folder = make(text_file, tokenizer=str(tmp_path))
    assert text_of(folder).encode() == text_file.read_bytes()
    assert prepare.read_meta(folder)["vocab_size"] == 1000
    bpe.engine.save(str(tmp_path / "tokenizer.json"))  # another tokenizer: not "nothing to do"
    make(text_file, tokenizer=str(tmp_path))
    assert prepare.read_meta(folder)["vocab_size"] == 300


def test_folder_named_as_an_encoding(make, text_file, tmp_path, monkeypatch):
    """A folder gpt2/ with weights in it must not hide the encoding gpt2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    byte_level(monkeypatch)
    assert prepare.read_meta(make(text_file, tokenizer="gpt2"))["tokenizer"] == "gpt2"


def byte_level(monkeypatch):
    """gpt2 without its vocabulary: 256 bytes and the end-of-text token."""
    ranks = {bytes([i]): i for i in range(256)}
    pattern = openai_public.r50k_pat_str
    engine = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                               special_tokens={prepare.END_OF_TEXT: 256})  # fmt: skip
    monkeypatch.setattr(prepare.tiktoken, "get_encoding", lambda name: engine)


# ---------------------------------------------------------------------------------------------
# shards


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_joined_arrays_slice_as_one(lengths, data):
    """Every slice of the view is the slice of the concatenation, over any borders."""
    arrays = [np.arange(100 * i, 100 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)]
    joined, whole = prepare.Joined(arrays), np.concatenate(arrays)
    edge = st.none() | st.integers(-60, 60)
    place = slice(data.draw(edge), data.draw(edge))
    assert len(joined) == len(whole) and joined.dtype == whole.dtype
    assert joined[place].tolist() == whole[place].tolist()
    assert joined[place].dtype == np.uint16
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
    assert sorted(p.name for p in folder.iterdir()) == [f"shard-00{i}-of-003" for i in range(3)]
    for split in SPLITS:
        assert sorted(texts_of(folder, split)) == sorted(texts_of(whole, split))
        assert isinstance(prepare.open_split(folder, split), prepare.Joined)
    meta, expected = prepare.read_meta(folder), prepare.read_meta(whole)
    same = [*prepare.COUNTS, "vocab_size", "eot_id", "tokenizer", "dtype", "source", "settings"]
    assert {k: meta[k] for k in same} == {k: expected[k] for k in same}
    assert prepare.load_tokenizer(folder).encode(HARD) == prepare.load_tokenizer(whole).encode(HARD)
    before = snapshot(folder)
    capsys.readouterr()
    make(documents, "parts", shard="1/3", tokenizer=str(tmp_path / "t.json"), val_fraction=0.3)
    assert snapshot(folder) == before and "nothing to do" in capsys.readouterr().out


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
    fails(1, lambda: prepare.open_split(folder, "train"), "no shard of the others")
    for path in [*(folder / "shard-000-of-002").iterdir(), folder / "shard-000-of-002"]:
        path.rmdir() if path.is_dir() else path.unlink()
    make(documents, "parts", shard="1/3", val_fraction=0.5, **options)
    fails(1, lambda: prepare.read_meta(folder), "shard-001-of-003 has settings", "0.5", "0.3")
    fails(1, lambda: make(documents, "whole", shard="0/3", **options), "without --shard")
    fails(1, lambda: make(documents, "x", shard="0/99", **options), "needs 99 documents", "60")


def test_hub_shards(make, hub, tmp_path, bpe):
    """Rows of a streamed data set: each in one shard, none twice, as few as one file on disk."""
    bpe.engine.save(str(tmp_path / "t.json"))
    for i in range(3):
        options = {"tokenizer": str(tmp_path / "t.json"), "shard": f"{i}/3"}
        folder = make(f"hf:{tmp_path / 'jsonl'}", val_fraction=0.3, **options)
    assert sorted(sum((texts_of(folder, split) for split in SPLITS), [])) == sorted(hub)


def test_two_shards_at_once(run, documents, bpe, tmp_path):
    """Shards are made by processes that do not know of each other: no common lock."""
    (tmp_path / "data/d").mkdir(parents=True)
    lock = runtime.lock_folder(tmp_path / "data/d/shard-000-of-002")
    bpe.engine.save(str(tmp_path / "t.json"))
    options = ["--dataset=d", f"--source={documents}", "--tokenizer=t.json"]
    assert run("prepare.py", *options, "--shard=1/2").returncode == 0
    one_line(run("prepare.py", *options, "--shard=0/2").stderr, "another run")
    lock.release()


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
    for megabytes in (10, 100):
        with open(tmp_path / "text.txt", "w", encoding="utf-8") as f:
            for _ in range(megabytes):
                f.write((WORDS * 17_000)[:900_000] + "\n")
        command = [sys.executable, "-c", code, "text.txt"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        peaks.append(int(result.stdout.split()[-1]))
    print(f"peak of 10 and 100 MB: {peaks} MB")
    assert peaks[1] - peaks[0] < 60
