# A small KantaiBERT for a CPU: any text of a few hundred kB, in short blocks, many times over.
#     python train_roberta.py config/kantaibert_small.py --source=kant.txt
vocab_size = 1_500  # each token is seen often enough in a small text
packing, block_size = True, 32  # full blocks; few positions to learn
n_layer, n_head, n_embd = 3, 4, 192
dropout, init_std = 0.0, 0.05
max_epochs = 40
batch_size = 32  # 1,024 tokens an update
learning_rate, warmup_steps, weight_decay = 2e-3, 100, 0.01
mlm_probability = 0.25
log_steps, eval_steps, save_steps = 100, 500, 500
out_dir = "out/kantaibert_small"
