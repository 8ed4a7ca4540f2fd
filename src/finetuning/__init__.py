"""Supervised fine-tuning from one YAML recipe.

    row -> messages -> segments -> {input_ids, labels} -> batch -> loss over response tokens
                          \\-> prompt segments only -> generate

Twelve packages; each imports only those to its left (tests/test_structure.py holds it):

    data, hub -> recipe -> launch -> model -> budget -> runs -> inference -> export
        -> evaluation -> training | publishing

Shapes: B sequences in a batch, T tokens in a sequence.
"""
