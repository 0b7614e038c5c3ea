# A small KantaiBERT for a CPU: any text of a few hundred kB, in short blocks, many times over.
#     python train_roberta.py config/kantaibert_small.py --source=kant.txt
# On 343 kB of Kant, 2 cores, 3 seeds: val loss 3.86 +- 0.05 in a minute, 3.70 +- 0.04 in three with
# --max_epochs=40; below the plateau of the words' frequencies (5.5) from iteration 60 on.
vocab_size = 1_500  # each token is seen often enough in a small text
packing = True  # full blocks
block_size = 32  # few positions to learn
mlm_probability = 0.4  # more to predict in each block; evaluation stays at 15 %

n_layer = 2
n_head = 2
n_embd = 128
dropout = 0.0
init_std = 0.04
local_heads = True  # without it the loss stays at what the words' frequencies give, near 5.5

max_epochs = 13
batch_size = 128  # 4,096 tokens an iteration; with a quarter of that the loss falls half as fast
learning_rate = 6e-3
muon_lr = 2e-2
warmup_iters = 10

log_interval = 50
eval_interval = 50
save_interval = 1000
out_dir = "out/kantaibert_small"
