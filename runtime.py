"""What every trainer here needs of the machine and of its run folder, once.

Device and precision, the CPU allocator, signals, one run a folder, folders whole or
absent, log.csv and loss.png. Nothing in here knows about models or text.
"""

import contextlib
import csv
import ctypes
import gc
import hashlib
import math
import os
import platform
import shutil
import signal
import sys
from pathlib import Path

import filelock

from configurator import fail

LOG_COLUMNS = ["iter", "tokens", "lr", "loss", "grad_norm", "tokens_per_s"]
LOG_COLUMNS += ["train_loss", "val_loss"]  # at evaluations


# ---------------------------------------------------------------------------------------------
# machine


def tune_allocator():
    """Let glibc keep freed memory. PyTorch's large CPU tensors are otherwise mapped and unmapped
    for every operation, and each new mapping is paid for page by page (mallopt(3))."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not hand the heap's end back


def pick_precision(wanted, device_type):
    """'auto' | 'bf16' | 'fp16' | 'no' -> what this device should compute in. Weights stay fp32."""
    import torch  # here and below, so that prepare.py starts without it

    if device_type == "cuda":
        fast_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        fast_bf16 = device_type == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16"))
    if wanted == "auto":
        return "bf16" if fast_bf16 else "fp16" if device_type == "cuda" else "no"
    if wanted == "fp16" and device_type == "cpu":
        say("warning: --mixed_precision=fp16 needs a GPU; training in fp32")
        return "no"
    return wanted


def make_accelerator(mixed_precision, may_shard=False, **kwargs):
    """An accelerate.Accelerator on the best device here, `mixed_precision` resolved.

    may_shard: whether the script can do with a part of the model in each process.
    cpu=True matters: without it `torchrun` on a machine with no GPU makes independent runs that
    overwrite each other (accelerate 1.15). Exits with code 1 where that happens all the same.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    tune_allocator()
    if torch.distributed.is_available():
        # the group that it finds would stay in its default arguments for ever, with gloo's threads,
        # and those abort when Python ends before them (PyTorch 2.13)
        import torch.distributed.nn
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if "WORLD_SIZE" not in os.environ:  # a second run in one notebook may want other settings
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    accelerator = Accelerator(
        cpu=device is None,
        mixed_precision=pick_precision(mixed_precision, device.type if device else "cpu"),
        **kwargs,
    )
    if device is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # accelerate turns it on for GPUs only; PyTorch's own shards over gloo as well
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not may_shard and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        fail(f"{sys.argv[0]} runs with a whole model in each process only; start with: torchrun")
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        fail(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but accelerate sees "
            f"{accelerator.num_processes} process(es); start with: "
            f"torchrun --nproc_per_node {os.environ['WORLD_SIZE']} {sys.argv[0]}"
        )
    return accelerator


def machine():
    """What this runs on, in words, as a dict."""
    import torch

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux says it better
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((x.split(": ", 1)[1] for x in lines if x.startswith("model name")), cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "accelerator": ", ".join(gpus) or None,
            "torch": torch.__version__, "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}"}  # fmt: skip


def say(*words):
    """print() from the first process only, at once."""
    if os.environ.get("RANK", "0") == "0":
        print(*words, flush=True)


def progress_bar(total, done, shown=True):
    """A tqdm bar on a terminal or in a notebook; elsewhere, or unless `shown`, a disabled one."""
    from tqdm.auto import tqdm

    visible = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(total=total, initial=done, unit="it", disable=not (shown and visible))


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that the update in hand can end.

    `signum` is 0 until then; exit with code 128 + signum. A second signal kills at once.
    """

    def __init__(self):
        self.signum, self.before = 0, {}
        with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._catch)

    def release(self):
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        self.signum = number
        signal.signal(number, signal.SIG_DFL)
        say(f"\n{signal.Signals(number).name}: saving after this update; once more stops at once")


# ---------------------------------------------------------------------------------------------
# run folder


def lock_folder(folder):
    """Make `folder` and hold it for this process until it ends, however it ends.

    Returns the lock (keep a reference). Exits with code 1 if another run holds the folder or the
    folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        fail(f"another run is writing into {folder}; wait for it or choose another folder")
    except OSError as error:
        fail(f"cannot write into {folder}: {error.strerror or error}; choose another folder")
    return lock


@contextlib.contextmanager
def disk_errors(folder):
    """Turn what goes wrong while writing below `folder` into one line and exit code 1."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:  # torch.save raises RuntimeError, tokenizers plain Exceptions
        known = isinstance(error, (OSError, RuntimeError, SafetensorError))
        if not known and "os error" not in str(error):
            raise
        for leftover in Path(folder).glob(".tmp-*"):
            with contextlib.suppress(OSError):
                remove(leftover)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if "inline_container" in reason or "iostream" in reason:  # torch.save of a full disk
            reason = "No space left on device"
        fail(f"cannot write into {folder}: {reason}; what was saved there before is whole")


def checkpoints(out_dir):
    """The checkpoint-* folders of a run, newest first."""
    found = [p for p in Path(out_dir).glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]), reverse=True)


def start_run(out_dir, resume, overwrite):
    """Apply the rule for a folder that already holds a run. Call it on the first process only.

    Returns the checkpoints to resume from, newest first ([] for a fresh run).
    """
    out_dir = Path(out_dir)
    if resume and overwrite:
        fail("--resume=True and --overwrite=True exclude each other; choose one", 2)
    found = checkpoints(out_dir)
    if resume and not found:
        fail(f"--resume=True, but {out_dir} holds no checkpoint; start without it")
    if found and not (resume or overwrite):
        fail(f"{out_dir} holds {found[0].name}; go on with --resume=True or start again with "
             f"--overwrite=True")  # fmt: skip
    if overwrite:
        for old in [*found, out_dir / "best", out_dir / "log.csv", out_dir / "samples.md"]:
            remove(old)
    for leftover in out_dir.glob(".tmp-*"):  # from a run that was killed while it wrote
        remove(leftover)
    return found if resume else []


def remove(path):
    """Delete a file or folder; a folder loses its name first, so that no half of it is seen."""
    if path.is_dir():
        doomed = path.with_name(f".tmp-old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def seal_folder(temporary, final):
    """Give a finished temporary folder its name: checksums, flush to disk, rename.

    Writes SHA256SUMS (the format of sha256sum(1)) over all files of `temporary`. `final` is
    replaced if it exists. After a crash at any point `final` is the old one, the new one or absent.
    """
    temporary, final = Path(temporary), Path(final)
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    sums = "".join(f"{sha256(p)}  {p.relative_to(temporary).as_posix()}\n" for p in files)
    (temporary / "SHA256SUMS").write_text(sums, encoding="utf-8")
    for path in [*files, temporary / "SHA256SUMS"]:
        with open(path, "r+b") as f:
            os.fsync(f.fileno())
    if final.exists():
        remove(final)
    temporary.rename(final)
    if os.name == "posix":  # the rename itself
        descriptor = os.open(final.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def damage(folder):
    """What is wrong with a sealed folder, in a few words; None if nothing is."""
    try:
        lines = (Path(folder) / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        for line in lines:
            checksum, name = line.split("  ", 1)
            if sha256(Path(folder) / name) != checksum:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or 'SHA256SUMS'} cannot be read"
    return None if lines else "SHA256SUMS is empty"


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------
# log.csv, loss.png


def read_log(path):
    """The rows of a log.csv as dicts of floats, None where a cell is empty; [] without a file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(f)]


def open_log(path, columns=LOG_COLUMNS, keep_until=-1):
    """Open log.csv for appending and return write(row: dict).

    Rows past iteration `keep_until` are dropped first: they belong to updates that a resumed run
    will do again. Each row is on its way to the disk when write returns.
    """
    path, kept = Path(path), []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as f:
            kept = [r for r in csv.reader(f) if r and r[0].isdigit() and int(r[0]) <= keep_until]
    beside = path.with_name(".tmp-log.csv")
    with open(beside, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([columns, *kept])
    beside.replace(path)
    log = open(path, "a", newline="", encoding="utf-8", buffering=1)
    writer = csv.DictWriter(log, columns, lineterminator="\n")
    return lambda row: writer.writerow(row)


def plot_log(log_path, png_path, panel="perplexity", unit="token"):
    """Draw training and validation loss against iterations, tokens on the top axis, and below it
    `panel`: 'perplexity', or any list of columns of the log joined by '+' ('accuracy+f1').
    unit: what the loss is a mean over."""
    from matplotlib.figure import Figure  # the Figure class alone: no display, no global state

    rows = read_log(log_path)

    def curve(name):
        seen = [(r["iter"], r[name]) for r in rows if r.get(name) is not None]
        return list(zip(*seen, strict=True)) or [(), ()]

    figure = Figure(figsize=(8, 7), layout="constrained")
    loss, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    loss.plot(*curve("loss"), color="tab:blue", alpha=0.35, label="loss of each logged iteration")
    loss.plot(*curve("train_loss"), color="tab:blue", marker=".", label="train")
    loss.plot(*curve("val_loss"), color="tab:orange", marker=".", label="validation")
    loss.set_ylabel(f"loss (nats per {unit})")
    loss.legend()
    per_iteration = next((r["tokens"] / r["iter"] for r in rows[::-1] if r["iter"]), 0)
    if per_iteration:
        scale = (lambda x: x * per_iteration, lambda x: x / per_iteration)
        loss.secondary_xaxis("top", functions=scale).set_xlabel("tokens")
    if panel == "perplexity":
        for name, color in (("train_loss", "tab:blue"), ("val_loss", "tab:orange")):
            x, y = curve(name)
            lower.plot(x, [math.exp(min(v, 700)) for v in y], color=color, marker=".")
        lower.set_yscale("log")
    else:
        for name in panel.split("+"):
            lower.plot(*curve(name), marker=".", label=name)
        lower.legend()
    lower.set_ylabel(panel.replace("+", ", "))
    lower.set_xlabel("iteration")
    for axes in (loss, lower):
        axes.grid(alpha=0.3)
    beside = Path(png_path).with_name(".tmp-" + Path(png_path).name)
    figure.savefig(beside, dpi=110, format="png")
    beside.replace(png_path)
    gc.collect()  # a Figure is a cycle of megabytes, found late otherwise
