# GPT-2 124M on 10 billion tokens of FineWeb-Edu, eight GPUs:
#   python prepare.py --dataset=fineweb
#   accelerate launch --multi_gpu --num_processes 8 train.py config/gpt2.py
# Fewer cards: multiply gradient_accumulation_steps so that the product with the number of
# processes stays 16; the batches are then the same ones, on resume too.
# GPT-2's own weights have a loss near 3.3 on such text. Not run to its end: one H200, at hand for
# minutes, made 471,000 to 482,000 tokens a second with two accumulation steps: 6 hours.
dataset = "fineweb"

block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768

# GPT-2's shape
bias = True
qkv_bias = True
tie_weights = True
rope_theta = None
rms_norm = False
swiglu = False
qk_norm = False
embd_norm = False
norm_eps = 1e-5

batch_size = 32
gradient_accumulation_steps = 2  # x 8 processes x 32 x 1,024 = 524,288 tokens an iteration
max_iters = 19_073  # 10 billion tokens
optimizer = "adamw"
beta2 = 0.95
learning_rate = 6e-4
min_lr = 6e-5
schedule = "cosine"
warmup_iters = 700
compile = True

eval_interval = 250
save_interval = 1000
sample_start = "The meaning of life is"
