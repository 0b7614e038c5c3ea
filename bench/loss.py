"""the default recipe beside another checkout's (--peer), bits per byte of 3 seeds; 15 minutes"""

import subprocess
import sys
from pathlib import Path

from bench.turns import ROOT, Side, command, compare
from runtime import UserError


def run(cfg, folder):
    """python train.py in both, each on data that its own prepare.py made."""
    checkouts = {"this checkout": ROOT}
    if cfg.peer:
        checkouts[cfg.peer] = Path(cfg.peer).resolve()
    else:
        print("skipped: another checkout; name one: git worktree add OLD COMMIT; --peer OLD")
    sides = []
    for number, (name, checkout) in enumerate(checkouts.items()):
        if not (checkout / "train.py").exists():
            raise UserError(f"--peer {name} holds no train.py; name a checkout's folder", 2)
        data = ["--dataset=text", f"--data_dir={folder}/{number}"]
        source = Path(cfg.text).resolve() if cfg.text else "stdlib"
        subprocess.run([sys.executable, "prepare.py", *data, f"--source={source}"], cwd=checkout,
                       check=True, stdout=subprocess.DEVNULL)
        words = ["train.py", *data, "--out_dir=OUT", "--seed=SEED", *["--max_iters=2"] * cfg.tiny]
        sides.append(Side(name, command, (words, str(folder), str(checkout))))
    return compare(cfg, {"python train.py, whole command (runs/h)": sides}, rounds=3)
