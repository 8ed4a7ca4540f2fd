"""One run, from the base model to a finished run folder: steps, checkpoints, resuming, stopping.

Read `train.py` first, then `trainer.py`.
"""
