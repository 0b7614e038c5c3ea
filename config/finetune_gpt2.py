# Fine-tune GPT-2's own weights on your text; without a network name a local folder:
#   python train.py config/finetune_gpt2.py --init_from=FOLDER
dataset = "shakespeare"  # any data set made with the gpt2 tokenizer
out_dir = "out/finetune_gpt2"
init_from = "gpt2"

dropout = 0.1
block_size = 256
gradient_accumulation_steps = 8  # 8,192 tokens an iteration
max_iters = 100
optimizer = "adamw"
beta2 = 0.95
learning_rate = 3e-5
min_lr = 3e-6
schedule = "cosine"
warmup_iters = 10

eval_interval = 20
sample_start = "ROMEO:"
