"""from the command to the first update of an 86M model, starts a minute; 2 minutes"""

import subprocess
import sys
import tempfile

import prepare
from bench.scripts import ROOT, prepare_data
from bench.turns import SHAPE, Side, compare

OPTIONS = """--dataset=start --out_dir=OUT --log_interval=1 --eval_interval=0 --max_iters=99
    --batch_size=2 --block_size=256 --optimizer=adamw --dropout=0.1 --n_layer=12 --n_head=12
    --n_embd=768 --bias --qkv_bias --tie_weights --rope_theta=None --rms_norm=False
    --swiglu=False --qk_norm=False --embd_norm=False"""


def starting(words, folder):
    """60 for each process that has come to its first update, imports included."""
    yield 0
    while True:
        filled = [word.replace("OUT", tempfile.mkdtemp(dir=folder)) for word in words]
        with subprocess.Popen([sys.executable, *filled], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as child:  # no bar
            if not any(line.startswith("iteration 1/") for line in child.stdout):
                raise RuntimeError(f"{filled} made no update")
            child.kill()
        yield 60


def run(cfg, folder):
    """On characters, 2 x 256; the plain loop is the train row's."""
    shape = SHAPE | {"vocab_size": prepare_data("start", prepare.__file__, "char", folder)}
    ours = ["train.py", f"--data_dir={folder}", *OPTIONS.split()]
    plain = f"from bench.plain import updates; next(updates({shape}, 2, 1, 256, 0.1, 1))"
    plain = ["-c", f"{plain}; print('iteration 1/', flush=True)"]
    return compare(cfg, {"first update of 86M (starts a minute)": [
        Side("train.py", starting, (ours, folder)),
        Side("transformers, plain fp32 loop", starting, (plain, folder))]})
