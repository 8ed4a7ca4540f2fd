"""An answer shown while it is generated, in whole words."""

from collections.abc import Callable

import torch


class WordStreamer:
    """What transformers calls with each new token: shows what is new, in whole words."""

    def __init__(self, read: Callable[[list[int]], str], show: Callable[[str], None]) -> None:
        self.read, self.show = read, show
        self.ids: list[int] | None = None
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self.go_to(whole_words(self.read(self.ids)))

    def end(self) -> None:
        self.go_to(self.read(self.ids or []))

    def go_to(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            self.show(text[len(self.shown) :])
            self.shown = text


def whole_words(text: str) -> str:
    """The text without a word that may still grow, or a character that is not yet whole."""
    text = text.rstrip("\ufffd")
    if text and ord(text[-1]) >= 0x2E80:  # Chinese and Japanese have no spaces between words
        return text
    return text[: max(map(text.rfind, " \n")) + 1]
