# Azerbaijani Wikipedia, 98M parameters: the recipe of a two-day pre-training course.
# Its text (about 200,000 articles) comes from the Hugging Face hub: needs a network once.
# Meant for one GPU with 16 GB or more; not run on the machine the README's figures come from.
dataset = "azwiki"  # trains its own BPE of 16,384 tokens

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1

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

batch_size = 12
gradient_accumulation_steps = 4  # 24,576 tokens an iteration
max_iters = 5000
optimizer = "adamw"
beta2 = 0.95
learning_rate = 6e-4
min_lr = 6e-5
schedule = "cosine"
warmup_iters = 100
mixed_precision = "fp16"  # on a card with fast bf16, "auto" is the better choice

eval_interval = 500
eval_iters = 200
save_interval = 500
sample_start = "Azərbaycan"
