"""The Verdict recipe, whole command, beside the book's loop, runs an hour; 10 minutes"""

from bench.plain import compare_recipes


def run(cfg, folder):
    """The book's loop (chapter 5) with transformers' GPT-2, fp32, the head not tied. The text is
    --text=the-verdict.txt, or the preset, which needs a network once."""
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768}
    return compare_recipes(cfg, folder, "verdict", cfg.text or "verdict", "gpt2", 1, shape, T=256,
                           rows=2, stride=256, iterations=90, interval=5, eval_batches=5,
                           peak=4e-4, last=4e-4, warmup=0, dropout=0.1, tied=False)
