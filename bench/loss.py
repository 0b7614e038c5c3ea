"""the default recipe, racer.py and another checkout's default (--peer), 3 seeds; 30 minutes"""

import subprocess
import sys
from pathlib import Path

from bench.scripts import ROOT, command
from bench.turns import Side, compare
from runtime import UserError


def run(cfg, folder):
    """Whole commands, each on data that its own prepare.py made."""
    if not (cfg.peer and Path(cfg.peer, "train.py").exists()):
        raise UserError(f"--peer {cfg.peer} holds no train.py; make another checkout: "
                        "git worktree add OLD COMMIT; then --peer OLD", 2)
    source = Path(cfg.text).resolve() if cfg.text else "stdlib"
    sides = []
    for name in ("train.py", "racer.py", f"{cfg.peer}/train.py"):
        checkout = Path(cfg.peer).resolve() if "/" in name else ROOT
        data = ["--dataset=text", f"--data_dir={folder}/{len(sides)}"]
        subprocess.run([sys.executable, "prepare.py", *data, f"--source={source}"], cwd=checkout,
                       check=True, stdout=subprocess.DEVNULL)
        words = [Path(name).name, *data, "--out_dir=OUT", "--seed=SEED"]
        sides.append(Side(name, command, (words, folder, checkout)))
    return compare(cfg, {"whole command (runs/h)": sides}, rounds=3)
