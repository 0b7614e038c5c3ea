# nanoGPT's laptop model, 0.8M parameters on single characters, for any text of about a megabyte:
#     python prepare.py --dataset=char --source=input.txt --tokenizer=char
#     python train.py config/char.py
# On 1.1 MB of Python code, 2 cores: val loss 1.37 in 29 s; nanoGPT's loop (AdamW, 2,000 iterations)
# takes 89 s to 1.42, see `python -m bench char`.
dataset = "char"

block_size = 64
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 12
max_iters = 600
warmup_iters = 20

eval_interval = 0  # only at the end
eval_iters = 150
log_interval = 100
sample_start = "\n"
