"""The lesson's accelerate run: as config/mrpc.py with learning rate 3e-5. One process or many:
    python finetune_mrpc.py config/mrpc_accelerate.py
    torchrun --nproc_per_node 2 finetune_mrpc.py config/mrpc_accelerate.py --batch_size=4
Iterations of the same 8 pairs either way.
"""

learning_rate = 3e-5
out_dir = "out/mrpc_accelerate"
