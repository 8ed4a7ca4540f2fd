"""The base model: tokenizer, weights, precision, quantization, LoRA, attention over packed examples, the loss.

Read `loss.py` first, then `attention.py`: together they are what a training step computes differently.
"""
