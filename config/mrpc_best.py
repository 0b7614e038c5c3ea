"""For a small sentence encoder on a laptop: twice the batch and the rate of the lesson, a pooling
layer, both orders of a pair.
    python finetune_mrpc.py config/mrpc_best.py --model=FOLDER --train_file=F --test_file=F
"""

pooling = "mean"
both_orders = True
max_epochs = 4
batch_size = 16
learning_rate = 1e-4
warmup_iters = 92  # a tenth of MRPC's 920 iterations
out_dir = "out/mrpc_best"
