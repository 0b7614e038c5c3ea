"""The Verdict recipe, whole command, beside the book's loop, runs an hour; 10 minutes"""

from bench.turns import Side, command, compare, prepare_data


def run(cfg, folder):
    """The book's loop (chapter 5) with transformers' GPT-2, fp32, the head not tied. The text is
    --text=the-verdict.txt, or the preset, which needs a network once."""
    prepare_data("verdict", cfg.text or "verdict", "gpt2", folder)
    ours = ["train.py", "config/verdict.py", f"--data_dir={folder}", "--out_dir=OUT"]
    ours += ["--n_layer=1", "--max_iters=2"] * cfg.tiny
    shape = {"n_layer": 1 if cfg.tiny else 12, "n_head": 12, "n_embd": 768}
    recipe = {"T": 256, "rows": 2, "stride": 256, "iterations": 2 if cfg.tiny else 90,
              "interval": 5, "eval_batches": 5, "rates": (4e-4, 4e-4, 0), "dropout": 0.1,
              "tied": False}
    code = f"from bench import plain; plain.whole_run('{folder}/verdict', 123, {shape}, **{recipe})"
    return compare(cfg, {"The Verdict, whole command (runs/h)": [
        Side("train.py config/verdict.py", command, (ours, str(folder))),
        Side("the book's loop, transformers", command, (["-c", code], str(folder)))]}, rounds=1)
