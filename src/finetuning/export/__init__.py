"""Trained weights in other forms: merged with its base, or as a GGUF file.

Read `gguf_file.py` first: what goes into a file. Then `llama_cpp.py`, which asks what was written.
"""
