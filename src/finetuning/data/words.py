"""Words and their ids, for tokenizers that encode each word by itself, as GPT-2's does.

Words repeat, and encoding takes most of the time of preparing: each distinct one is encoded once.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import count, islice
from threading import Lock

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from finetuning.data.examples import Counts, Ids, ranges, sums
from finetuning.data.plain_tokenizer import SECRET

# A single space between two words: GPT-2's pre-tokenizer always begins a new piece there, whatever
# stands around, and BPE never merges across pieces. Python counts a little more as white space than
# the tokenizer does, which is the safe side.
WORD_BORDER = re.compile(r"(?<=\S)(?= \S)")

REMEMBERED = 2**17  # words: 25 MB
# Words that are encoded in one text, a separator behind each: a text by itself takes longer than
# the word in it (186,000 words of dolly 1.2 s instead of 2.2 s).
TOGETHER = 256
SEPARATOR = f"{SECRET}separator"


class Words:
    """The ids of every word that was met, also of a special token under its secret name.

    The tokenizer, a copy that is the encoder's own, gets one more token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.add_special_tokens([SEPARATOR])
        self.separator = self.tokenizer.token_to_id(SEPARATOR)
        self.lock = Lock()
        self.forget()

    def forget(self) -> None:
        self.numbers: defaultdict[str, int] = defaultdict(count().__next__)  # word -> its number
        self.ids: Ids = np.empty(0, np.int32)  # of all words, by their numbers, one after another
        self.lengths: Counts = np.empty(0, np.int64)  # (words,)

    def encode(self, texts: Iterable[list[str]]) -> tuple[Ids, Counts]:
        """Token ids of all texts, one after another (tokens,), and how many each has (texts,).

        A text is given as its words.
        """
        with self.lock:
            if len(self.numbers) > REMEMBERED:
                self.forget()
            numbers: list[int] = []
            words_in_text = []
            for words in texts:
                numbers += map(self.numbers.__getitem__, words)
                words_in_text.append(len(words))
            self.learn([*islice(self.numbers, len(self.lengths), None)])

            word = np.array(numbers, np.int64)
            starts, lengths = np.cumsum(self.lengths) - self.lengths, self.lengths[word]
            tokens = self.ids[ranges(starts[word], lengths)]
        return tokens, sums(lengths, np.array(words_in_text, np.int64))

    def learn(self, new: list[str]) -> None:
        texts = [
            SEPARATOR.join([*new[start : start + TOGETHER], ""])
            for start in range(0, len(new), TOGETHER)
        ]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = np.concatenate([self.ids[:0], *(np.array(each.ids, np.int32) for each in encoded)])
        ends = np.flatnonzero(ids == self.separator)
        self.lengths = np.append(self.lengths, np.diff(ends, prepend=-1) - 1)
        self.ids = np.append(self.ids, ids[ids != self.separator])


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether words may be encoded one by one.

    So it is with GPT-2's kind of pre-tokenizer, if no normalizer and no added token looks further.
    """
    step = tokenizer.pre_tokenizer
    is_gpt2 = (
        isinstance(step, pre_tokenizers.ByteLevel)
        and step.use_regex
        and tokenizer.normalizer is None
    )
    added_tokens = tokenizer.get_added_tokens_decoder().values()
    return is_gpt2 and all(
        token.special and not (token.lstrip or token.rstrip or token.single_word)
        for token in added_tokens
    )
