"""What several test files share: the scripts on sys.path, running one, what may be missing."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from runtime import UserError

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only gets in the way
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bit for bit holds on CPUs; "0" shows a GPU
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reached for the network would fail at once

SHARED = Path(os.environ.get("SHARED_DATA_DIR", "/nowhere"))
CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR", Path(tempfile.gettempdir(), "data-gym-cache")))
GPT2_FILES = (  # tiktoken's names for vocab.bpe and encoder.json
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
)
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="SHARED_DATA_DIR names no folder with the-verdict.txt"
)
needs_gpt2 = pytest.mark.skipif(
    not all((CACHE / name).is_file() for name in GPT2_FILES),
    reason="TIKTOKEN_CACHE_DIR holds no GPT-2 vocabulary",
)


@pytest.fixture
def run(tmp_path):
    """run("prepare.py", "--dataset=x", ...) -> the CompletedProcess, started in tmp_path."""

    def run(script, *args, cwd=tmp_path, env=(), timeout=120, **more):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        env = {**os.environ, **dict(env)}
        more = {"capture_output": True, "text": True, "encoding": "utf-8"} | more
        return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, **more)

    return run


def one_line(stderr, *words):
    """`stderr` is one line that starts with 'error: ' and holds all of `words`."""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]}"


@pytest.fixture
def fails():
    """fails(code, function, *words): calling it raises a UserError of `code` in one line that holds
    all of `words`."""

    def fails(code, function, *words):
        with pytest.raises(UserError) as stop:
            function()
        assert stop.value.code == code, stop.value
        one_line(f"error: {stop.value}", *words)

    return fails


def snapshot(folder):
    """Every path below `folder` with its content and time of change."""
    paths = sorted(Path(folder).rglob("*"))
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None
        for p in paths
    }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A prepared character data set, "tiny", of about 40 kB of real prose and code."""
    import prepare

    folder = tmp_path_factory.mktemp("data")
    text = Path(json.__file__).read_text("utf-8") + Path(os.__file__).read_text("utf-8")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    source = str(folder / "text.txt")
    prepare.main(prepare.Config("tiny", source=source, tokenizer="char", data_dir=str(folder)))
    return folder


def loopback_works():
    """Whether this machine can talk to itself (not so under `unshare -rn`)."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError:
        return False
    return True


def pytest_collection_modifyitems(items):
    """Skip tests marked network_loopback where there is none."""
    if loopback_works():
        return
    for item in items:
        if item.get_closest_marker("network_loopback"):
            item.add_marker(pytest.mark.skip(reason="the loopback interface is down"))
