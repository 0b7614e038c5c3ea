"""the default recipe beside another checkout's (--peer), bits per byte of 3 seeds; 15 minutes"""

import subprocess
import sys
from pathlib import Path

from bench.scripts import ROOT, command
from bench.turns import Side, compare
from runtime import UserError


def run(cfg, folder):
    """python train.py in both, each on data that its own prepare.py made."""
    if not (cfg.peer and Path(cfg.peer, "train.py").exists()):
        raise UserError(f"--peer {cfg.peer} holds no train.py; make another checkout: "
                        "git worktree add OLD COMMIT; then --peer OLD", 2)
    source = Path(cfg.text).resolve() if cfg.text else "stdlib"
    sides = []
    for name, checkout in {"this checkout": ROOT, cfg.peer: Path(cfg.peer).resolve()}.items():
        data = ["--dataset=text", f"--data_dir={folder}/{len(sides)}"]
        subprocess.run([sys.executable, "prepare.py", *data, f"--source={source}"], cwd=checkout,
                       check=True, stdout=subprocess.DEVNULL)
        words = ["train.py", *data, "--out_dir=OUT", "--seed=SEED"]
        sides.append(Side(name, command, (words, folder, checkout)))
    return compare(cfg, {"python train.py, whole command (runs/h)": sides}, rounds=3)
