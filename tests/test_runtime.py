"""runtime.py: errors, run folder, checkpoints, signals, log."""

import builtins
import errno
import hashlib
import io
import json
import math
import os
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import one_line, snapshot
from safetensors import SafetensorError

import convert
import runtime
import sample
import train
from runtime import UserError

# ---------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("error, code", [
    (UserError("no\r\n  such x", 2), 2), (UserError("no"), 1),
    (PermissionError(errno.EACCES, "no permission", "out"), 1),
    (OSError(errno.ENOSPC, "no room"), 1), (BrokenPipeError(errno.EPIPE, "no reader"), 1)])
def test_a_script_says_one_line(capsys, error, code):
    """Would catch a traceback, a message of two lines, and a code that says success."""
    with pytest.raises(SystemExit) as stop:
        runtime.run_script(lambda cfg: (_ for _ in ()).throw(error), None)
    assert stop.value.code == code
    one_line(capsys.readouterr().err, "no")
    for bug in (ZeroDivisionError("x"), FileNotFoundError(errno.ENOENT, "x")):  # a forker's
        with pytest.raises(type(bug)):
            runtime.run_script(lambda cfg, bug=bug: (_ for _ in ()).throw(bug), None)


@pytest.mark.parametrize("env", [
    {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "3"}, {"RANK": "0"}])
def test_a_part_of_torchruns_environment(monkeypatch, capsys, env):
    """RANK=1 alone once ended with code 2 and not a word; WORLD_SIZE alone in a traceback."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        runtime.run_script(lambda cfg: runtime.make_accelerator("no"), None)
    assert stop.value.code == 1
    one_line(capsys.readouterr().err, "RANK", "WORLD_SIZE", "torchrun")


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, pytest.param(10**400, id="large")])
def test_check_range(fails, value):
    """nan passes every comparison that is written the wrong way round."""
    cfg = SimpleNamespace(a=1, b=value, c=None)
    fails(2, lambda: runtime.check_range(cfg, 1, "a", "c", "b", high=9), "--b", str(value)[:20])
    runtime.check_range(SimpleNamespace(a=1, b=10**400), 0, "a")
    if value == 10**400:
        runtime.check_range(cfg, 1, "b")  # a large whole number is no infinity


def test_a_choice_that_is_none(fails):
    """A notebook's Config(optimizer="sgd") was trained with AdamW without a word."""
    fails(2, lambda: train.check_config(train.Config(optimizer="sgd")), "--optimizer 'sgd'", "muon")
    fails(2, lambda: train.check_config(train.Config(init="gpt3")), "--init 'gpt3'", "local")
    fails(2, lambda: sample.check_config(sample.Config(quantize="int3")), "'int3'", "int8")
    fails(2, lambda: convert.main(convert.Config("run", "to", format="onnx")), "'onnx'", "gguf")


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("The size of tensor a (7) must match the size of tensor b (5)"),
    RuntimeError(), ValueError("cos error"), AssertionError(), UserError("ten in a row")])
def test_no_disk_error_passes(tmp_path, error):
    """Would catch 'cannot write into out/x' for a bug in the model, and an IndexError for an
    exception that has no text."""
    with pytest.raises(type(error)) as stop, runtime.disk_errors(tmp_path):
        raise error
    assert stop.value is error


@pytest.mark.parametrize("error, reason", [
    (OSError(28, "No space left on device"), "No space left"),
    (PermissionError(13, "Permission denied"), "Permission denied"), (OSError(), "OSError"),
    (SafetensorError('Io Error: "No space (os error 28)'), "os error 28"),  # it is no OSError
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "No space left"),
    (Exception("No space left on device (os error 28)"), "No space left")])
def test_disk_errors_are_one_line(tmp_path, fails, error, reason):
    """Would catch a traceback for a full disk."""

    def write():
        with runtime.disk_errors(tmp_path):
            raise error

    fails(1, write, "cannot write into", str(tmp_path), reason)


# ---------------------------------------------------------------------------------------------
# one update


def test_seeds_are_all_different():
    """Would catch dropout that repeats itself on another process or in another iteration."""
    seeds = {runtime.derive_seed(s, i, r) for s in (0, 1337) for i in range(99) for r in range(3)}
    assert len(seeds) == 2 * 99 * 3 and max(seeds) < 2**32
    assert runtime.derive_seed(5, 3, 1) == runtime.derive_seed(5, 3, 1)


def test_ten_bad_updates_in_a_row(fails):
    """Would catch a count of all bad updates where one of those in a row is promised."""
    bad = runtime.BadUpdates(skipped=3)
    for iteration in range(50):
        assert bad.count(finite=iteration % 10 == 0, iteration=iteration) == (iteration % 10 != 0)
    fails(1, lambda: bad.count(False, 50), "iteration 50", "10 updates", "--learning_rate")
    assert bad.skipped == 3 + 45 + 1


def test_a_second_signal_stops_at_once_and_handlers_are_restored():
    """Would catch a run that cannot be stopped while an update hangs, and a notebook whose Ctrl-C
    is dead after a run."""
    before = signal.getsignal(signal.SIGINT)
    stop = runtime.StopSignal()
    assert signal.getsignal(signal.SIGINT) is before  # nothing to save yet
    stop.catch()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signum == signal.SIGINT and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    stop.release()
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------
# run folder


def make_run(folder, *iterations):
    """A run folder with committed checkpoints; returns the folder."""
    for iteration in iterations:
        temporary = folder / ".tmp-x"
        temporary.mkdir(parents=True)
        runtime.write_text(temporary / "run.json", f'{{"iter": {iteration}}}')
        (temporary / "weights").write_bytes(bytes(iteration))
        runtime.commit_folder(temporary, folder / f"checkpoint-{iteration:06d}")
    return folder


def test_two_runs_do_not_share_a_folder(tmp_path, fails):
    """Would catch two runs that write one log, a traceback where a file is in the way, half a
    checkpoint that stays on a full disk, and the folder of a mistyped name."""

    def hold(name, *made):
        with runtime.lock_folder(tmp_path / name) as nothing:
            assert nothing is None and not [*(tmp_path / name).glob(".tmp-*")]
            for path in made:
                (tmp_path / name / path).write_text("half")
            raise KeyError  # leaves the block as a full disk does

    with runtime.lock_folder(tmp_path / "a/b"):
        fails(1, lambda: hold("a/b"), "another run", "a/b")
        (tmp_path / "a/b/run.json").write_text("whole")
    (tmp_path / "a/b/.tmp-best").mkdir()  # a run was killed while it wrote
    (tmp_path / "theirs").mkdir()
    for name, made, left in (("a/b", [".tmp-loss.png"], [".lock", "run.json"]),
                             ("theirs", [], [".lock"]), ("typo", [".tmp-run.json"], None)):
        with pytest.raises(KeyError):
            hold(name, *made)
        folder = tmp_path / name
        assert (sorted(p.name for p in folder.iterdir()) if folder.exists() else None) == left
    (tmp_path / "file").write_text("")
    fails(1, lambda: hold("file"), "cannot write", "file")


@pytest.mark.parametrize("trace", ["best", "log.csv", "checkpoint-000005"])
def test_each_trace_counts_as_a_run(tmp_path, fails, trace):
    """A crash before the first checkpoint left best/ and log.csv, and the same command again
    replaced both unasked."""
    if "." in trace:
        (tmp_path / trace).write_text("iter,loss\n0,\n")
        assert runtime.find_run(tmp_path, False, False) == (None, {})  # it ended before an update
        (tmp_path / trace).write_text("iter,loss\n0,\n1,5.5\n")
    else:
        (tmp_path / trace).mkdir()
    before = snapshot(tmp_path)
    fails(1, lambda: runtime.find_run(tmp_path, False, False), trace, "--overwrite")
    fails(1, lambda: runtime.find_run(tmp_path, True, False), "--resume", "checkpoint")
    fails(2, lambda: runtime.find_run(tmp_path, True, True), "--resume", "--overwrite")
    assert runtime.find_run(tmp_path, False, True) == (None, {}) and snapshot(tmp_path) == before


@pytest.mark.parametrize("log", [b"epoch;loss\n1;2\n2;1\n", b"iter\nx\ny\n", b"\xff\n" * 3])
def test_a_foreign_log_is_no_traceback(tmp_path, fails, log):
    """Would catch a KeyError or ValueError for a log.csv that somebody else wrote."""
    (tmp_path / "log.csv").write_bytes(log)
    fails(1, lambda: runtime.find_run(tmp_path, False, False), "log.csv", "--overwrite")
    assert runtime.find_run(tmp_path, False, True) == (None, {})


def test_damaged_checkpoints_are_passed_over(tmp_path, capsys):
    """Would catch a resume from half a file, and 9 that counts as newer than 11."""
    make_run(tmp_path, 9, 11, 3)
    (tmp_path / "checkpoint-000011" / "weights").write_bytes(bytes(10))
    (tmp_path / "checkpoint-²").mkdir()  # a digit, but no number
    assert [p.name[-2:] for p in runtime.checkpoints(tmp_path)] == ["11", "09", "03"]
    assert runtime.find_run(tmp_path, True, False) == (tmp_path / "checkpoint-000009", {"iter": 9})
    assert "checkpoint-000011 is skipped: weights is damaged" in capsys.readouterr().out


def test_damaged_checkpoints_do_not_count(tmp_path):
    """With one of them to keep, the new checkpoint was deleted and the damaged one stayed; and a
    damaged one that stays is what sample.py would take."""
    make_run(tmp_path, 6, 9, 11)
    accelerator = runtime.make_accelerator("no")
    runtime.save_checkpoint(accelerator, tmp_path / "checkpoint-000010", lambda f: None, keep=1)
    assert [p.name[-2:] for p in runtime.checkpoints(tmp_path)] == ["10"]


def test_settings_of_older_runs(tmp_path):
    """Would catch a run of an older version, whose settings are in config.json, that is lost."""
    (tmp_path / "config.json").write_text('{"iter": 3}')
    assert runtime.read_run(tmp_path) == {"iter": 3}
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="no settings"):
        runtime.read_run(tmp_path)


@pytest.mark.parametrize("name, value", [("train", None), ("iter", "3"), ("val_loss", "low"),
                                         ("resumed", 7), ("machine", 3), ("seconds", None)])
def test_a_strangers_settings(tmp_path, name, value):
    """What a run.json says is computed with: 43 tracebacks of the attack were one of these."""
    (tmp_path / "run.json").write_text(json.dumps({"iter": 3, "val_loss": None, name: value}))
    with pytest.raises(ValueError, match=name):
        runtime.read_run(tmp_path)


@pytest.mark.parametrize("settings", [{"seed": "x"}, {"optimizer": "sgd"}, {"learning_rate": [1]},
                                      {"max_iters": 1.5}])
def test_settings_of_the_wrong_type(fails, settings):
    """Else they fail somewhere in the run, by a traceback."""
    train_config = train.Config(out_dir="out/x", resume=True)
    fails(1, lambda: runtime.resume_settings(train_config, settings), "out/x", *settings)
    good = {"learning_rate": 1, "max_iters": None, "optimizer": "adamw"}
    assert runtime.resume_settings(train_config, good).learning_rate == 1


@pytest.mark.parametrize("name", ["log.csv", "samples.md", "run.json"])
def test_a_pipe_in_the_run_folder(tmp_path, fails, name):
    """Opening one waits for ever."""
    os.mkfifo(tmp_path / name)
    for overwrite in (True, False):
        fails(1, lambda o=overwrite: runtime.find_run(tmp_path, False, o), name, "move it away")


def test_all_that_differs_in_one_message(fails):
    """Would catch a resume that is refused for one setting after the other."""
    was = {"--a": 1, "--b": None, "--c": 3}
    now = {"--a": 2, "--b": None, "--c": 5, "--d": 7}
    fails(2, lambda: runtime.check_same("out/x", was, now), "--a is 2 but was 1", "--c is 5",
          "--d is 7 but was None", "out/x")
    runtime.check_same("out/x", was, {"--a": 1, "--b": None})


def test_clear_run_takes_links_but_not_their_targets(tmp_path):
    """A linked best/ or checkpoint, as on a scratch disk, was a traceback with --overwrite; and a
    user's own files are none of the run's."""
    run = make_run(tmp_path / "run", 5)
    elsewhere = make_run(tmp_path / "scratch", 3, 7)
    (run / "best").symlink_to(elsewhere / "checkpoint-000003")
    (run / "checkpoint-000007").symlink_to(elsewhere / "checkpoint-000007")
    (run / "mine.txt").write_text("mine")
    before = snapshot(elsewhere)
    assert runtime.find_run(run, True, False)[1] == {"iter": 7}
    runtime.clear_run(run)
    assert [p.name for p in run.iterdir()] == ["mine.txt"] and snapshot(elsewhere) == before
    os.symlink("nowhere", run / "best")
    runtime.clear_run(run)
    assert not (run / "best").is_symlink()


def commit_in_a_child(steps, temporary, final):
    """commit_folder in a process that dies before disk step number `steps`; returns its code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = iter(range(steps))

    def counted(function):
        def call(*args, **kwargs):
            return function(*args, **kwargs) if next(left, None) is not None else os._exit(9)

        return call

    for name in ("fsync", "rename", "unlink", "rmdir", "open", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted(open)
    try:
        runtime.commit_folder(temporary, final)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_commit_killed_before_each_disk_step(tmp_path):
    """Would catch a folder of that name which is half old, half new or half deleted."""
    seen = set()
    for steps in range(99):
        work = tmp_path / str(steps)
        old = make_run(work, 5) / "checkpoint-000005"
        (work / ".tmp-new" / "sub").mkdir(parents=True)
        (work / ".tmp-new" / "weights").write_bytes(bytes(77))
        (work / ".tmp-new" / "sub" / "more").write_bytes(bytes(3))
        code = commit_in_a_child(steps, work / ".tmp-new", old)
        if old.exists():
            assert runtime.verify_checksums(old) is None
        size = (old / "weights").stat().st_size if old.exists() else None
        assert code == 9 or code == 0 and size == 77
        seen.add(size)
        if code == 0:
            break
    assert seen == {5, None, 77} and steps > 15 and not list(work.glob(".tmp-*"))


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    """safetensors makes its files 0600: a group could read all of a run but its weights."""
    before = os.umask(umask)
    try:
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "weights").write_bytes(b"x")
        (tmp_path / "t" / "weights").chmod(0o600)
        runtime.commit_folder(tmp_path / "t", tmp_path / "final")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "final").iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("name, what", [
    ("pipe", "no file"), ("../secret", "no file"), ("/dev/zero", "no file"), ("link", "no file"),
    ("gone", "no file"), ("sub", "no file"), ("weights\0", "cannot be read"), ("", "no file"),
    ("weights", "damaged")])
def test_a_strangers_checksums(tmp_path, name, what):
    """Would catch a FIFO or a device that is read for ever, and a path that leaves the folder."""
    folder = tmp_path / "checkpoint-000001"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "weights").write_text("w")
    os.mkfifo(folder / "pipe")
    right = hashlib.sha256(b"s").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{right}  {name}\n")
    assert what in runtime.verify_checksums(folder)


@pytest.mark.parametrize("content", [b"", b"nonsense\n", None, b"\xff\xfe", "pipe"])
def test_checksums_that_are_none(tmp_path, content):
    """Would catch an empty or missing list of checksums that counts as all right, and a FIFO."""
    if content == "pipe":
        os.mkfifo(tmp_path / "SHA256SUMS")
    elif content is not None:
        (tmp_path / "SHA256SUMS").write_bytes(content)
    assert "SHA256SUMS" in runtime.verify_checksums(tmp_path)


def test_checksums_of_some_files(tmp_path):
    """An edited config.json, which may be, hid that the weights are damaged."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    runtime.commit_folder(tmp_path, tmp_path.with_name("done"))
    done = tmp_path.with_name("done")
    (done / "config.json").write_text("edited")
    assert runtime.verify_checksums(done, "model") is None
    (done / "model.safetensors").write_text("flipped")
    assert runtime.verify_checksums(done, "model") == "model.safetensors is damaged"


# ---------------------------------------------------------------------------------------------
# log


def test_log_drops_what_a_resumed_run_makes_again(tmp_path, capsys):
    """Would catch rows twice, a half-written row that stays, and lines without the time left."""
    log = runtime.RunLog(tmp_path, 9, 0, True)
    for i in range(8):
        log.write({"iter": i, "loss": 0.5 * i, "tokens": 7 * i})
    log.file.write("8,5")  # the disk was full
    log.close()
    log = runtime.RunLog(tmp_path, 9, 5, True)
    log.progress(6, "loss 3.000")
    log.write({"iter": 6, "loss": 3.0, "tokens": 42})
    assert "total" not in log.close()
    rows = runtime.read_log(tmp_path / "log.csv")
    assert [(r["iter"], r["loss"], r["val_loss"]) for r in rows] == [
        (i, 0.5 * i, None) for i in range(7)]
    out = capsys.readouterr().out
    assert "iteration 6/9: loss 3.000" in out and "elapsed" in out and "left" in out
    log.plot(resumed=[5])
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert b"\r" not in (tmp_path / "log.csv").read_bytes()


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(tmp_path, monkeypatch):
    """Would catch a log file full of bars, and a second process that draws or writes."""
    assert runtime.RunLog(tmp_path, 3, 0, True).bar.disable
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for first in (True, False):
        log = runtime.RunLog(tmp_path, 3, -1, first)
        assert bool(log.bar.disable) != first and log.bar.n == 0
        log.write({"iter": 0})
        log.close()
    assert len(runtime.read_log(tmp_path / "log.csv")) == 1


def test_text_is_written_whole_and_as_it_is(tmp_path, monkeypatch):
    """Would catch line ends that change, and half a run.json after a full disk."""
    path = tmp_path / "a.txt"
    runtime.write_text(path, "a\r\nb\nç")
    assert path.read_bytes() == "a\r\nb\nç".encode()
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        runtime.write_text(path, "new")
    assert path.read_bytes() == "a\r\nb\nç".encode()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_fp16_on_a_cpu_warns_and_is_fp32(capsys):
    """Would catch fp16 autocast on a CPU, which is slow and overflows."""
    assert runtime.pick_precision("fp16", "cpu") == "no"
    assert "needs a GPU" in capsys.readouterr().out
    assert runtime.clock_text(7384) == "2:03:04"


def test_a_signal_in_the_middle_of_a_print(monkeypatch):
    """Python refuses a print inside a print: the run ended with a traceback, and saved nothing."""
    def refuse(*words):
        raise RuntimeError("reentrant call")

    monkeypatch.setattr(runtime, "print0", refuse)
    stop = runtime.StopSignal()
    stop.catch()
    signal.raise_signal(signal.SIGTERM)
    stop.release()
    assert stop.signum == signal.SIGTERM
