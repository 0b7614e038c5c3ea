"""the character recipe, whole command, beside nanoGPT's loop, runs an hour; 8 minutes"""

from bench.plain import compare_recipes
from bench.scripts import read_text


def run(cfg, folder):
    """nanoGPT's recipe for a CPU, with transformers' GPT-2, on as many characters as it has."""
    file = folder / "text.txt"
    file.write_text(read_text(cfg.text)[:1_100_000], encoding="utf-8")
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128}
    return compare_recipes(cfg, folder, "char", file, "char", 3, shape, T=64, rows=12, stride=1,
                           iterations=2000, interval=250, eval_batches=20, peak=1e-3, last=1e-4,
                           warmup=100, clip=1.0)
