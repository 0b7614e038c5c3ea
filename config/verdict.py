# The Verdict with the model of "Build a Large Language Model (From Scratch)", chapter 5: 163M
# parameters of GPT-2 124M's shape (the head is not tied) learn one short story by heart.
# Overfitting is the point: train loss falls to 0.3-0.6, val loss stays near 6.5. 132 s on 2 cores.
dataset = "verdict"
seed = 7  # seeds differ: 7 ends below 0.6, 123 and 1337 at 0.64

block_size = 256
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1
init = "torch"  # with "gpt2" the train loss is still above 5 at the end

# GPT-2's shape, but for the biases of queries, keys and values and the untied head
bias = True
tie_weights = False
rope_theta = None
rms_norm = False
swiglu = False
qk_norm = False
embd_norm = False
norm_eps = 1e-5

batch_size = 2
max_epochs = 10  # 90 iterations of 2 x 256 tokens
optimizer = "adamw"
learning_rate = min_lr = 4e-4  # constant
warmup_iters = 0
beta2 = 0.999
grad_clip = 0.0

eval_interval = 5
eval_iters = 5
log_interval = 1
sample_start = "Every effort moves you"
sample_tokens = 50
sample_temperature = 0.0
