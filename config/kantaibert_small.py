# A small KantaiBERT for a CPU: any text of a few hundred kB, in short blocks, many times over.
#     python train_roberta.py config/kantaibert_small.py --source=kant.txt
# On 343 kB of Kant, 2 cores: 3 minutes. The loss stays near 5.5, what the words' frequencies
# give, until attention has found the neighbours after about 1,300 iterations; then it falls below
# 4. A larger learning rate or a smaller init_std never got off that plateau.
vocab_size = 1_500  # each token is seen often enough in a small text
packing = True  # full blocks
block_size = 32  # few positions to learn

n_layer = 2
n_head = 2
n_embd = 128
dropout = 0.0
init_std = 0.08

max_epochs = 64
batch_size = 32  # 1,024 tokens an iteration
learning_rate = 6e-4
warmup_iters = 100

log_interval = 500
eval_interval = 1000
save_interval = 1000
out_dir = "out/kantaibert_small"
