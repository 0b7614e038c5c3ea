"""The attack on the scripts, as a table: bad inputs, faults, hostile pickles.

    python tests/stress.py           # a fixed part of the table, some minutes on 2 CPU cores
    python tests/stress.py --long    # all of it, about 20 minutes
    python tests/stress.py --long sample disk    # only the rows that hold one of the words

An input is answered clearly, by exit code 1 or 2, one line "error: ..." and every file as it was;
or it is right, and so is the result. A fault (kill -9, a full disk, a flipped byte) is survived
where nothing is lost and the run ends as one that nobody touched. A pickle does not run. Each row
works in a copy of a small prepared world, in processes forked from one that has paid for the
imports. Linux only; needs no network, no GPU and no vocabulary of GPT-2.
"""

import contextlib
import ctypes
import functools
import gzip
import http.server
import io
import json
import math
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

import fast
import model as model_file
import prepare
import runtime
import train_roberta

LAZY = transformers.RobertaForMaskedLM, transformers.AutoTokenizer, transformers.pipeline
WORDS = "the firm sold its old plant to a rival for ten million dollars on late last Monday".split()
BASE = {  # what the commands of the table begin with
    "train": "train.py --dataset=tiny --block_size=16 --n_layer=1 --n_head=2 --n_embd=16 "
             "--batch_size=3 --max_iters=5 --eval_iters=1 --log_interval=1 --sample_tokens=5 "
             "--mixed_precision=no --out_dir=out/new",
    "free": "train.py --dataset=tiny --block_size=16 --eval_iters=1 --sample_tokens=5 "
            "--batch_size=3 --mixed_precision=no --out_dir=out/new",
    "again": "train.py --out_dir=out/run --resume",
    "sample": "sample.py --out_dir=out/run --max_new_tokens=5",
    "report": "report.py --out_dir=out/run --tokens=9",
    "prepare": "prepare.py --dataset=new --source=text.txt --tokenizer=char",
    "remake": "prepare.py --dataset=tiny --source=other.txt --tokenizer=char",
    "convert": "convert.py",
    "mrpc": "finetune_mrpc.py --model=bert --train_file=train.tsv --validation_file=dev.tsv "
            "--max_epochs=2 --log_interval=1 --mixed_precision=no --out_dir=out/new",
    "mrpc-again": "finetune_mrpc.py --out_dir=out/mrpc --mixed_precision=no --resume",
    "roberta": "train_roberta.py --source=text.txt --vocab_size=300 --n_layer=1 --n_head=2 "
               "--n_embd=16 --block_size=16 --max_position_embeddings=40 --batch_size=8 "
               "--max_epochs=3 --max_iters=3 --log_interval=1 --mixed_precision=no "
               "--out_dir=out/new",
    "roberta-again": "train_roberta.py --out_dir=out/roberta --mixed_precision=no --resume",
}


class Finding(AssertionError):
    """What is neither answered clearly nor right, or was lost."""


def need(condition, message):
    if not condition:
        raise Finding(message)


# ---------------------------------------------------------------------------------------------
# a child: a script in a process of its own, without the seconds of imports


def spawn(command, hook=None, env=(), stdout=None):
    """Fork a child that runs a script with its options in this folder. hook: called before it."""
    argv = command if isinstance(command, list) else command.split()
    outputs = [stdout or tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    began, pid = time.monotonic(), os.fork()
    if pid:
        return SimpleNamespace(pid=pid, out=outputs[0], err=outputs[1], began=began, argv=argv)
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(outputs, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
        os.environ.update(env)
        sys.argv = [str(ROOT / argv[0]), *argv[1:]]
        if hook:
            hook()
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def finish(child, timeout=100):
    """Wait for a child: its exit code (a signal's negative), stdout and stderr."""
    status = 0
    while not status and not (status := os.waitpid(child.pid, os.WNOHANG))[0]:
        status = 0
        time.sleep(0.003)
        if time.monotonic() - child.began > timeout:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            raise Finding(f"hangs: still running after {timeout} s")
    texts = []
    for file in (child.out, child.err):
        with contextlib.suppress(OSError):  # a pipe or a device
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    code = os.waitstatus_to_exitcode(status[1])
    return SimpleNamespace(code=code, out=texts[0] if texts[1:] else "", err=texts[-1],
                           seconds=time.monotonic() - child.began)


def run(command, timeout=100, **more):
    return finish(spawn(command, **more), timeout)


def is_clear(done):
    lines = done.err.splitlines()
    return done.code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")


def clear(command, *words, **more):
    """Run a command that must be answered by one clear line, which holds `words`."""
    done = run(command, **more)
    tail = (done.err.strip() or done.out.strip()).splitlines()[-1:]
    need(is_clear(done), f"not clear: exit code {done.code}, {' '.join(tail)[-300:]}")
    need(all(word in done.err for word in words), f"not said {words}: {done.err.strip()[:300]}")
    return done


def right(command, **more):
    """Run a command that must succeed without a traceback."""
    done = run(command, **more)
    tail = " ".join(done.err.strip().splitlines()[-1:])[-300:]
    need(done.code == 0 and "Traceback" not in done.err, f"exit code {done.code}: {tail}")
    return done


def snapshot():
    """{path: content} of the files and links here, but for locks and Python's caches."""
    found = {}
    for path in Path(".").rglob("*"):
        if path.is_symlink():
            found[path.as_posix()] = os.readlink(path)
        elif path.is_file() and path.name != ".lock" and not (path.stat().st_mode & 0o444) == 0:
            found[path.as_posix()] = path.read_bytes()
    return found


def answer(want, command, before=None, after=None, **more):
    """One input: `before` prepares it; want: 'clear', 'ok' or 'either'. Nothing may be lost: no
    file where the answer is an error, nothing outside of out/ and new* where it is a result."""
    if before:
        before()
    had = snapshot()
    if want == "either":
        done = run(command, **more)
        need(is_clear(done) or done.code == 0 and "Traceback" not in done.err,
             f"exit code {done.code}: {' '.join(done.err.strip().splitlines()[-1:])[-300:]}")
    else:
        done = {"clear": clear, "ok": right}[want](command, **more)
    has = snapshot()
    free = () if done.code else ("out/", "new", "data/new")
    lost = [name for name in had if not name.startswith(free) and had[name] != has.get(name)]
    need(not lost, f"changed or gone: {lost[:5]}")
    if after:
        after()


# ---------------------------------------------------------------------------------------------
# the world that each row gets a copy of


def make_world():
    """Texts, data sets, a run of each trainer, an export and a BERT, all tiny, in this folder."""
    text = Path(json.__file__).read_text("utf-8")
    Path("text.txt").write_text(text * 2, "utf-8")
    draw = random.Random(0)
    shuffled = text.split(" ")
    draw.shuffle(shuffled)
    Path("other.txt").write_text(" ".join(shuffled) * 2, "utf-8")  # the same characters
    for name, count in (("train.tsv", 83), ("dev.tsv", 37)):
        rows = ["sentence1\tsentence2\tlabel"]
        for _ in range(count):
            label = int(draw.random() < 0.6)
            words = WORDS[:8] if label else WORDS[8:]
            rows.append(f"{' '.join(draw.choices(WORDS, k=7))}\t"
                        f"{' '.join(draw.choices(words, k=5))}\t{label}")
        Path(name).write_text("\n".join(rows) + "\n")
    right(BASE["prepare"].replace("new", "tiny"))
    right("prepare.py --dataset=bpe --source=text.txt --tokenizer=bpe --vocab_size=300")
    right(BASE["train"] + " --out_dir=out/run --eval_interval=2 --save_interval=3")
    right("convert.py out/run gpt")
    right(BASE["roberta"] + " --out_dir=out/roberta --save_interval=2")
    Path("bert").mkdir()
    for name in train_roberta.MODEL_FILES:
        if Path("out/roberta", name).exists():
            shutil.copy(Path("out/roberta", name), "bert")
    right(BASE["mrpc"] + " --out_dir=out/mrpc")


def put(path, content):
    """Write bytes, text, an array or JSON into a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        with open(path, "wb") as f:
            np.save(f, content, allow_pickle=True)
    elif isinstance(content, dict | list):
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lay_over(path, content):
    """Update a JSON file by a dict; anything else replaces it."""
    if isinstance(content, dict):
        content = json.loads(Path(path).read_text("utf-8")) | content
    put(path, content)


def sign(folder):
    """Make a checkpoint's checksums right: a stranger signs what he sends."""
    files = [p for p in Path(folder).rglob("*") if p.is_file() and p.name != "SHA256SUMS"]
    sums = [f"{runtime.sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    put(Path(folder, "SHA256SUMS"), "".join(sums))


def newest(run):
    return runtime.checkpoints(run)[0]


def text_of(folder):
    """The text of a data set, decoded from its tokens, whatever document they belong to."""
    tokenizer = prepare.load_tokenizer(folder)
    return "".join(tokenizer.decode(np.load(Path(folder, f"{s}.npy"))) for s in ("train", "val"))


# ---------------------------------------------------------------------------------------------
# inputs: options. A word is one input, written as in a URL; & joins the options of one input.

BIG = str(2**64)
OPTIONS = f"""
train clear: --seed=-1 --seed={BIG} --seed=1.5 --seed= --n_head=3 --n_head=0 --n_embd=0 --n_layer=-1
  --block_size=0 --block_size=1000000 --batch_size=0 --batch_size=1000000000 --max_iters=-1
  --gradient_accumulation_steps=0 --max_iters={BIG} --max_iters=1e3 --max_epochs=nan --minutes=nan
  --minutes=1 --learning_rate=nan --learning_rate=inf --learning_rate=-1 --min_lr=nan --dropout=1
  --dropout=nan --beta1=1 --weight_decay=nan --momentum=1 --grad_clip=nan
  --eval_iters=0 --log_interval=0 --keep_checkpoints=0 --rope_theta=nan --rope_theta=0
  --rope_theta=inf --norm_eps=nan --norm_eps=-1 --n_kv_head=3 --n_kv_head=0 --head_dim=3
  --n_inner=0 --dataset=nope --dataset=../tiny --dataset= --dataset={"x" * 300} --dataset=%2Fetc
  --dataset=a%0Ab --data_dir=nope --data_dir=text.txt --out_dir=text.txt --out_dir=text.txt/x
  --out_dir=/dev/null/x --out_dir=/proc/x --out_dir={"y" * 300} --init_from=nope --init_from=no/pe
  --init_from=a/b/c --init_from=text.txt --init_from= --mixed_precision=bf8 --optimizer=sgd
  --sample_start=%FF --sample_start=FILE:nope --sample_start=FILE:data --log_with=wandb --resume
  --resume=maybe --resume&--overwrite --tokens_per_s=9 --typo=1 --n-laier=1 --n_layer 7 nope.py
  --bias=2 --init=xavier --init=local&--rope_theta=None
  --sample_tokens=-1 --sample_temperature=nan --dry_run&--dataset=nope
  --save_interval=-1 --eval_interval=-2 --embedding_lr=nan --head_lr=-1 --out_dir=out/run
  --out_dir=out/mrpc --n_head=3&--out_dir=out/run&--overwrite data text.txt
  --dataset=nope&--out_dir=out/run&--overwrite
train ok: --block_size=1 --block_size=3 --block_size=7 --n_embd=24&--head_dim=8 --n_embd=100
  --n_embd=33&--head_dim=2 --n_embd=50&--n_head=1 --n_embd=2&--n_head=1 --n_head=4&--n_kv_head=1
  --batch_size=7&--gradient_accumulation_steps=3 --max_iters=0 --max_iters=1 --learning_rate=0
  --min_lr=9 --dropout=0.999 --seed={2**63 - 1} --grad_clip=0 --rope_theta=None --tie_weights
  --rms_norm=False&--swiglu=False&--bias --optimizer=adamw&--schedule=cosine --sample_tokens=70
  --eval_interval=1&--save_interval=1&--keep_checkpoints=1 --sample_temperature=0 --n-layer=2
  --sample_start=%F0%9F%98%80 --sample_start=%0A --sample_start= --log_interval=1000000000
  --dry_run --mixed_precision=fp16 --mixed_precision=bf16 --dataset=bpe --log_with=tensorboard
  --out_dir=out/%E6%97%A5%20%F0%9F%98%80 --weight_decay=0&--momentum=0 --n_inner=1
  --warmup_iters=100
free ok: --max_epochs=0.01 --minutes=0.0001 --max_epochs=1e-9 --init_from=gpt&--max_iters=2
  --dry_run&--init_from=gpt&--max_iters=2
free clear: --init_from=gpt&--n_layer=2 --init_from=gpt&--dataset=bpe
  --init_from=gpt&--block_size=99 --init_from=bert --init_from=data --init_from=out/run
  --dry_run&--init_from=bert
again clear: --max_iters=4 --max_epochs=0.001 --n_layer=2 --n_embd=32 --block_size=8 --init=torch
  --optimizer=adamw --rope_theta=None --dataset=bpe --dataset=nope --batch_size=0 --dropout=1
  --tie_weights --init_from=gpt --n_head=1 --overwrite --seed={BIG}
  --max_iters=6&--batch_size=1
again ok: --max_iters=5 --max_iters=7 --max_epochs=0.1
  --max_iters=6&--batch_size=1&--gradient_accumulation_steps=3
  --max_iters=9&--dropout=0.3&--learning_rate=0 --max_iters=8&--sample_tokens=0 --warmup_iters=99
sample clear: --seed=-1 --seed={BIG} --num_samples=0 --max_new_tokens=0 --temperature=nan --top_k=0
  --temperature=inf --temperature=-1 --top_p=0 --top_p=1.1 --top_p=nan --num_beams=0 --start=%FF
  --num_beams=2&--top_k=3 --num_beams=2&--num_samples=2 --start=FILE:nope --start=FILE:data
  --start=a%FEb --start=FILE: --start=FILE:{"z" * 300} --checkpoint=nope --checkpoint=/etc
  --checkpoint=checkpoint-000099 --checkpoint=../mrpc/best --checkpoint=run.json --out_dir=nope
  --out_dir=out/mrpc --out_dir=out/roberta --out_dir=data/tiny --out_dir=text.txt --init_from=nope
  --init_from=no/pe --init_from=bert --init_from=data --init_from=text.txt --quantize=int2 --chat
  --typo --kv_cache=0.5 sample.txt
sample ok: --temperature=0 --temperature=1e-300 --temperature=1e300 --top_k={2**62} --top_p=1e-9
  --top_p=1 --num_beams=7 --num_beams=200 --num_samples=3 --start= --start=%F0%9F%98%80
  --start={"def%20" * 9} --kv_cache=False --stop_at_eos=False --max_new_tokens=40 --quantize=int8
  --quantize=int4 --quantize=bf16 --init_from=gpt --init_from=gpt&--quantize=int8 --interactive
  --checkpoint=best --seed={2**63 - 1} --start=FILE:text.txt&--max_new_tokens=1
report clear: --layer=1 --layer=-2 --head=2 --head=-1 --tokens=0 --temperature=nan --start=FILE:nope
  --start=%FF --out=nope/x.html --out=data --out=text.txt/x.html --out_dir=nope --out_dir=gpt
  --out_dir=out/mrpc --out_dir=out/roberta --compare&nope --compare&out/run&out/mrpc --run=x
  --checkpoint=nope --seed={BIG} --tokens=1.5
report ok: --tokens=1 --tokens=2 --tokens=1000000 --start=%F0%9F%98%80 --out=
  --start=&--temperature=0 --compare&out/run --out=new.html&--layer=-1&--head=1
prepare clear: --dataset={"x" * 300} --dataset=a/b --dataset=.. --dataset= --dataset=.hidden
  --dataset=a%0Ab --source=nope.txt --source=none* --source= --source=/dev --source=data
  --source=/dev/null --source=gpt/model.safetensors --source=hf:no/pe --source=hf:
  --source=hf::en --source --source&hf:no/pe&text.txt --source=ftp://user:p@host/x
  --source=file:///etc/passwd
  --source=http:// --source=https:/x --source=http://127.0.0.1:1/x --source=http://[::1/x
  --source=http://a%20b/c --tokenizer=nope --tokenizer=data --tokenizer=bert/config.json
  --tokenizer=text.txt --tokenizer=bpe&--vocab_size=1 --tokenizer=bpe&--vocab_size=1000000000
  --tokenizer=bpe&--vocab_size=90000 --tokenizer=bpe&--vocab_size=-1 --vocab_size=300
  --val_fraction=0 --val_fraction=1 --val_fraction=nan --val_fraction=-1 --shard=1/1 --shard=x
  --shard=0/0 --shard=-1/2 --shard=0/2 --shard=0/1000 --shard=0/2&--tokenizer=bert
  --data_dir=text.txt --data_dir=/dev/null/x --data_dir=/proc/x
prepare ok: --val_fraction=0.5 --val_fraction=0.999 --val_fraction=0.001 --tokenizer=bert
  --tokenizer=bpe&--vocab_size=257 --tokenizer=bpe&--vocab_size=261 --source=./text.txt
  --tokenizer=bert/tokenizer.json --source&text.txt&other.txt --source=*.txt
  --source&text.txt&text.txt --dataset=%E6%97%A5 --dataset=my.data-2 --dataset=tiny
convert clear: out/run out/run&data out/run&text.txt out/run&text.txt/x nope&new out/mrpc&new
  out/roberta&new out/mrpc/best&new data/tiny&new gpt&new text.txt&new out/run&new&--format=x
  out/run&new&--dtype=q4 out/run&new&more out/run&/proc/x out/run&/dev/null --run=out/run
  out/run&out/run --format=hf --typo&a&b
convert ok: out/run&new out/run/best&new out/run/checkpoint-000005&new out/run&new/deep/er
  out/run&new/%E6%97%A5%20x --run=out/run&--folder=new
convert either: out/run&new&--format=gguf out/run&new&--format=gguf&--dtype=q8_0
mrpc clear: --max_epochs=0 --max_epochs=1.5 --batch_size=0 --batch_size=84 --batch_size=1000000
  --learning_rate=nan --learning_rate=-1 --seeds=1 --seeds=1,1 --seeds=x --seeds=1,-2 --seeds=1,,2
  --seeds=1,{BIG} --columns=a,b --columns=a,a,b --columns=a,b,c --columns= --predict&a&b&c --predict
  --predict&%20&%20 --predict&nope --predict&out --compare --compare&out/mrpc --compare&nope&nope
  --compare&out/run&out/mrpc --max_length=3 --max_length=-1 --max_length=1000000 --model=nope
  --train_file=nope --train_file=data --train_file=text.txt --train_file=gpt/model.safetensors
  --validation_file=nope --model=no/pe --model=data --model=out/run --model=text.txt --epochs=3
  --lr=1 --eval_only --warmup_iters=1000000000 --weight_decay=nan --grad_clip=nan
  --seed=-1 --seed={BIG} --out_dir=out/mrpc --out_dir=bert --out_dir=text.txt --resume
  --length_window=-1 --keep_checkpoints=0 --eval_batch_size=0 --train_file= --typo=1
  --out_dir=out/mrpc&--overwrite&--model=nope --out_dir=out/mrpc&--overwrite&--columns=a,b,c
  --out_dir=out/mrpc&--overwrite&--train_file=nope
  --out_dir=out/mrpc&--overwrite&--model=out/mrpc/best
mrpc ok: --batch_size=83 --batch_size=7&--gradient_accumulation_steps=3 --max_iters=1 --max_length=8
  --length_window=0&--both_orders --seeds=1,2&--max_iters=1 --validation_file=
  --test_file=dev.tsv&--max_iters=2 --eval_batch_size=1 --predict&dev.tsv&--model=out/mrpc/best
  --eval_only&--model=out/mrpc/best --compare&out/mrpc&out/mrpc --learning_rate=0
  --predict&%F0%9F%98%80&%F0%9F%98%80&--model=out/mrpc/best
mrpc-again clear: --max_epochs=1 --max_iters=3 --batch_size=3 --seed=1 --train_file=dev.tsv
  --model=nope --max_length=9 --both_orders --seeds=1,2 --overwrite
  --validation_file=train.tsv
mrpc-again ok: --log_interval=2 --max_epochs=3 --max_epochs=3&--max_iters=23
roberta clear: --n_head=3 --n_head=0 --n_embd=0 --n_layer=0 --block_size=2 --block_size=1000
  --max_position_embeddings=5 --vocab_size=1 --batch_size=0 --max_epochs=0 --max_epochs=nan
  --max_epochs=inf --max_iters=-1 --max_iters=1000000 --learning_rate=nan --dropout=1
  --mlm_probability=0 --mlm_probability=1 --val_fraction=1 --seed=-1 --seed={BIG} --init_std=nan
  --grad_clip=-1 --source=nope.txt --source= --source=gpt/model.safetensors --tokenizer=nope
  --tokenizer=data --tokenizer=gpt --tokenizer=data/bpe/tokenizer.json --out_dir=out/roberta
  --out_dir=bert --out_dir=bert&--overwrite --out_dir=text.txt --max_steps=1 --typo=1 --resume
  --fill_mask=nothing --fill_mask=%3Cmask%3E --optimizer=sgd --out_dir=out/run --log_interval=0
  --fill_mask={"a" * 200}%3Cmask%3E&--out_dir=out/roberta --fill_mask=none&--out_dir=out/roberta
  --fill_mask=%3Cmask%3E&--out_dir=out/run --fill_mask=%3Cmask%3E&--out_dir=out/mrpc
  --out_dir=out/roberta&--overwrite&--n_head=3 --out_dir=out/roberta&--overwrite&--source=nope
  --out_dir=out/roberta&--overwrite&--tokenizer=nope --max_position_embeddings=0
  --out_dir=out/roberta&--overwrite&--max_iters=99999
  --data_dir=text.txt&--source=http://127.0.0.1:1/x --source=azwiki --source=hf:no/pe
roberta ok: --block_size=3 --block_size=7 --packing --n_embd=33&--n_head=1 --n_embd=50 --max_iters=1
  --val_fraction=0 --batch_size=7&--gradient_accumulation_steps=3 --mlm_probability=0.99
  --tokenizer=bert --muon_lr=0.02&--local_heads --local_heads&--n_embd=33&--n_head=1
  --dropout=0&--init_std=0 --warmup_iters=9 --save_interval=1 --grad_clip=0
  --fill_mask=a%20%3Cmask%3E%20b%20%3Cmask%3E&--out_dir=out/roberta --eval_interval=1
roberta-again clear: --max_iters=2 --n_layer=2 --seed=1 --source=other.txt --packing
  --max_iters=99999 --batch_size=3 --tokenizer=gpt --optimizer=muon --muon_lr=0.02 --local_heads
roberta-again ok: --max_iters=3 --max_iters=5 --max_epochs=4&--max_iters=4
"""


def option_rows():
    """(name, function) for each input of OPTIONS."""
    for line in OPTIONS.replace("\n  ", " ").strip().splitlines():
        head, words = line.split(":", 1)
        base, want = head.split()
        for word in words.split():
            options = [unquote(option, errors="surrogateescape") for option in word.split("&")]
            command = BASE[base].split()
            place = len(command) if base == "convert" or options[0].startswith("-") else 1
            command[place:place] = options  # a config file comes first
            yield f"{base} {word[:70]}", functools.partial(answer, want, command)


# ---------------------------------------------------------------------------------------------
# inputs: texts, by the answers of prepare.py char, of its bpe and of train_roberta.py: (c)lear,
# (o)k, (e)ither

WANTED = {"c": "clear", "o": "ok", "e": "either"}
DNA = "".join(random.Random(1).choices("ACGT", k=400_000))
TEXTS = {
    "ccc": ["", "caf\xe9 cr\xe8me\n".encode("latin-1") * 99, ("abc\n" * 99).encode("utf-16"),
            b"abc def\n" * 99 + b"\xf0\x9f\x98", b"ab \xed\xa0\x80 c\n" * 99, b"a \xc0\xaf\n" * 99,
            gzip.compress(b"abc def\n" * 999), bytes(range(256)) * 40,
            b"abc def\n" * 30_000 + b"\xff"],
    "cce": ["x", "xy", "\ufeff", "\0"], "oee": ["a b\nc d\ne f\n"],
    "ooc": ["\n" * 3000, " \t\r\n\x0b\x0c" * 900, " " * 300_000],
    "ooe": ["a" * 3000, "e\u0301\u0323\u200d" * 999, DNA, "word " * 60_000,
            DNA.replace("G", "g/").replace("T", "T+"), "".join(map(chr, range(0x4E00, 0x59B8)))],
    "ooo": [line * 99 for line in (
        "a b c\r\nd e f\r\n\r\n", "a b\rc d\r", "\ufeffone two\nthree\n", "a\0b c\0\0 d\n",
        "👩‍👩‍👧‍👦 🏳️‍🌈 é 🇦🇿\n", "\U0010ffff\ue000 \ufffe\n", "吾輩は猫である。名前はまだ無い。\n",
        "क्षत्रिय हिन्दी\n", "مرحبا بالعالم\u200f\n", "əğşİı Bakı\n", "a\u2028b\u2029c\x85d\x1ce\n",
        "<|endoftext|> <mask> <s> </s> <pad> [SEP]\n", "## iteration 3: val loss 1.0\n\n~~~~\n",
        "3.14159 2,718 ٣٤ ²³\n", "!?...--()[]{}\n", "".join(map(chr, range(128))))],
}


def text_rows():
    """(name, function) for each text and each way to tokenize it."""
    bases = {"char": BASE["prepare"], "bpe": BASE["prepare"] + " --tokenizer=bpe",
             "roberta": BASE["roberta"]}
    for letters, texts in TEXTS.items():
        for text in texts:
            text = text.encode() if isinstance(text, str) else text
            for letter, (kind, command) in zip(letters, bases.items(), strict=True):
                def same(text=text, kind=kind):
                    same = kind == "roberta" or text_of("data/new").encode() == text
                    need(same, "another text comes back")

                yield f"{kind} {text[:30]!r}", functools.partial(
                    answer, WANTED[letter], command.replace("text.txt", "odd"),
                    functools.partial(put, "odd", text), same if letter == "o" else None)


# ---------------------------------------------------------------------------------------------
# inputs: files that are not what they should be. A dict is laid over a JSON file, a function makes
# the content from the path, anything else replaces the file; checksums are made right.


def header(text, version=b"\x01\x00"):
    """An .npy file with this header and 64 bytes."""
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + bytes(64)


def archive():
    """A .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(9))
    return buffer.getvalue()


SHAPE = "{'descr': '<u2', 'fortran_order': False, 'shape': %s}"
ARRAYS = [b"", b"hello", archive(), b"\x93NUMPY\x01", header(SHAPE % "(99999,)"),
          header(SHAPE % "(-5,)"), header(SHAPE % f"({10**15},)"), header(SHAPE % "'x'"),
          header("__import__('os').system('touch ran')"), header(SHAPE % "(9,)", b"\x09\x00"),
          np.zeros(7, np.uint16), *(
    lambda path, kind=kind: np.ones(len(np.load(path)), kind)
    for kind in ("f4", "c16", "U1", "i4,i4", "?", "M8[s]", "O", ">u2")), *(
    lambda path, value=value: np.full(len(np.load(path)), value)
    for value in (-1, 60_000, 2**63)),
    lambda path: np.load(path)[None], lambda path: np.load(path)[:, None], None]
META = ["", "{", "[]", "null", b"\xff\xfe", "[" * 100_000, None, {"tokenizer_sha256": "0"}, *(
    {name: value} for name, values in {
        "vocab_size": (10**12, 0, -1, "x", None, 50, [1]), "eot_id": (-1, 10**9, None, math.inf),
        "tokenizer": (None, "nope", "bpe", ["gpt2"], "../../../etc/passwd"), "format_version": (9,),
        "train_tokens": (-1, 0, "many", {}), "val_tokens": (10**30, math.nan)}.items()
    for value in values)]
TOKENIZERS = ["", "{}", "[]", "null", b"\xff", '{"version": "9"}', None,
              '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}']
RUNS = ["", "{", "[]", "{}", "null", b"\xff", None, *(
    {name: value} for name, values in {
        "model": (None, [], {}, {"n_layer": "x"}, {"n_layer": 1.5}, {"oops": 1}, {"n_embd": 32}),
        "train": (None, {}, [], {"learning_rate": "x"}, {"dataset": 7}), "iter": (None, "x", -3),
        "val_loss": (None, [1]), "train_loss": (None,), "best_val_loss": ("x",),
        "resumed": (7,), "seconds": ("x",), "skipped": ("x",), "machine": (3,), "started": ([1],),
        "config": (3, {"seed": "x"}), "state": ({}, {"iteration": "x"}), "same": (3,),
        "n_layer": ("x",)}.items()
    for value in values)]
SUMS = ["", None, "abc", b"\xff\xfe\n", "0  ../../x\n", "0  /dev/zero\n", "0  pipe\n", "0  nope\n",
        "0  .\n", "0  a\0b\n", f"0  {'x' * 5000}\n", "\n\n", "0  run.json\n"]
CONFIGS = ["", "{", "[]", "null", "{}", b"\xff", None, {"rope_parameters": [1]}, *(
    {name: value} for name, values in {
        "model_type": ("nope", None, [], 3), "n_layer": ("x",), "hidden_size": (-1, 33),
        "vocab_size": (10**12, 9), "num_hidden_layers": ("x", 7), "num_attention_heads": (0,),
        "architectures": (5,), "rope_theta": ("x",), "head_dim": (3,),
        "max_position_embeddings": (-1,)}.items() for value in values)]
LENGTH = (2).to_bytes(8, "little")
WEIGHTS = [b"", b"hello", (2**62).to_bytes(8, "little"), LENGTH + b"{}", LENGTH + b"[]", None,
           lambda path: {"x": torch.zeros(1)}, lambda path: dict([*load_file(path).items()][1:]),
           lambda path: load_file(path) | {"more": torch.zeros(3)},
           lambda path: {k: torch.zeros(*v.shape, 2) for k, v in load_file(path).items()}]
HEAD = "sentence1\tsentence2\tlabel\n"
MANY = "he sold it\tit was sold\t1\nthe firm\ta plant\t0\n" * 20
PAIRS = {
    "clear": ["", HEAD, HEAD + "a\tb\t1\n", HEAD + "a\tb\t1\na\tb\t0\nc\td\t0\n", MANY,
              HEAD + MANY + "\tb\t1\n", HEAD + MANY + " \tb\t1\n", HEAD + MANY + "a\tb\n",
              HEAD + MANY + "a\tb\t1\t9\n", HEAD + MANY + "a\tb\tyes\n", HEAD + MANY + "a\tb\t-1\n",
              "sentence1\tsentence1\tlabel\n" + MANY, HEAD.encode() + b"\xe9\tb\t1\n" * 20,
              (HEAD + MANY).replace("\t", ",") + '"a,b,1\n', (HEAD + MANY).encode("utf-16"),
              gzip.compress((HEAD + MANY).encode())],
    "ok": [HEAD + MANY.replace("\n", ".0\n"), HEAD + "a\tb\t1\n" * 20, HEAD + "NA\tnull\t1\n" * 20,
           HEAD + MANY + "a\tb\t2\n" * 20, HEAD + MANY + "a\0b\tc\t1\n" * 2, "\ufeff" + HEAD + MANY,
           HEAD.strip() + "\tQuality\n" + MANY.replace("\n", "\t1\n"), HEAD + MANY + '"a\tb"\t1\n',
           (HEAD + MANY).replace("\n", "\r\n"), (HEAD + MANY).replace("\t", ","),
           HEAD + "👩‍👧\t日本\t1\nəğ\tمرحبا\t0\n" * 20, HEAD + "a " * 9000 + "\tb\t1\n" + MANY,
           HEAD + MANY.replace("1\n", "yes\n")],
}
JSONL = ["[1, 2]\n", '{"sentence1": "a"', "null\n", "hello\n", "", "{}\n" * 9, *(
    (json.dumps({"sentence1": text, "sentence2": "b", "label": 1}) + "\n") * 9
    for text in (1, None, ["a"], {"a": 1}))]
RESUME = {base: f"{BASE[base + '-again']} --max_epochs=5" for base in ("mrpc", "roberta")}
USERS = {"again": BASE["again"] + " --max_iters=6", "sample": BASE["sample"],
         "report": BASE["report"], "convert": "convert.py out/run new"}
RUN_USERS = [*USERS.values()]
FROM = BASE["free"] + " --max_iters=2 --init_from=gpt"
ONE = BASE["mrpc"] + " --max_iters=1"
FILES = [  # (file, contents, commands that read it, answer)
    ("data/tiny/train.npy", ARRAYS, [BASE["train"]], "clear"),
    ("data/tiny/val.npy", ARRAYS[::3], [BASE["train"]], "clear"),
    ("data/tiny/meta.json", META, [BASE["train"]], "clear"),
    ("data/tiny/tokenizer.json", TOKENIZERS, [BASE["train"]], "clear"),
    ("out/run/*/meta.json", META, RUN_USERS[:2], "either"),
    ("out/run/*/tokenizer.json", TOKENIZERS, RUN_USERS[1:2], "clear"),
    ("out/run/*/tokenizer.json", TOKENIZERS, RUN_USERS[:1], "either"),  # it has the data's
    ("out/run/*/run.json", RUNS, RUN_USERS, "either"),
    ("out/mrpc/*/run.json", RUNS, [RESUME["mrpc"]], "either"),
    ("out/roberta/*/run.json", RUNS, [RESUME["roberta"]], "either"),
    ("out/run/*/SHA256SUMS", SUMS, RUN_USERS, "clear"),
    ("out/run/*/model.safetensors", WEIGHTS, RUN_USERS[:2], "clear"),
    ("out/mrpc/*/model.safetensors", WEIGHTS, [RESUME["mrpc"]], "clear"),
    ("out/roberta/*/model.safetensors", WEIGHTS, [RESUME["roberta"]], "clear"),
    ("gpt/model.safetensors", WEIGHTS, [FROM], "clear"),
    ("gpt/config.json", CONFIGS, [FROM], "either"),
    ("bert/model.safetensors", WEIGHTS, [ONE], "either"),
    ("bert/config.json", CONFIGS, [ONE], "either"),
    ("bert/tokenizer.json", TOKENIZERS, [ONE, BASE["roberta"] + " --tokenizer=bert"], "either"),
    ("dev.jsonl", JSONL, [BASE["mrpc"] + " --validation_file=dev.jsonl"], "clear"),
    ("dev.parquet", [HEAD, ""], [BASE["mrpc"] + " --validation_file=dev.parquet"], "clear"),
    *(("odd", contents, [ONE + " --train_file=odd --validation_file="], want)
      for want, contents in PAIRS.items()),
]


def damage(pattern, content):
    """Change each file of the pattern, or make it."""
    for path in sorted(Path(".").glob(pattern)) or [Path(pattern)]:
        made = content(path) if callable(content) else content
        if made is None:
            path.unlink()
        elif isinstance(made, dict) and path.suffix == ".safetensors":
            save_file(made, path)
        else:
            lay_over(path, made)
        if path.name == "SHA256SUMS":
            os.mkfifo(path.parent / "pipe")
        elif (path.parent / "SHA256SUMS").exists():
            sign(path.parent)


def file_rows():
    """(name, function) for each row of FILES."""
    for pattern, contents, commands, want in FILES:
        for i, content in enumerate(contents):
            for command in commands:
                yield f"{pattern} {i} {str(content)[:40]!r} {command[:10]}", functools.partial(
                    answer, want, command, functools.partial(damage, pattern, content), timeout=60)


# ---------------------------------------------------------------------------------------------
# inputs: URLs, answered by a server here

PAGE = b"one two three four five\n" * 300
GZIP = {"Content-Encoding": "gzip"}
ANSWERS = {  # path: (answer, status, headers, body)
    "/ok.txt": ("ok", 200, {}, PAGE), "/gzip": ("ok", 200, GZIP, gzip.compress(PAGE)),
    "/to-ok": ("ok", 301, {"Location": "/ok.txt"}, b""), "/404": ("clear", 404, {}, b"no"),
    "/500": ("clear", 500, {}, b"no"), "/cut": ("clear", 200, {"Content-Length": "99999"}, PAGE),
    "/bad-length": ("either", 200, {"Content-Length": "abc"}, PAGE),
    "/negative": ("either", 200, {"Content-Length": "-5"}, PAGE),
    "/x%2f..": ("either", 200, {}, PAGE),
    "/short": ("either", 200, {"Content-Length": "100"}, PAGE), "/closed": ("clear", None, {}, b""),
    "/loop": ("clear", 302, {"Location": "/loop"}, b""), "/nowhere": ("either", 302, {}, b""),
    "/to-file": ("clear", 302, {"Location": "file:///etc/passwd"}, b""),
    "/to-bad": ("clear", 302, {"Location": "http://[::x/"}, b""),
    "/empty": ("clear", 200, {"Content-Length": "0"}, b""), "/not-gzip": ("clear", 200, GZIP, PAGE),
    "/latin-1": ("clear", 200, {}, b"caf\xe9 " * 99), "/garbage": ("clear", None, {}, b"hello\n"),
    "/chunks": ("clear", 200, {"Transfer-Encoding": "chunked"}, PAGE),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        _, status, headers, body = ANSWERS.get(self.path.partition("?")[0], ANSWERS["/404"])
        if status:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
        self.wfile.write(body)


def url(path, base):
    """A URL with a user, a password and a query: no file and no line may repeat them."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        server.serve_forever()
    source = f"http://user:PASSWORD@127.0.0.1:{server.server_address[1]}{path}?token=SECRET"
    command = BASE[base].replace("text.txt", source)
    try:
        answer(ANSWERS[path][0], command, timeout=30)
        done = run(command)
        if base == "prepare" and ANSWERS[path][0] == "ok":
            done.out += right(BASE["train"] + " --dataset=new").out
            done.out += right("report.py --out_dir=out/new").out
            done.out += right("convert.py out/new new").out
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for secret in ("PASSWORD", "SECRET"):
        held = [name for name, content in snapshot().items() if secret in str(content)]
        need(not held and secret not in done.out + done.err, f"{secret} in {held} or printed")


def url_rows():
    """(name, function) for each URL, where this machine can talk to itself."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 0)):
        for path in ANSWERS:
            for base in ("prepare", "roberta"):
                yield f"{base} {path}", functools.partial(url, path, base)


# ---------------------------------------------------------------------------------------------
# inputs: scenarios, which are several commands or look at the result

SCENARIOS = {"inputs: scenarios": [], "faults": [], "pickles": []}


def row(section, *cases):
    """Decorator: the function is a row of the section, or one for each of the cases."""
    def add(function):
        name = function.__name__.replace("_", " ")
        for case in cases or [()]:
            case = case if isinstance(case, tuple) else (case,)
            label = f"{name} {', '.join(map(repr, case))}"[:90]
            SCENARIOS[section].append((label, functools.partial(function, *case)))
        return function
    return add


inputs, faults = (functools.partial(row, section) for section in list(SCENARIOS)[:2])
TRAINERS = ("train", "mrpc", "roberta")
RUN_OF = {"train": "out/run", "mrpc": "out/mrpc", "roberta": "out/roberta"}


def largest_change(one, other):
    """The largest difference of any weight of two checkpoints."""
    one, other = (load_file(Path(path, "model.safetensors")) for path in (one, other))
    return max((one[name] - other[name]).abs().max().item() for name in one)


@inputs((8, 1, 4, 2), (3, 1, 1, 3), (4, 3, 6, 2), (1, 7, 7, 1))
def resumed_with_another_accumulation(b, a, b2, a2):
    command = (f"{BASE['train']} --optimizer=adamw --dropout=0 --batch_size={b} "
               f"--gradient_accumulation_steps={a} --max_iters=10")
    right(command)
    stopped = run(command + " --out_dir=out/two", hook=at_iteration(5, signal.SIGTERM))
    need(stopped.code == 143, f"SIGTERM: exit code {stopped.code}")
    right(f"{BASE['again']} --out_dir=out/two --batch_size={b2} "
          f"--gradient_accumulation_steps={a2}")
    change = largest_change(newest("out/new"), newest("out/two"))
    need(change < 1e-3, f"{change} from the weights of a run that went on as before")


@inputs(*TRAINERS)
def another_text_under_resume(base):
    if base == "train":
        right(BASE["remake"])
    else:
        path = Path({"mrpc": "dev.tsv", "roberta": "text.txt"}[base])
        path.write_text(path.read_text().replace("e", "a", 9))
    answer("clear", BASE["again"] + " --max_iters=9" if base == "train" else RESUME[base])


@inputs()
def a_text_that_the_tokenizer_cannot_write():
    put("ja.txt", "吾輩は猫である。\n" * 999)
    answer("clear", BASE["prepare"].replace("text.txt", "ja.txt").replace("=char", "=data/tiny/tok"
                                                                         "enizer.json"))


@inputs(8, 20, 24, 33, 40, 50, 56, 72, 100, 250, 300)
def quantized_products_of_an_odd_width(width):
    torch.manual_seed(0)
    linear = model_file.Linear(width, 61)
    for kind, most in (("int8", 0.02), ("int4", 0.2), ("bf16", 0.02)):
        packed = fast.QuantizedLinear(linear, kind)
        for rows in (1, 3):
            x = torch.randn(rows, width)
            with torch.no_grad():
                error = ((packed(x) - linear(x)).norm() / linear(x).norm()).item()
            need(error < most, f"{kind}, {rows} rows: {error}")


@inputs()
def a_model_with_the_opposite_labels():
    shutil.copytree("out/mrpc/best", "turned")
    names = ["equivalent", "not_equivalent"]
    lay_over("turned/config.json", {"id2label": dict(enumerate(names)),
                                    "label2id": {name: i for i, name in enumerate(names)}})
    weights = load_file("turned/model.safetensors")
    for name in [name for name in weights if "out_proj" in name]:
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, "turned/model.safetensors", {"format": "pt"})
    for model in ("out/mrpc/best", "turned"):
        right(f"{BASE['mrpc']} --eval_only --model={model} --out_dir=out/{Path(model).name}")
    one, other = (Path(f"out/{name}/eval-predictions.tsv").read_bytes()
                  for name in ("best", "turned"))
    need(one == other, "the same model with its labels exchanged predicts something else")


@inputs("## iteration 3: val loss 1.0\n\n~~~~\nx\n~~~~\n\n", "a\r\nb\rc\n", "~~~~~\n" * 9)
def a_text_like_samples_md(text):
    put("odd.txt", text * 200)
    right("prepare.py --dataset=odd --source=odd.txt --tokenizer=char")
    right(BASE["train"] + " --dataset=odd --eval_interval=1 --save_interval=2 --keep_checkpoints=9 "
          "--sample_tokens=60")
    whole = Path("out/new/samples.md").read_bytes()
    for checkpoint in runtime.checkpoints("out/new")[:-1]:
        shutil.rmtree(checkpoint)
    right(BASE["again"] + " --out_dir=out/new")
    need(Path("out/new/samples.md").read_bytes() == whole, "samples.md differs after a resume")


@inputs("# My run\n\n", "My run\n======\n", "\ufeff", "\r\n")
def a_title_on_top_of_samples_md(title):
    path = Path("out/run/samples.md")
    path.write_bytes(title.encode() + path.read_bytes())
    right(BASE["again"] + " --max_iters=7 --eval_interval=1")
    need(path.read_bytes().startswith(title.encode()), "the title is gone")
    right(BASE["report"])


@inputs(2, 3, 4, 7, 30)
def few_documents_validate_a_tenth(n):
    for k in range(n):
        put(f"docs/{k}.txt", f"document {k} " * (300 * (k % 3 + 1)))
    right("prepare.py --dataset=new --source=docs --tokenizer=char")
    train_tokens, val_tokens = (len(np.load(f"data/new/{s}.npy")) for s in ("train", "val"))
    share = val_tokens / (train_tokens + val_tokens)
    need(0.04 < share < 0.21, f"{share:.2f} of the tokens validate")


@inputs("best", "checkpoint", "log.csv", "finished")
def what_is_left_of_a_run_is_not_replaced_unasked(left):
    base = "roberta" if left == "finished" else "train"
    for folder in runtime.checkpoints(RUN_OF[base]) if left != "checkpoint" else ():
        shutil.rmtree(folder)
    if left == "log.csv":
        shutil.rmtree("out/run/best")
    answer("clear", f"{BASE[base]} --out_dir={RUN_OF[base]}")


@inputs(*TRAINERS)
def a_long_run_saves_by_time(base):
    def hurry():
        runtime.SAVE_SECONDS = -1
        at_iteration(5, signal.SIGKILL)()
    done = run(BASE[base] + " --max_iters=9", hook=hurry)
    need(done.code == -9 and runtime.checkpoints("out/new"), "no checkpoint when it was time")


@inputs(*TRAINERS)
def out_dir_is_the_folder_of_the_model(base):
    folder = {"train": "gpt"}.get(base, "bert")
    command = {"train": FROM, "mrpc": BASE["mrpc"],
               "roberta": BASE["roberta"] + " --tokenizer=bert"}
    had = {path: path.read_bytes() for path in Path(folder).iterdir()}
    done = run(f"{command[base]} --out_dir={folder}")
    need(is_clear(done) or done.code == 0, done.err[-300:])
    need(all(p.exists() and p.read_bytes() == had[p] for p in had), "the model's files changed")


@inputs()
def eval_only_keeps_the_results_of_the_run():
    had = snapshot()
    right(BASE["mrpc"] + " --eval_only --validation_file=train.tsv --out_dir=out/mrpc")
    changed = [name for name, content in snapshot().items() if had.get(name, content) != content]
    need(not changed, f"changed: {changed}")


@inputs()
def a_head_padded_past_the_tokenizer():
    weights = load_file("gpt/model.safetensors")
    for name in [name for name in weights if "embed_tokens" in name or "lm_head" in name]:
        weights[name] = torch.cat((weights[name], torch.randn(999, weights[name].size(1))))
    size = json.loads(Path("gpt/config.json").read_text())["vocab_size"]
    lay_over("gpt/config.json", {"vocab_size": size + 999})
    save_file(weights, "gpt/model.safetensors", {"format": "pt"})
    right(FROM + " --sample_tokens=200 --eval_interval=1")
    for command in ("sample.py --out_dir=out/new", "report.py --out_dir=out/new",
                    "sample.py --init_from=gpt"):
        right(command + " --temperature=9")


@inputs(*[(base, env) for base in TRAINERS for env in (
    "RANK=1", "RANK=0", "RANK=0 WORLD_SIZE=2", "WORLD_SIZE=2", "RANK=1 WORLD_SIZE=2",
    "WORLD_SIZE=x", "RANK=x WORLD_SIZE=1")])
def ranks_that_are_set_in_part(base, env):
    answer("clear", BASE[base], env=dict(part.split("=") for part in env.split()))


@inputs("", " --num_samples=2", " --num_beams=2")
def escape_sequences_do_not_reach_a_terminal(option):
    put("odd.txt", "\x1b]0;title\x07 \x1b[31mred\x1b[0m \x9b31m\x90 \x08\x08 \x7f\n" * 200)
    right("prepare.py --dataset=odd --source=odd.txt --tokenizer=char")
    right(BASE["train"] + " --dataset=odd")
    terminal = functools.partial(setattr, sys.modules["os"], "isatty", lambda number: True)
    out = right("sample.py --out_dir=out/new --max_new_tokens=99" + option, hook=lambda: (
        terminal(), setattr(sys.stdout, "isatty", lambda: True))).out
    need(not {"\x1b", "\x9b", "\x07"} & {*out}, "an escape sequence is printed")


@inputs("1e30", "1e8")
def a_run_that_diverges(rate):
    answer("either", BASE["train"] + f" --learning_rate={rate} --max_iters=40 --optimizer=adamw "
           "--weight_decay=9 --save_interval=1")
    if runtime.checkpoints("out/new"):
        right("report.py --out_dir=out/new")


BUGS = ["n_hed = 3", "1/0", "def f(:", "import nope", "raise SystemExit(3)", "exit()",
        "n_head = 'a'", "seed = 1.5", "max_iters = [1, 2]", b"\xff\xfe", b"a = 1\0", "resume = 1",
        "batch_size = -1",
        "dataset = 'nope'", "n_head = {1: 2}", "open('nope')", "x = 2",
        "raise Exception", "def f():\n    f()\nf()", "assert False", "seed = 10**5000",
        "max_iters = max_epochs = 1", "tokens_per_s = 1", "minutes = float('nan')",
        "from nope import x", "out_dir = 'text.txt'"]


@inputs(*BUGS)
def a_config_file_with_a_bug(content):
    put("odd.py", content)
    answer("clear", "train.py odd.py --data_dir=data")


@inputs("gap", "other n", "meta", "one only", "other settings", "no tokens")
def odd_shards(kind):
    for k in range(9):
        put(f"docs/{k}.txt", f"document {k} of nine\n" * 99)
    for i in range(3):
        right(f"prepare.py --dataset=new --source=docs --tokenizer=bert --shard={i}/3")
    first, second, third = sorted(Path("data/new").glob("shard-*"))
    if kind in ("gap", "one only"):
        shutil.rmtree(second)
        shutil.rmtree(first if kind == "one only" else "docs")
    elif kind == "other n":
        third.rename("data/new/shard-007-of-009")
    elif kind == "no tokens":
        os.remove(third / "train.npy")
    else:
        lay_over(second / "meta.json", {"settings": ["x"]} if "settings" in kind else {"eot_id": 7})
    answer("clear", BASE["train"] + " --dataset=new")


# ---------------------------------------------------------------------------------------------
# faults


def at_iteration(k, action):
    """A hook: update k of the child is followed by action(), or by that signal to itself."""
    def hook():
        plain, seen = runtime.RunLog.progress, []

        def progress(self, *args):
            plain(self, *args)
            seen.append(1)
            if len(seen) == k:
                action() if callable(action) else os.kill(os.getpid(), action)
        runtime.RunLog.progress = progress
    return hook


def slow_disk():
    """A hook: a save takes long enough for kills to hit it."""
    plain = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.02), plain(descriptor))[1]


LONG = {  # commands that are long enough to be hit
    "train": BASE["train"] + " --max_iters=9 --eval_interval=4 --save_interval=3 --dropout=0.2",
    "mrpc": BASE["mrpc"] + " --batch_size=16", "prepare": BASE["prepare"] + " --tokenizer=bpe",
    "roberta": BASE["roberta"] + " --save_interval=3 --max_iters=8 --eval_interval=4",
    "remake": BASE["remake"], "convert": "convert.py out/run out/new",
    "report": BASE["report"],
}
OUTCOME = {  # what must not depend on what happened to the command
    "mrpc": ("out/new/best/model.safetensors", "out/new/predictions.tsv"),
    "roberta": ("out/new/model.safetensors", "out/new/tokenizer.json"),
    "prepare": ("data/new/train.npy", "data/new/val.npy", "data/new/tokenizer.json"),
    "remake": ("data/tiny/train.npy", "data/tiny/val.npy"),
    "convert": ("out/new/model.safetensors", "out/new/tokenizer.json"),
}


def outcome(base):
    """The results of a finished command of LONG."""
    if base != "train":
        return [Path(file).read_bytes() for file in OUTCOME[base]]
    log = [{name: value for name, value in logged.items() if name != "tokens_per_s"}
           for logged in runtime.read_log("out/new/log.csv")]
    return [(newest("out/new") / "model.safetensors").read_bytes(), log,
            Path("out/new/samples.md").read_bytes()]


def undisturbed(base):
    """(outcome, seconds) of a command that nothing happens to; computed once, then in a file."""
    kept = Path("../../whole", base)
    if not kept.exists():
        here = os.getcwd()
        folder = tempfile.mkdtemp(dir="../..")
        shutil.copytree("../../world", folder, dirs_exist_ok=True)
        os.chdir(folder)
        done = right(LONG[base], hook=slow_disk)
        content = pickle.dumps((outcome(base), done.seconds))
        os.chdir(here)
        put(f"../../whole/.{base}-{os.getpid()}", content)
        os.replace(f"../../whole/.{base}-{os.getpid()}", kept)
    return pickle.loads(kept.read_bytes())


def go_on(base, command=None, out="out/new"):
    """The command again, resuming where there is a checkpoint: it must end as undisturbed."""
    command = command or LONG[base]
    if base in TRAINERS:
        for checkpoint in runtime.checkpoints(out):
            need(runtime.verify_checksums(checkpoint) is None, f"{checkpoint} is not whole")
        command += " --resume" if runtime.checkpoints(out) else " --overwrite"
    done = run(command)
    need(done.code == 0 or "not empty" in done.err,
         f"going on: exit code {done.code}, {done.err.strip()[-300:]}")
    left = [*Path(".").rglob(".tmp-*")]
    need(not left, f"left over: {left}")


def ends_well(base):
    need(outcome(base) == undisturbed(base)[0], "it does not end as one that nobody touched")


KILLS = {"train": 10, "mrpc": 5, "roberta": 5, "prepare": 4, "remake": 4, "convert": 4}


@faults(*[(base, k) for base, n in KILLS.items() for k in range(n)])
def killed_at_a_random_moment(base, k):
    seconds = undisturbed(base)[1] * (k + random.Random(k).random()) / KILLS[base]
    child = spawn(LONG[base], hook=slow_disk)
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    finish(child)
    go_on(base)
    ends_well(base)


@faults(*[(base, number) for base in TRAINERS for number in ("TERM", "INT", "HUP", "TERM twice")])
def stopped_by_a_signal(base, name):
    number = signal.Signals[f"SIG{name.split()[0]}"]

    def twice():
        for _ in range(2 if "twice" in name else 1):
            os.kill(os.getpid(), number)
    done = run(LONG[base], hook=at_iteration(3, twice))
    code = -number if "twice" in name or name == "HUP" else 128 + number
    need(done.code == code and "Traceback" not in done.err, f"exit {done.code}: {done.err[-300:]}")
    go_on(base)
    ends_well(base)


@faults(*TRAINERS)
def suspended_and_continued(base):
    child = spawn(LONG[base])
    time.sleep(undisturbed(base)[1] / 2)
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGCONT)
    need(finish(child).code == 0, "it does not end well")
    ends_well(base)


class Skipped(Exception):
    """This machine cannot try the row."""


def mounted(options, steps):
    """steps() in a child that has a tmpfs of its own on out/disk."""
    Path("out/disk").mkdir()
    libc, user, group, pid = ctypes.CDLL(None), os.geteuid(), os.getegid(), os.fork()
    if not pid:
        if libc.unshare(0x10020000 if user else 0x20000):  # CLONE_NEWNS, with CLONE_NEWUSER
            os._exit(99)
        if user:
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"),
                               ("gid_map", f"0 {group} 1")):
                Path("/proc/self", name).write_text(text)
        disk = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", "out/disk"]
        for command in (["mount", "--make-rprivate", "/"], disk):
            if subprocess.run(command, capture_output=True).returncode:
                os._exit(99)
        try:
            steps()
        except BaseException as error:
            put("failure", f"{type(error).__name__}: {error}")
            os._exit(98)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 99:
        raise Skipped
    need(code == 0, Path("failure").read_text() if Path("failure").exists() else f"exit {code}")


SIZES = {"train": range(20, 400, 70), "mrpc": (20, 300, 700), "convert": (4, 20, 40, 80),
         "roberta": (20, 200, 500), "prepare": (4, 16, 32, 64), "report": (4, 60)}


def on_disk(base):
    """The command of LONG that writes into out/disk/new."""
    command = LONG[base].replace("out/new", "out/disk/new")
    more = {"prepare": " --data_dir=out/disk", "report": " --out=out/disk/new"}
    return command + more.get(base, "")


@faults(*[(base, size) for base, sizes in SIZES.items() for size in sizes])
def a_full_disk(base, size):
    expected = base == "report" or undisturbed(base)[0]

    def steps():
        done = run(on_disk(base))
        need(is_clear(done) or done.code == 0, f"exit {done.code}: {done.err.strip()[-300:]}")
        left = [*Path("out/disk").rglob(".tmp-*")]
        need(not left, f"left over: {left}")
        subprocess.run(["mount", "-o", "remount,size=99m", "out/disk"], check=True)
        go_on(base, on_disk(base), "out/disk/new")
        if base != "report":
            shutil.copytree("out/disk/new", "data/new" if base == "prepare" else "out/new")
            need(outcome(base) == expected, "it does not end as one that had room")
    mounted(f"size={size}k", steps)


@faults(*SIZES)
def a_read_only_disk(base):
    mounted("ro", lambda: clear(on_disk(base)))


@faults(*[(base, size) for base in SIZES for size in (1000, 60_000)])
def no_file_may_be_longer(base, size):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    answer("either", LONG[base], hook=limit)
    go_on(base)
    base == "report" or ends_well(base)


@faults(*[(base, what) for base in TRAINERS for what in ("deleted", "moved", "made anew")])
def data_while_a_run_goes(base, what):
    files = {"train": ["data/tiny"], "mrpc": ["train.tsv", "dev.tsv", "bert"],
             "roberta": ["text.txt"]}

    def action():
        for path in map(Path, files[base]):
            path.rename(f"away-{path.name}")
            if what == "deleted":
                runtime.remove(f"away-{path.name}")
            elif what == "made anew" and path.name == "tiny":
                shutil.copytree("data/bpe", path)
            elif what == "made anew":
                put(path, "x\ty\tz\n")
    right(LONG[base], hook=at_iteration(3, action))
    ends_well(base)
    if base == "train":
        sizes = prepare.read_meta(newest("out/new")), runtime.read_run(newest("out/new"))["model"]
        need(sizes[0]["vocab_size"] == sizes[1]["vocab_size"], "the checkpoint's tokenizer is new")
        right("sample.py --out_dir=out/new")


@faults(*TRAINERS)
def the_run_folder_is_deleted_while_a_run_goes(base):
    done = run(LONG[base], hook=at_iteration(3, lambda: shutil.rmtree("out/new")))
    need(is_clear(done) or done.code == 0, f"exit code {done.code}: {done.err[-400:]}")


READERS = {"again": RUN_USERS[0], "sample": RUN_USERS[1], "report": RUN_USERS[2],
           "convert": RUN_USERS[3], **RESUME}


@faults(*[(user, name) for user in READERS for name in ("model.safetensors", "run.json")],
        ("again", "optimizer.bin"), ("again", "meta.json"), ("sample", "tokenizer.json"),
        ("again", "optimizer_1.bin"), ("mrpc", "optimizer.bin"), ("roberta", "optimizer.pt"),
        ("roberta", "trainer_state.json"), ("sample", "meta.json"))
def a_flipped_byte(user, name):
    for path in Path(RUN_OF.get(user, "out/run")).glob(f"*/{name}"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    answer("clear", READERS[user])


@faults("best", "checkpoint-000005", "", "log.csv", "checkpoint-000005/model.safetensors")
def a_symbolic_link(name):
    path = Path("out/run", name)
    shutil.move(path, "scratch")
    os.symlink(Path("scratch").resolve(), path)
    right(BASE["again"] + " --max_iters=7")
    right(BASE["train"] + " --out_dir=out/run --overwrite")
    need(name in ("log.csv",) or Path("scratch").exists(), "what the link points to is gone")
    right(BASE["sample"])


@faults("train", "mrpc", "roberta", "prepare", "convert")
def two_at_once_in_one_folder(base):
    done = [finish(child) for child in [spawn(LONG[base], hook=slow_disk) for _ in range(2)]]
    need(all(is_clear(d) or d.code == 0 for d in done), str([d.err[-200:] for d in done]))
    need(any(d.code == 0 for d in done), "neither ended well")
    ends_well(base)


ODD = ("log.csv cut", "log.csv bytes", "log.csv words", "log.csv folder", "log.csv pipe",
       "log.csv gone", "samples.md bytes", "samples.md folder", "samples.md pipe",
       "samples.md gone", "loss.png folder", "run.json bytes", "run.json gone", ".lock folder",
       ".lock pipe",
       ".tmp-checkpoint-000007 folder", ".tmp-checkpoint-000007 file", "checkpoint-000099 file",
       "checkpoint-000099 folder", f"checkpoint-{'9' * 30} folder", "best file", "best folder",
       "report.html folder")


@faults(*ODD)
def odd_things_in_a_run_folder(what):
    name, kind = what.split()
    path = Path("out/run", name)
    old = path.read_bytes() if path.is_file() else b""
    if path.exists():
        runtime.remove(path)
    content = {"cut": old[: len(old) // 2], "bytes": b"\xff\xfe\0\n", "file": b"x",
               "words": b"iter,loss\n1,abc\nx,y,z\n"}
    if kind in content:
        put(path, content[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    for command in [*RUN_USERS[:3], BASE["train"] + " --out_dir=out/run --overwrite"]:
        answer("either", command, timeout=30)


CLOSED = {  # what nobody may read or write: the command that wants to
    "text.txt": BASE["prepare"], "data/tiny": BASE["train"], "data/tiny/val.npy": BASE["train"],
    "out": BASE["train"], "out/run": RUN_USERS[0], "out/run/checkpoint-000005": RUN_USERS[1],
    "out/run/checkpoint-000005/run.json": RUN_USERS[2], "data/tiny/tokenizer.json": BASE["train"],
    "train.tsv": BASE["mrpc"], "bert": BASE["mrpc"], "other.txt": BASE["roberta"].replace("text",
                                                                                        "other"),
    "dev.tsv": BASE["sample"] + " --start=FILE:dev.tsv", "out/mrpc": RESUME["mrpc"],
    "out/roberta": RESUME["roberta"], "gpt/config.json": FROM,
}


@faults(*CLOSED)
def no_permission(path):
    def nobody():
        if not os.geteuid():
            os.seteuid(65534)
    if not os.geteuid():
        subprocess.run(["chmod", "-R", "a+rwX", "."], check=True)
    os.chmod(path, 0)
    done = run(CLOSED[path], hook=nobody)
    os.chmod(path, 0o755)
    if "ModuleNotFoundError" in done.err:  # nor may nobody read this Python
        raise Skipped
    need(is_clear(done), f"not clear: exit code {done.code}, {done.err.strip()[-300:]}")


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "wb")


HOMELESS = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "HF_HOME"), "/proc/x")
POOR = {  # what the surroundings lack: how the child is started
    "a reader": lambda: {"stdout": closed_pipe()},
    "room for output": lambda: {"stdout": open("/dev/full", "wb")},
    "more than ASCII": lambda: {"hook": lambda: [
        stream.reconfigure(encoding="ascii") for stream in (sys.stdout, sys.stderr)]},
    "a home": lambda: {"env": HOMELESS}, "permissions": lambda: {"hook": lambda: os.umask(0o777)},
    "a steady clock": lambda: {"hook": lambda: setattr(
        time, "time", lambda: 2e9 * random.random())},
    "files": lambda: {"hook": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))},
    "stderr": lambda: {"hook": lambda: os.close(2)},
}


@faults(*POOR)
def surroundings_that_lack(what):
    done = run(LONG["train"] + " --sample_start=\u0259", **POOR[what]())
    need(done.code == 0 or is_clear(done), f"exit {done.code}: {done.err.strip()[-300:]}")
    if done.code == 0:
        right("sample.py --out_dir=out/new --start=\u0259", **POOR[what]())


# ---------------------------------------------------------------------------------------------
# faults: several processes


def torchrun(command):
    """Start a script in two processes."""
    script, *options = command.split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                "--standalone", str(ROOT / script)]
    return subprocess.Popen([*launcher, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


@inputs()
def two_processes_are_resumed_by_one():
    command = BASE["train"] + " --optimizer=adamw --batch_size=2 --warmup_iters=0 --out_dir=out/two"
    child = torchrun(command + " --max_iters=7")
    _, err = child.communicate(timeout=200)
    need(child.returncode == 0, err[-300:])
    right(BASE["again"] + " --out_dir=out/two --gradient_accumulation_steps=2 --max_iters=11")
    change = largest_change(newest("out/two"), "out/two/checkpoint-000007")
    need(change > 1e-4, "no update was made")


@faults("TERM to all", "TERM to one", "KILL to one")
def two_processes(what):
    child = torchrun(BASE["train"] + " --max_iters=9000 --save_interval=50 --out_dir=out/two")
    end = time.monotonic() + 100
    while not runtime.checkpoints("out/two") and child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    need(runtime.checkpoints("out/two"), "it did not start")
    ranks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout
    target = child.pid if "all" in what else int(ranks.split()[-1])
    os.kill(target, signal.Signals["SIG" + what[:4]])
    child.communicate(timeout=100)
    folder = newest("out/two")
    need(child.returncode and not runtime.verify_checksums(folder), "exit code 0, or half a save")
    end = int(folder.name[11:]) + 3
    right(f"{BASE['again']} --out_dir=out/two --gradient_accumulation_steps=2 --max_iters={end}")


# ---------------------------------------------------------------------------------------------
# pickles: in the place of a file, and beside the files, of what the scripts read


class Evil:
    """Unpickled, it makes the file code-ran."""

    def __reduce__(self):
        return os.system, (f"touch {Path('code-ran').resolve()}",)


def evil(kind):
    """A hostile file: a bare pickle, torch's, one of an optimizer's state, or numpy's."""
    buffer = io.BytesIO()
    if kind == "numpy":
        np.save(buffer, np.array([Evil()], object), allow_pickle=True)
    elif kind == "pickle":
        pickle.dump(Evil(), buffer)
    else:
        torch.save(Evil() if kind == "torch" else {"state": {}, "param_groups": [Evil()]}, buffer)
    return buffer.getvalue()


def poison(pattern, kind, *commands):
    """Put a pickle into each folder of the pattern, signed, and call what reads it."""
    folder = Path(pattern).parent
    for path in [folder] if folder == Path() else sorted(Path().glob(str(folder))):
        if path.is_dir():
            damage(str(path / Path(pattern).name), evil(kind))
    no_code_runs(*commands)


def no_code_runs(*commands):
    for command in commands:
        done = run(command)
        need(not Path("code-ran").exists(), f"code ran: {command}")
        need(is_clear(done) or done.code == 0 and "Traceback" not in done.err,
             f"exit code {done.code}: {done.err.strip()[-300:]}")


EXTRA = ("pytorch_model.bin training_args.bin rng_state.pth random_states_0.pkl scaler.pt "
         "custom_checkpoint_0.pkl scheduler.pt ")
GPT, FILL = "sample.py --init_from=gpt --max_new_tokens=3", "train_roberta.py --fill_mask=<mask>"
POISON = {  # folders: (files, commands that read them)
    "out/run/*": (EXTRA + "model.safetensors optimizer.bin optimizer_1.bin run.json meta.json "
                  "tokenizer.json scheduler.bin SHA256SUMS", RUN_USERS),
    "out/run": ("log.csv samples.md run.json", RUN_USERS),
    "out/mrpc/*": (EXTRA + "model.safetensors optimizer.bin run.json config.json tokenizer.json",
                   [RESUME["mrpc"], BASE["mrpc-again"].replace("--resume", "--eval_only "
                                                              "--validation_file=dev.tsv")]),
    "out/mrpc": ("predictions.tsv", [BASE["mrpc"] + " --compare out/mrpc out/mrpc"]),
    "out/roberta/*": (EXTRA + "model.safetensors optimizer.pt trainer_state.json run.json "
                      "config.json tokenizer.json vocab.json", [RESUME["roberta"]]),
    "out/roberta": (EXTRA + "model.safetensors config.json tokenizer.json",
                    [FILL + " --out_dir=out/roberta"]),
    "data/tiny": ("train.npy val.npy meta.json tokenizer.json", [BASE["train"], BASE["remake"]]),
    "gpt": (EXTRA + "model.safetensors config.json tokenizer.json generation_config.json "
            "tokenizer_config.json", [GPT, BASE["prepare"] + " --tokenizer=gpt"]),
    "bert": (EXTRA + "model.safetensors config.json tokenizer.json tokenizer_config.json",
             [ONE, BASE["roberta"] + " --tokenizer=bert"]),
    ".": ("train.tsv dev.parquet dev.jsonl text.txt", [
        ONE, ONE + " --validation_file=dev.parquet", ONE + " --validation_file=dev.jsonl",
        BASE["prepare"], BASE["roberta"]]),
}


def pickle_rows():
    """(name, function) for each file of POISON."""
    for folder, (names, commands) in POISON.items():
        for name in names.split():
            kinds = ["torch", "state"] if name.endswith((".bin", ".pt", ".pth")) else ["pickle"]
            for kind in kinds + ["numpy"] * name.endswith(".npy"):
                yield f"{folder}/{name}, {kind}", functools.partial(
                    poison, f"{folder}/{name}", kind, *commands)


@functools.partial(row, "pickles", ("gpt", GPT), ("bert", ONE),
                   ("out/roberta", FILL + " --out_dir=out/roberta"))()
def only_a_pickle_for_weights(folder, command):
    for path in Path(folder).rglob("model.safetensors"):
        path.unlink()
    poison(f"{folder}/pytorch_model.bin", "torch", command)


@functools.partial(row, "pickles", ("gpt", GPT), ("bert", ONE),
                   ("bert", BASE["roberta"] + " --tokenizer=bert"))()
def code_beside_a_model(folder, command):
    code = f"import os\nos.system('touch {Path('code-ran').resolve()}')\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
        put(Path(folder, name), code)
    kinds = ("Config", "ModelForCausalLM", "ModelForSequenceClassification", "Tokenizer")
    lay_over(f"{folder}/config.json", {"auto_map": {f"Auto{kind}": "evil.Evil" for kind in kinds}})
    lay_over(f"{folder}/tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    no_code_runs(command)


# ---------------------------------------------------------------------------------------------
# all of it


def table():
    """[(section, name, function)], the whole attack."""
    sections = {"inputs: options": option_rows(), "inputs: texts": text_rows(),
                "inputs: files": file_rows(), "inputs: URLs": url_rows(), **SCENARIOS}
    sections["pickles"] = [*sections["pickles"], *pickle_rows()]
    return [(section, *member) for section, members in sections.items() for member in members]


def short(rows):
    """Nine rows of each section, always the same."""
    chosen = []
    for section in dict.fromkeys(section for section, *_ in rows):
        members = [row for row in rows if row[0] == section]
        chosen += members[:: math.ceil(len(members) / 9)]
    return chosen


def attempt(home, function):
    """Call a row's function in a fresh copy of the world. Returns what it found, '' if nothing,
    None if this machine cannot try it."""
    folder = Path(tempfile.mkdtemp(dir=home))
    folder.chmod(0o755)
    shutil.copytree(Path(home, "world"), folder / "row", symlinks=True)
    os.chdir(folder / "row")
    try:
        function()
    except Skipped:
        return None
    except Finding as finding:
        return " ".join(str(finding).split())
    except Exception:  # the row's own: it did not find what it looked for
        return " ".join(traceback.format_exc()[-400:].split())
    finally:
        os.chdir(home)
        shutil.rmtree(folder, ignore_errors=True)
    return ""


def work(home, rows, k, n):
    """Fork a worker for every n-th row from the k-th; its results come back in a file."""
    pid = os.fork()
    if pid:
        return pid
    with open(Path(home, f"found-{k}"), "w", buffering=1) as f:
        for i in range(k, len(rows), n):
            began = time.monotonic()
            found = attempt(home, rows[i][2])
            f.write(json.dumps([i, found]) + "\n")
            if found:
                seconds = time.monotonic() - began
                line = f"FINDING {rows[i][0]}: {rows[i][1]}: {found} ({seconds:.0f} s)"
                print(" ".join(ascii(line)[1:-1].split()), flush=True)
    os._exit(0)


def main(words, is_long):
    """Attack. Returns the number of findings."""
    rows = table() if is_long else short(table())
    rows = [r for r in rows if not words or any(word in f"{r[0]}: {r[1]}" for word in words)]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # below nohup it is ignored
    began, n = time.monotonic(), os.cpu_count()
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        for name in ("world", "whole"):
            Path(home, name).mkdir()
        os.chdir(Path(home, "world"))
        make_world()
        for pid in [work(home, rows, k, n) for k in range(n)]:
            os.waitpid(pid, 0)
        found = {}
        for k in range(n):
            found |= dict(map(json.loads, Path(home, f"found-{k}").read_text().splitlines()))
        os.chdir("/")
    findings = 0
    for section in dict.fromkeys(section for section, *_ in rows):
        mine = [found.get(i, "its worker died") for i, r in enumerate(rows) if r[0] == section]
        skipped, bad = mine.count(None), sum(bool(what) for what in mine)
        findings += bad
        word = {"faults": "survived", "pickles": "none ran"}.get(section, "clear or right")
        print(f"{section}: tried {len(mine) - skipped}, {word} {len(mine) - skipped - bad}, "
              f"findings: {bad}" + f"; {skipped} cannot be tried here" * bool(skipped))
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s, {findings} findings")
    return findings


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main([word for word in given if word != "--long"], "--long" in given) > 0)
