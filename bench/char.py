"""the character recipe, whole command, beside nanoGPT's loop, runs an hour; 8 minutes"""

from bench.turns import Side, command, compare, prepare_data, read_text


def run(cfg, folder):
    """nanoGPT's recipe for a CPU, with transformers' GPT-2, on as many characters as it has."""
    file = folder / "text.txt"
    file.write_text(read_text(cfg.text)[: 20_000 if cfg.tiny else 1_100_000], encoding="utf-8")
    prepare_data("char", file, "char", folder)
    ours = ["train.py", "config/char.py", f"--data_dir={folder}", "--out_dir=OUT", "--seed=SEED"]
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128}
    recipe = {"T": 64, "rows": 12, "stride": 1, "iterations": 101 if cfg.tiny else 2000,
              "interval": 250, "eval_batches": 20, "rates": (1e-3, 1e-4, 100), "clip": 1.0}
    code = f"from bench import plain; plain.whole_run('{folder}/char', SEED, {shape}, **{recipe})"
    return compare(cfg, {"character GPT 0.8M, whole command (runs/h)": [
        Side("train.py config/char.py", command,
             (ours + ["--max_iters=20"] * cfg.tiny, str(folder))),
        Side("nanoGPT's loop, transformers", command, (["-c", code], str(folder)))]}, rounds=3)
