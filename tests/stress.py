"""What a long run is trusted with: kill it, fill its disk, poison it, run it long. Prints what was
lost.

python tests/stress.py           # the short form that CI runs, about 90 s on 2 CPU cores
python tests/stress.py --long    # 30 kills, 20,000 iterations
"""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file

import prepare
import runtime

RUN = ["--dataset=tiny", "--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=32"]
RUN += ["--batch_size=2", "--gradient_accumulation_steps=2", "--dropout=0.1", "--log_interval=1"]
RUN += ["--mixed_precision=no", "--sample_tokens=4", "--eval_iters=1"]
# the test's own hook: writing the weights takes a third of a second, so that kills hit it
SLOW_SAVE = """
import sys, time, train, configurator
plain = train.save_file
def slow(tensors, path):
    plain(tensors, path)
    time.sleep(0.3)
train.save_file = slow
train.main(configurator.load(train.Config, sys.argv[1:]))
"""
SAMPLE_AND_RESUME = """
import contextlib, sys, sample, train, configurator
with contextlib.suppress(SystemExit):  # first: the other may leave a newer, clean checkpoint
    sample.main(sample.Config("out/poison", start="a", max_new_tokens=2))
with contextlib.suppress(SystemExit):
    train.main(configurator.load(train.Config, sys.argv[1:]))
print("end")
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def make_data(folder):
    """A character data set from a module of the standard library."""
    text = Path(json.__file__).read_text("utf-8") * 3
    (folder / "text.txt").write_text(text, encoding="utf-8")
    source = str(folder / "text.txt")
    prepare.main(prepare.Config("tiny", source, "char", data_dir=str(folder / "data")))


def outcome(run):
    """(weights, log without the throughput, samples) of a finished run."""
    weights = load_file(runtime.checkpoints(run)[0] / "model.safetensors")
    rows = runtime.read_log(run / "log.csv")
    log = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]
    return weights, log, (run / "samples.md").read_text("utf-8")


def killed(folder, kills, seed=0):
    """kill -9 a run at `kills` random moments; it must end as a run that nobody touched."""
    iterations = 40 * kills
    options = [*RUN, f"--max_iters={iterations}", "--eval_interval=20", "--save_interval=5"]
    command = [sys.executable, "-c", SLOW_SAVE, *options]
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *options, "--out_dir=out/whole"],
        cwd=folder, env=ENV, check=True, capture_output=True,
    )  # fmt: skip
    rng, run, half_written, hits = random.Random(seed), folder / "out" / "killed", 0, 0
    while hits < kills:
        again = [f"--resume={bool(runtime.checkpoints(run))}", "--out_dir=out/killed"]
        child = subprocess.Popen(
            [*command, *again], cwd=folder, env=ENV, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        for line in child.stdout:
            if line.startswith("iteration "):
                break
        time.sleep(rng.uniform(0.0, 1.5))
        child.kill()
        rest = child.stdout.read()
        child.wait()
        hits += 1
        assert "Traceback" not in rest, rest
        if "done at" in rest:
            break
        half_written += bool(list(run.glob(".tmp-*")))
        for checkpoint in runtime.checkpoints(run):
            assert runtime.damage(checkpoint) is None, checkpoint
    final = [f"--resume={bool(runtime.checkpoints(run))}", "--out_dir=out/killed"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *options, *final],
        cwd=folder, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, other = outcome(folder / "out" / "whole"), outcome(run)
    assert all(torch.equal(one[0][k], other[0][k]) for k in one[0])
    assert one[1:] == other[1:]
    return f"{hits} kills, {half_written} inside a save, {iterations} iterations", "nothing"


FULL_DISK = """
mount -t tmpfs -o size=$1k tmpfs out/disk || exit 99
shift
"$@"
echo "first exit $?"
if ls -d out/disk/run/checkpoint-* > /dev/null 2>&1; then again=--resume=True; fi
mount -o remount,size=100m out/disk
"$@" $again || exit 1
mv out/disk/run out/was-full
"""


def full_disk(folder, sizes):
    """Runs on a disk of so many kB, then, when it has grown, the same again: each must say in one
    line what happened, and end as a run that always had room."""
    options = [*RUN, "--max_iters=20", "--eval_interval=5", "--save_interval=5"]
    train = [sys.executable, str(ROOT / "train.py"), *options]
    (folder / "out" / "disk").mkdir(parents=True, exist_ok=True)
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder / "out" / "disk")]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        return f"{len(sizes)} disks", "not tried: no user namespaces here"
    read_only = 'mount -t tmpfs -o ro tmpfs out/disk && exec "$@"'
    refused = subprocess.run(
        ["unshare", "-rm", "bash", "-c", read_only, "bash", *train, "--out_dir=out/disk/run"],
        cwd=folder, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 1 and "Read-only" in refused.stderr, refused.stderr
    assert "iteration" not in refused.stdout and "Traceback" not in refused.stderr
    room = [*train, "--out_dir=out/room"]
    subprocess.run(room, cwd=folder, env=ENV, check=True, capture_output=True)
    expected, went_on = outcome(folder / "out" / "room"), 0
    for size in sizes:
        shutil.rmtree(folder / "out" / "was-full", ignore_errors=True)
        disk = ["unshare", "-rm", "bash", "-c", FULL_DISK, "bash", str(size)]
        done = subprocess.run([*disk, *train, "--out_dir=out/disk/run"], cwd=folder, env=ENV,
                              capture_output=True, text=True)  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if "rror" in line]
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert "first exit 1" in done.stdout and len(errors) == 1, (size, errors)
        assert "cannot write into out/disk/run" in errors[0], errors
        one, other = expected, outcome(folder / "out" / "was-full")
        assert all(torch.equal(one[0][k], other[0][k]) for k in one[0]) and one[1:] == other[1:]
        went_on += "resuming from" in done.stdout
    return (
        f"{len(sizes)} disks and a read-only one, {went_on} runs resumed from a checkpoint",
        "nothing",
    )


def poisoned(folder):
    """A pickle that would run code, in the place of every file of a checkpoint."""
    options = [*RUN, "--max_iters=4", "--eval_interval=0", "--out_dir=out/poison"]
    train = [sys.executable, str(ROOT / "train.py"), *options]
    subprocess.run(train, cwd=folder, env=ENV, check=True, capture_output=True)
    checkpoint = runtime.checkpoints(folder / "out" / "poison")[0]
    marker = folder / "code-ran"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    names = sorted(p.name for p in checkpoint.iterdir())
    for name in names:
        whole = (checkpoint / name).read_bytes()
        if name.endswith((".bin", ".pkl", ".pt")):
            torch.save(Evil(), checkpoint / name)
        else:
            (checkpoint / name).write_bytes(pickle.dumps(Evil()))
        if name != "SHA256SUMS":  # a stranger signs what he sends
            lines = [f"{runtime.sha256(p)}  {p.name}\n" for p in checkpoint.iterdir()
                     if p.name != "SHA256SUMS"]  # fmt: skip
            (checkpoint / "SHA256SUMS").write_text("".join(lines))
        again = [*options, "--resume=True", "--max_iters=5"]
        both = [sys.executable, "-c", SAMPLE_AND_RESUME, *again]
        done = subprocess.run(both, cwd=folder, env=ENV, capture_output=True, text=True)
        assert not marker.exists(), f"{name}: code ran"
        assert "Traceback" not in done.stderr and "end\n" in done.stdout, f"{name}: {done.stderr}"
        for newer in runtime.checkpoints(folder / "out" / "poison")[:-1]:
            runtime.remove(newer)
        (checkpoint / name).write_bytes(whole)
    return f"{len(names)} files", "no code ran"


def long(folder, iterations):
    """Memory, open files and speed of a long run. The first half fills caches (matplotlib's)."""
    script = f"""
import os, sys, time, psutil, train, configurator
me, marks, began = psutil.Process(), [], time.perf_counter()
plain = train.lr_at
def lr_at(t, *rest):
    if t % {iterations // 10} == 0 and t:
        marks.append((me.memory_info().rss / 1e6, me.num_fds(), time.perf_counter()))
    return plain(t, *rest)
train.lr_at = lr_at
train.main(configurator.load(train.Config, sys.argv[1:]))
print("MARKS", marks)
"""
    options = [*RUN, f"--max_iters={iterations}", f"--eval_interval={iterations // 10}"]
    options += ["--out_dir=out/long", f"--save_interval={iterations // 10}", "--log_interval=10"]
    done = subprocess.run(
        [sys.executable, "-c", script, *options],
        cwd=folder,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    marks = eval(done.stdout.rsplit("MARKS", 1)[1])
    memory, files, times = zip(*marks, strict=True)
    tenths = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert memory[-1] - memory[4] < 20, memory
    assert files[-1] <= files[1], files
    return (f"{iterations} iterations", f"{memory[-1] - memory[4]:+.0f} MB in the second half, "
            f"{files[-1] - files[1]:+d} open files, last tenth {tenths[-1] / tenths[1]:.2f} x the "
            "second's time")  # fmt: skip


def main(is_long):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_data(folder)
        trials = {
            "kill -9 at random moments": lambda: killed(folder, 30 if is_long else 3),
            "full disks": lambda: full_disk(folder, range(50, 900, 50) if is_long else (350, 650)),
            "malicious pickles in a checkpoint": lambda: poisoned(folder),
            "a long run": lambda: long(folder, 20_000 if is_long else 1000),
        }
        print("| trial | tried | lost |\n|---|---|---|")
        for name, trial in trials.items():
            print(f"| {name} | {' | '.join(trial())} |", flush=True)


if __name__ == "__main__":
    main("--long" in sys.argv)
