"""Files -> rows -> messages -> segments -> token ids and labels -> batches.

Read `prepare.py` first: `build` is the whole way in one function. Then, in the order of the data:
`sources`, `loading`, `readers` (and `row_keys`), `rendering`, `templates` (or `chat_template`),
`tokenization`, `preparation`, `evaluation_split`, `batch_sampler`, `collator`. Nothing here knows a
recipe or the Hub, and only `collator` and `example_set` need torch, so all of it works in a
notebook.
"""
