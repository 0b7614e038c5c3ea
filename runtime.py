"""What the training scripts share: errors, device, seeds, signals, run folder, checkpoints, log.

Nothing in here knows what a model computes, or looks into text.
"""

import contextlib
import csv
import ctypes
import dataclasses
import datetime
import errno
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import sys
import time
import typing
from pathlib import Path

import filelock

LOG_COLUMNS = ["iter", "tokens", "lr", "loss", "grad_norm", "tokens_per_s"]
LOG_COLUMNS += ["train_loss", "val_loss"]  # at evaluations
RUN_FILES = ("best", "log.csv", "loss.png", "samples.md", "run.json")  # besides checkpoint-*
# types of the fields of run.json that we compute with: anybody may have written the file
RUN_TYPES = dict.fromkeys(("model", "train", "config", "state", "same", "machine"), dict)
RUN_TYPES |= dict.fromkeys(("train_loss", "val_loss", "best_val_loss"), int | float | None)
RUN_TYPES |= {"iter": int, "best_iter": int, "skipped": int, "resumed": list}
RUN_TYPES["seconds"] = int | float
MAX_BAD_UPDATES = 10  # non-finite in a row: the run has diverged
SAVE_SECONDS = 15 * 60  # a checkpoint at least this often, whatever save_interval is

# ---------------------------------------------------------------------------------------------
# errors and output


class UserError(Exception):
    """A mistake that the user can mend: a script prints it as one line and exits with `code`,
    2 for an option or a config file, 1 for the rest. In a notebook it is an exception."""

    def __init__(self, message, code=1):
        super().__init__(" ".join(str(message).split()))
        self.code = code


def run_script(main, cfg):
    """main(cfg) as a program: a UserError, a full disk or a missing permission is one line on
    stderr, everything else a traceback."""
    # whatever the code page of a Windows pipe; file names may be no UTF-8
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main(cfg)
    except (UserError, OSError) as error:
        closed = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EPIPE)
        if isinstance(error, OSError):
            if error.errno not in closed:
                raise
            with contextlib.suppress(OSError, ValueError):  # drop what could not be printed
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            error = UserError(f"{error.filename or 'standard output'}: {error.strerror}")
        if is_first_process() or os.environ.get("LOCAL_RANK") == "0":  # of another machine
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def is_first_process():
    """Whether this is the first process, the one that prints."""
    several = "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ
    return os.environ.get("RANK", "0") == "0" or not several


def print0(*words):
    """print() from the first process only, unbuffered."""
    if is_first_process():
        print(*words, flush=True)


def check_range(cfg, low, *names, high=math.inf):
    """Raise UserError (code 2) unless low <= field <= high and finite, for each named field; or for
    a value outside its field's Literal, which a notebook's Config may hold."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        if choices and getattr(cfg, name) not in choices:
            raise UserError(f"--{name} {getattr(cfg, name)!r} is none of {choices}", 2)
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not (low <= value <= high and value < math.inf):
            most = "" if high == math.inf else f" and at most {high}"
            raise UserError(f"--{name} must be {low} or more{most}, not {value}", 2)


def first_line(error):
    """The first line of an exception's text, its type where it has none."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0].rstrip(":")


@contextlib.contextmanager
def one_line(what, remedy="", kinds=Exception):
    """Turn an exception of `kinds` in the block into a UserError, "what: its first line; remedy".
    All kinds are for a stranger's file, which can raise any, never for code that people edit."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {first_line(error)[:300]}{remedy and '; ' + remedy}") from error


# ---------------------------------------------------------------------------------------------
# device and precision


def tune_allocator():
    """Let glibc keep freed memory. PyTorch's large CPU tensors are otherwise mapped and unmapped
    for every operation, and each new mapping is paid for page by page (mallopt(3))."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not return the end of the heap


def pick_precision(wanted, device_type):
    """'auto' | 'bf16' | 'fp16' | 'no' -> what this device computes in. Weights stay fp32."""
    import torch  # here and below: prepare.py imports this module and starts without torch

    if wanted == "auto" and device_type == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    if wanted == "auto":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        fast = features.get("avx512_bf16") or features.get("amx_bf16")
        return "bf16" if fast and device_type == "cpu" else "no"
    if wanted == "fp16" and device_type == "cpu":
        print0("warning: --mixed_precision=fp16 needs a GPU; training in fp32")
        return "no"
    return wanted


def make_accelerator(mixed_precision, **kwargs):
    """An accelerate.Accelerator on the best device here, `mixed_precision` resolved.

    Raises UserError where the environment asks for processes that accelerate does not see.
    """
    world = os.environ.get("WORLD_SIZE")
    several = (world or "").isdecimal() and "MASTER_ADDR" in os.environ
    if not several and ("RANK" in os.environ or world):
        raise UserError("RANK and WORLD_SIZE are set in part; start several processes with: "
                        f"torchrun --nproc_per_node N {sys.argv[0]}, or unset them")
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    tune_allocator()
    if world and torch.distributed.is_available():
        # PyTorch imports it later otherwise: default arguments in it then keep the process group
        # alive, with gloo's threads, and those abort when Python ends before them (PyTorch 2.13).
        import torch.distributed.nn
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if world is None:  # a second run in one notebook may want other settings
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    # cpu=True: without it `torchrun` on a machine without a GPU makes independent runs that
    # overwrite each other (accelerate 1.15).
    precision = pick_precision(mixed_precision, device.type if device else "cpu")
    accelerator = Accelerator(cpu=device is None, mixed_precision=precision, **kwargs)
    if int(world or 1) != accelerator.num_processes:
        raise UserError(f"WORLD_SIZE is {world} but accelerate sees {accelerator.num_processes} "
                        f"process(es); start with: torchrun --nproc_per_node {world} {sys.argv[0]}")
    save_plain_names(accelerator)
    return accelerator


def describe_machine(accelerator):
    """Hardware and versions as a dict, for run.json."""
    import torch

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux knows more
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "accelerator": ", ".join(gpus) or None,
            "torch": torch.__version__, "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "precision": accelerator.mixed_precision, "processes": accelerator.num_processes}


# ---------------------------------------------------------------------------------------------
# one update: seed, learning rate, bad gradients, signals


def derive_seed(*numbers):
    """Whole numbers >= 0, such as (seed, iteration, rank) -> one well-mixed 32-bit seed.

    Seeding dropout with it makes an update a pure function of its place in the run: there is no
    random state to save, and evaluation or sampling cannot disturb it.
    """
    import numpy

    return int(numpy.random.SeedSequence(numbers).generate_state(1)[0])


def set_learning_rate(optimizers, lr):
    """Set every group to `lr` times the group's own factor `lr_scale` (1 where it has none)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


class BadUpdates:
    """Counts updates that were skipped because their gradient was not finite."""

    def __init__(self, skipped=0):
        self.skipped, self.in_a_row = skipped, 0

    def count(self, finite, iteration):
        """Raises UserError after MAX_BAD_UPDATES in a row. Returns whether this one is bad."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row == MAX_BAD_UPDATES:
            raise UserError(f"iteration {iteration}: {MAX_BAD_UPDATES} updates in a row had a "
                            "non-finite gradient; lower --learning_rate or look at the data; "
                            "the checkpoints are untouched")
        return not finite


class StopSignal:
    """Turns the first SIGINT or SIGTERM after `catch` into a flag, so that the current update can
    finish.

    `signum` is 0 until then. The same signal again kills at once. command: what continues the run.
    """

    def __init__(self, command=""):
        self.command, self.signum, self.saved_at = command, 0, time.monotonic()
        self.before = {}

    def catch(self):
        """From here on there is something to save."""
        with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._catch)

    def release(self):
        """Restore the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        self.signum = number
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # it came in the middle of another print
            print0(f"\n{name}: saving after this update; again: stop at once")

    def agree(self, accelerator, *values):
        """Average `values` (floats or 0-d tensors) over the processes and agree on what is next.

        Returns (the means, signum, whether SAVE_SECONDS have passed since the last save): a signal
        to any process stops all of them after the same update.
        """
        import torch

        late = time.monotonic() - self.saved_at > SAVE_SECONDS
        mine = [float(v) for v in (*values, self.signum, late * accelerator.is_main_process)]
        everyone = accelerator.gather(torch.tensor([mine], device=accelerator.device))
        *means, _, _ = everyone.mean(0).tolist()
        signum, late = everyone[:, -2:].max(0).values.tolist()
        return means, int(signum), bool(late)

    def exit(self, signum, out_dir):
        """End the program as the signal would have, after naming the command that continues."""
        print0(f"saved in {out_dir}; to continue: {self.command}")
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)


# ---------------------------------------------------------------------------------------------
# run folder


@contextlib.contextmanager
def lock_folder(folder):
    """Make `folder` and hold it for this process as long as the block lasts. Unfinished files in it
    are then deleted, and a folder that was not there before and is empty.

    Raises UserError if another run holds the folder or it cannot be written.
    """
    folder = Path(folder)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
        clear_unfinished(folder)  # of a run that was killed while it wrote
    except filelock.Timeout:
        raise UserError(f"another run is writing into {folder}; wait for it or choose another "
                        "folder") from None
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {first_line(error)}; choose another "
                        "folder") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            clear_unfinished(folder)
            if new and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()  # Windows does it on release
        lock.release()
        if new:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()


def clear_unfinished(folder):
    """Delete what was written aside in `folder` and never got its name."""
    for leftover in list(folder.glob(".tmp-*")):
        remove(leftover)


@contextlib.contextmanager
def hold_run(script, out_dir):
    """Hold the run folder for as long as the block lasts. Yields a StopSignal that catches nothing
    yet."""
    path = sys.argv[0] if Path(sys.argv[0]).name == script else script  # a notebook's is another
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")  # processes of this machine
    program = ["python"] if local == "1" else ["torchrun", "--nproc_per_node", local]
    stop = StopSignal(shlex.join([*program, path, f"--out_dir={out_dir}", "--resume"]))
    with lock_folder(out_dir) if is_first_process() else contextlib.nullcontext():
        try:
            yield stop
        finally:
            stop.release()


@contextlib.contextmanager
def disk_errors(folder):
    """Turn a failure to write below `folder` into a UserError. Anything that is no disk error
    passes: a forker's bug keeps its traceback."""
    try:
        yield
    except Exception as error:  # tokenizers raises plain Exceptions, torch.save RuntimeErrors
        reason = first_line(error)
        by_torch = "inline_container" in reason or "iostream" in reason
        if not (isinstance(error, OSError) or by_torch or re.search(r"\(os error \d+\)", reason)):
            raise
        reason = "No space left on device" if by_torch else reason
        raise UserError(f"cannot write into {folder}: {reason}; what was saved before is "
                        "intact") from error


def write_text(path, text):
    """Write a text file atomically: aside, then renamed. Line ends are written as they are."""
    aside = Path(path).with_name(f".tmp-{Path(path).name}")
    with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as f:
        f.write(text)
    aside.replace(path)


def checkpoints(out_dir):
    """The checkpoint-* folders of a run, newest first."""
    found = [p for p in Path(out_dir).glob("checkpoint-*") if p.name[11:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[11:]), reverse=True)


def read_run(folder):
    """The settings and figures saved with a checkpoint or run, as a dict. Older runs have them in
    config.json. Raises OSError or ValueError where they cannot be read."""
    path = Path(folder, "run.json")
    path = path if path.exists() else path.with_name("config.json")
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is missing or no settings file")
    for name in saved.keys() & RUN_TYPES.keys():
        if not isinstance(saved[name], RUN_TYPES[name]):
            raise ValueError(f"{name} is {saved[name]!r} in its {path.name}")
    return saved


def find_run(out_dir, resume, overwrite):
    """The checkpoint that a run in out_dir starts from: (folder, its run.json), or (None, {}).

    Names each damaged checkpoint that it passes over. Raises UserError where the folder holds a
    run and neither `resume` nor `overwrite` is given, or nothing can be resumed. Deletes nothing.
    """
    found = checkpoints(out_dir)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; choose one", 2)
    for path in (out_dir / name for name in RUN_FILES[1:]):
        if path.exists() and not path.is_file():  # a pipe would never end
            raise UserError(f"{path} is no file; move it away")
    traces = found or [p for p in (out_dir / "best",) if p.exists()]
    log = out_dir / "log.csv"
    if not traces and log.exists() and len(log.read_bytes().splitlines()) > 2:
        traces = [log]  # more than the header and iteration 0
    if traces and not (resume or overwrite):
        goes_on = "continue with --resume or " if found else ""
        raise UserError(f"{out_dir} holds a run ({traces[0].name}); {goes_on}start again with "
                        "--overwrite")
    if not resume:
        return None, {}
    for folder in found:
        try:
            wrong = verify_checksums(folder)
            if not wrong:
                return folder, read_run(folder)
        except (OSError, ValueError) as error:
            wrong = first_line(error)
        print0(f"warning: {folder} is skipped: {wrong}")
    what = "no intact checkpoint" if found else "no checkpoint"
    raise UserError(f"--resume: {out_dir} holds {what}; start again with --overwrite")


def given_names(cfg):
    """The fields of a Config that were set: what load() saw, or what differs from the defaults."""
    differs = {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
    return set(getattr(cfg, "given", differs))


def resume_settings(cfg, settings):
    """A run's own `settings` (dict) as a Config, with what was given in this command on top."""
    given = given_names(cfg)
    for group in getattr(cfg, "ALTERNATIVES", ()):
        if given & set(group):
            settings = settings | dict.fromkeys(group)
    settings = settings | {name: getattr(cfg, name) for name in given}
    settings |= {"resume": True, "overwrite": False, "out_dir": cfg.out_dir}
    hints = typing.get_type_hints(type(cfg))
    settings = {f.name: settings[f.name] for f in dataclasses.fields(cfg) if f.name in settings}
    for name, value in settings.items():
        if not fits(value, hints[name]):
            raise UserError(f"cannot resume {cfg.out_dir}: its {name} is {value!r}; start a new "
                            "--out_dir")
    return type(cfg)(**settings)


def fits(value, hint):
    """Whether a value out of a JSON file has the type of a Config's field."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple | list)
    return isinstance(value, hint) or isinstance(value, int) and isinstance(0.0, hint)


def check_same(folder, saved, wanted):
    """Raise one UserError (code 2) that names every setting in which `wanted` differs from `saved`,
    both {name: value}: what a checkpoint was made with cannot change under it."""
    wrong = [f"{name} is {value} but was {saved.get(name)}" for name, value in wanted.items()
             if saved.get(name) != value]
    if wrong:
        raise UserError(f"cannot resume from {folder}: {'; '.join(wrong)}. Resume with what it was "
                        "made with, or start a new --out_dir", 2)


def clear_run(out_dir, *names):
    """Delete the run in out_dir: its checkpoints, RUN_FILES and `names`. Call it last, when the new
    run is about to make its first update."""
    for path in [*checkpoints(out_dir), *(out_dir / name for name in (*RUN_FILES, *names))]:
        remove(path)


def remove(path):
    """Delete a file, link or folder; a folder is renamed first, so that no half of it is seen."""
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def save_checkpoint(accelerator, folder, write, keep=None):
    """Save a checkpoint atomically: `write(temporary)` on every process, checksums, rename.

    folder: its final name. keep: how many of the newest checkpoint-* to keep (None: all).
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    with disk_errors(folder.parent):
        if accelerator.is_main_process:
            remove(temporary)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        write(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            commit_folder(temporary, folder)
            if keep:
                found = checkpoints(folder.parent)
                here = found.index(folder)
                for old in found[:here] + found[here + keep :]:  # find_run passed over newer ones
                    remove(old)
    accelerator.wait_for_everyone()


def save_plain_names(accelerator):
    """Make accelerate save and load weights without the 'module.' that DDP puts before their names,
    so that a checkpoint of two processes loads on one."""

    def on_save(models, weights, folder):
        for i, model in enumerate(models):
            state = accelerator.unwrap_model(model).state_dict()
            unique = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
            weights[i] = {name: state[name] for name in unique.values()}  # tied ones once

    def on_load(models, folder):
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


def load_checkpoint(accelerator, folder, optimizers):
    """accelerator.load_state with one clear error; the optimizers' settings (decay, betas ...) stay
    those of this run. Only tensors are unpickled (weights_only): a stranger's file runs no code."""
    mine = [optimizer.param_groups for optimizer in optimizers]
    with one_line(f"{folder} cannot be loaded", "start a new --out_dir"):  # sums alone prove little
        accelerator.load_state(str(folder))
    for optimizer, groups in zip(optimizers, mine, strict=True):
        optimizer.param_groups = groups


def commit_folder(temporary, final):
    """Give a finished temporary folder its name: checksums, flush to disk, rename.

    Writes SHA256SUMS (the format of sha256sum(1)) over all files of `temporary`. `final` is
    replaced if it exists. After a crash at any point `final` is the old one, the new one or absent.
    """
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    sums = "".join(f"{sha256(p)}  {p.relative_to(temporary).as_posix()}\n" for p in files)
    (temporary / "SHA256SUMS").write_text(sums, encoding="utf-8")
    mode = stat.S_IMODE((temporary / "SHA256SUMS").stat().st_mode)  # what the umask allows
    for path in [*files, temporary / "SHA256SUMS"]:
        path.chmod(mode)  # safetensors makes its files 0600
        with open(path, "r+b") as f:
            os.fsync(f.fileno())
    remove(final)
    temporary.rename(final)
    if os.name == "posix":  # the rename itself
        descriptor = os.open(final.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def verify_checksums(folder, prefix=""):
    """What is wrong with a committed folder, in a few words; None if nothing is. prefix: look only
    at files whose names begin so."""
    sums = Path(folder, "SHA256SUMS")
    if not sums.is_file():  # a pipe or a device would never end
        return "SHA256SUMS is missing"
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
        for checksum, name in (line.split("  ", 1) for line in lines):
            if not name.startswith(prefix):
                continue
            path = (sums.parent / name).resolve()
            if not (path.is_relative_to(sums.parent.resolve()) and path.is_file()):
                return f"{name} is no file in it"
            if sha256(path) != checksum:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or 'SHA256SUMS'} cannot be read"
    return None if lines else "SHA256SUMS is empty"


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------
# log.csv, progress, loss.png


def clock_text(seconds):
    """125 -> '0:02:05'."""
    return str(datetime.timedelta(seconds=round(seconds)))


class RunLog:
    """log.csv, the progress bar or plain lines, and the time of each stage of one run.

    Only the first process shows and writes. A bar is drawn on a terminal and in notebooks;
    elsewhere `progress` prints plain lines with the time that is left.
    """

    def __init__(self, out_dir, total, done, first, columns=LOG_COLUMNS):
        """Rows of an existing log.csv past iteration `done` are dropped: a resumed run makes those
        updates again."""
        from tqdm.auto import tqdm

        self.first, self.total, self.done = first, total, max(0, done)
        self.began = time.perf_counter()
        self.seconds = {"updates": 0.0}
        self.bar = tqdm(total=total, initial=self.done, unit="it",
                        disable=None if first else True)  # None: where there is no terminal
        if not first:
            return
        self.folder, path = Path(out_dir), Path(out_dir) / "log.csv"
        with disk_errors(out_dir):
            old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            kept = [line for line in old.splitlines()
                    if re.match(r"\d{1,15},", line) and int(line.split(",")[0]) <= done]
            write_text(path, "\n".join([",".join(columns), *kept, ""]))
            self.file = open(path, "a", newline="", encoding="utf-8", buffering=1)
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")

    def print(self, text):
        """A line for the reader, above the bar."""
        if self.first:
            print0(text) if self.bar.disable else self.bar.write(text)

    def write(self, row):
        """Append a row, {column: value}, to log.csv; on return the operating system has it."""
        if self.first:
            with disk_errors(self.folder):
                self.writer.writerow(row)

    @contextlib.contextmanager
    def stage(self, name):
        """Count the time of the block as `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def progress(self, iteration, text=""):
        """`iteration` updates are done; with `text`, show it."""
        self.bar.update(iteration - self.bar.n)
        if text and self.bar.disable:
            elapsed = time.perf_counter() - self.began
            left = elapsed / max(1, iteration - self.done) * (self.total - iteration)
            self.print(f"iteration {iteration:,}/{self.total:,}: {text}, "
                       f"{clock_text(elapsed)} elapsed, {clock_text(left)} left")
        elif text:
            self.bar.set_postfix_str(text)

    def plot(self, lower=("lr",), unit="token", resumed=()):
        """Draw log.csv into loss.png; the arguments are those of plot_log."""
        if self.first:
            with disk_errors(self.folder):
                plot_log(self.folder, lower, unit, resumed)

    def close(self):
        """Close bar and file; returns the time of each stage in words."""
        self.bar.close()
        if self.first:
            self.file.close()
        stages = ", ".join(f"{name} {clock_text(s)}" for name, s in self.seconds.items() if s > 0.5)
        return f"{clock_text(time.perf_counter() - self.began)} ({stages})"


def read_log(path):
    """The rows of a log.csv as dicts of floats, None where a cell is empty; [] without a file."""
    if not Path(path).is_file():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        for row in csv.DictReader(f):
            with contextlib.suppress(ValueError, TypeError):  # a row that somebody else wrote
                rows.append({k: float(v) if v else None for k, v in row.items()})
    return rows


def perplexity(loss):
    """exp(loss), which must not overflow."""
    return math.exp(min(loss, 700))


def log_curve(rows, name):
    """([iteration], [value]) of one column of a log, where it has a value."""
    points = [(row["iter"], row[name]) for row in rows if row.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def plot_log(out_dir, lower=("lr",), unit="token", resumed=()):
    """Draw the losses in out_dir/log.csv against iterations and, below them, the columns `lower`,
    into out_dir/loss.png.

    unit: what the loss is a mean over. resumed: iterations at which the run was resumed.
    """
    from matplotlib.figure import Figure  # the Figure class alone: no display, no global state

    out_dir = Path(out_dir)
    rows = read_log(out_dir / "log.csv")
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
    top.plot(*log_curve(rows, "loss"), color="tab:blue", alpha=0.35, label="each logged iteration")
    top.plot(*log_curve(rows, "train_loss"), color="tab:blue", marker=".", label="train")
    x, y = log_curve(rows, "val_loss")
    top.plot(x, y, color="tab:orange", marker=".", label="validation")
    if y:
        best = min(range(len(y)), key=y.__getitem__)
        top.annotate(f"{y[best]:.3f}", (x[best], y[best]), xytext=(0, 8),
                     textcoords="offset points", ha="center", color="tab:orange")
    for name in lower:
        bottom.plot(*log_curve(rows, name), label=name)
    for axes in (top, bottom):
        for iteration in resumed:
            axes.axvline(iteration, color="gray", linestyle=":",
                         label="resumed" if axes is top and iteration == resumed[0] else None)
        axes.grid(alpha=0.3)
    top.set(title=str(out_dir).replace("$", r"\$"), ylabel=f"loss (nats per {unit})")
    top.legend()
    bottom.yaxis.set_major_formatter("{x:g}")  # no offset such as 1e-5 above the axis
    bottom.set(ylabel="learning rate" if lower == ("lr",) else "", xlabel="iteration")
    if len(lower) > 1:
        bottom.legend()
    figure.savefig(out_dir / ".tmp-loss.png", dpi=110)
    (out_dir / ".tmp-loss.png").replace(out_dir / "loss.png")
