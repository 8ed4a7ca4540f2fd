"""Trained weights in other forms: an adapter merged into its base, a GGUF file for llama.cpp and Ollama.

Read `gguf_file.py` first: what goes into a file. Then `llama_cpp.py`, which asks what was written.
"""
