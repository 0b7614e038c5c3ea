# KantaiBERT, the recipe of the book (chapter 3): a RoBERTa of 6 layers, 83.5M parameters with the
# whole vocabulary, one pass over Kant. It is the default recipe: this file sets nothing else.
#     python train_roberta.py config/kantaibert.py
# On 343 kB of Kant, 2 cores: 74 iterations in 54 s to val loss 7.07, masked accuracy 6 %: a text
# this short is over before attention has learned anything. The book's own file is larger; for this
# one kantaibert_small.py is the better model: 3.86 in a minute.
source = "kant"  # downloaded once into data/kant; --source=kant.txt takes a file at hand
out_dir = "out/kantaibert"
