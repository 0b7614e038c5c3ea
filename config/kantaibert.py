# KantaiBERT, the recipe of the book (chapter 3): a RoBERTa of 6 layers, 83.5M parameters with the
# whole vocabulary, one pass over Kant. It is the default recipe: this file sets nothing else.
#     python train_roberta.py config/kantaibert.py
# On 343 kB of Kant, 2 cores: 74 iterations in 54 s to val loss 7.07, masked accuracy 6 %: a text
# this short is over before attention has learned anything. The book's own file is larger; for this
# one kantaibert_small.py is the better model: 3.86 in a minute. Its settings do not save this size:
#     python train_roberta.py config/kantaibert_small.py --source=kant.txt --n_layer=6 --n_head=12
#         --n_embd=768 --max_epochs=2 --learning_rate=1e-3 --muon_lr=1e-2
# is at val loss 6.23 after 40 iterations, with 66 times the parameters (44.7M; 0.7M).
source = "kant"  # downloaded once into data/kant; --source=kant.txt takes a file at hand
out_dir = "out/kantaibert"
