# A small KantaiBERT for a CPU: any text of a few hundred kB, in short blocks, many times over.
#     python train_roberta.py config/kantaibert_small.py --source=kant.txt
# On 343 kB of Kant, 2 cores: 3 minutes. The loss stays near 5.5, what the words' frequencies
# give, until attention has found the neighbours after about 1,300 updates; then it falls below 4.
# A larger learning rate or a smaller init_std never got off that plateau.
vocab_size = 1_500  # each token is seen often enough in a small text
packing, block_size = True, 32  # full blocks; few positions to learn
n_layer, n_head, n_embd = 2, 2, 128
dropout, init_std = 0.0, 0.08
max_epochs = 64
batch_size = 32  # 1,024 tokens an update
learning_rate, warmup_steps = 6e-4, 100
log_steps, eval_steps, save_steps = 500, 1000, 1000
out_dir = "out/kantaibert_small"
