"""Supervised fine-tuning from one YAML recipe.

    row -> messages -> segments -> {input_ids, labels} -> batch -> loss over response tokens
    sources  readers   templates   tokenization          batching  trainer
                          \\-> prompt segments only -> generate (answers)

Shapes: B sequences in a batch, T tokens in a sequence.
"""
