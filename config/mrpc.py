"""The lesson: BERT on GLUE MRPC, 3 epochs of 459 iterations of 8 pairs, learning rate 5e-5 falling
to 0. These are the defaults of finetune_mrpc.py, so nothing is set here.

From the hub, or offline with your files and a local model folder:
    python finetune_mrpc.py config/mrpc.py --model=FOLDER --train_file=F --validation_file=F
bert-base-uncased is expected at accuracy 0.84 to 0.87, F1 0.88 to 0.91 on the validation split
(published; untested here: it needs the hub). All-positive: 0.684, 0.812.
"""
