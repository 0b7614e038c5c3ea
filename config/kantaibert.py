# KantaiBERT, the recipe of the book (chapter 3): a RoBERTa of 6 layers, one pass over Kant.
#     python train_roberta.py config/kantaibert.py
# On 343 kB of Kant, 2 cores: 74 steps in 54 s to val loss 7.07, masked accuracy 6 %: a text this
# short is over before attention has learned anything. The book's own file is larger.
source = "kant"  # downloaded once into data/kant; --source=kant.txt takes a file at hand
vocab_size = 52_000
n_layer, n_head, n_embd = 6, 12, 768  # 83.5M parameters with the whole vocabulary
max_position_embeddings = 514
block_size = 128
max_epochs = 1
batch_size = 64
save_steps = 10_000
save_total_limit = 2
out_dir = "out/kantaibert"
