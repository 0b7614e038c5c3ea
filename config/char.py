# A character model for any text of about a megabyte, and the race against nanoGPT's laptop recipe:
#     python prepare.py --dataset=char --source=input.txt --tokenizer=char
#     python train.py config/char.py
# On 1.1 MB of Python code, 2 cores of EPYC, 3 seeds: val loss 1.215 +- 0.008 in 12 s; nanoGPT's
# loop (AdamW, 2,000 iterations) takes 98 s to 1.414 +- 0.005: `python -m bench char`.
dataset = "char"

block_size = 64
n_layer = 2  # half of nanoGPT's: more updates in the same time
n_head = 4
n_embd = 128
dropout = 0.0

batch_size = 32
max_iters = 220
learning_rate = 4e-2
momentum = 0.8  # 0.9 is no better in 220 updates
warmup_iters = 20

eval_interval = 0  # only at the end
eval_iters = 40
log_interval = 100
sample_start = "\n"
