# A character model for any text of about a megabyte, and the race against nanoGPT's laptop recipe:
#     python prepare.py --dataset=char --source=input.txt --tokenizer=char
#     python train.py config/char.py
#
dataset = "char"

block_size = 64
n_layer = 2  # half of nanoGPT's: more updates in the same time
n_head = 4
n_embd = 128
dropout = 0.0

batch_size = 32
max_iters = 220
learning_rate = 4e-2
warmup_iters = 20

eval_interval = 0  # only at the end
eval_iters = 40
log_interval = 100
sample_start = "\n"
