"""The base model: tokenizer, weights, precision, quantization, LoRA, attention and the loss.

Read `loss.py` first, then `response_head.py` and `attention.py`: what a training step computes
differently.
"""
