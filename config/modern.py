# GPT-2's depth and width in Qwen3's shape (162M: the head is not tied), Muon, FineWeb-Edu, 8 GPUs:
#   python prepare.py --dataset=fineweb
#   accelerate launch --multi_gpu --num_processes 8 train.py config/modern.py
# Not run. The mark to measure it by is modded-nanogpt's track 3: a val loss of 3.28 on FineWeb in
# 1.7 billion tokens, after much tuning (FineWeb-Edu is another text, with another loss). The rates
# are theirs in our units: Muon moves a weight by 0.2 x learning_rate, and embeddings begin at 0.02
# instead of 1.
# Fewer cards: multiply gradient_accumulation_steps as in config/gpt2.py.
dataset = "fineweb"

block_size = 1024
n_layer = 12
n_head = 6  # of 128
n_embd = 768
init = "gpt2"  # embeddings begin at 0.02, as the rates expect

batch_size = 32
gradient_accumulation_steps = 2  # x 8 processes x 32 x 1,024 = 524,288 tokens an iteration
max_iters = 3_814  # 2 billion tokens
learning_rate = 4e-3
embedding_lr = 6e-3
head_lr = 3e-3
beta2 = 0.95
momentum = 0.95
warmup_iters = 100
compile = True

eval_interval = 250
save_interval = 1000
sample_start = "The meaning of life is"
