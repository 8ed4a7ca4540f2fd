"""Examples without a token to train, for a process that has none left in a step."""


def dummy_of(number: int) -> int:
    """The number under which ExampleSet has example `number` as a dummy, and back."""
    return ~number
