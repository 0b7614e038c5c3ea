# Tiny Shakespeare with GPT-2's tokenizer (1.1 MB of text, downloaded), minutes on a CPU.
# The text was not at hand where this was written: no loss to expect is given.
dataset = "shakespeare"

n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.1
tie_weights = False

max_iters = 600  # 4 passes over 302 thousand tokens
eval_interval = 100
sample_start = "ROMEO:"
