"""Best-fit-decreasing bin packing on counts."""

import numpy as np


def pack_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """(n,) int64: the bin of each length so that no bin holds more than `capacity`, in as few bins as best fit finds.

    Best-fit decreasing, on counts: lengths are placed longest first, each where it leaves the least free; all bins with
    the same room are alike, so equal lengths are placed together. Time grows with n for sorting, and with the number of
    distinct lengths times free spaces, not with n times bins. A longer length gets a bin of its own.
    """
    lengths = np.minimum(np.asarray(lengths), capacity)
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    open_bins: dict[int, list[np.ndarray]] = {}  # free space -> bins with just that room
    spaces = 0  # bit s is set where open_bins[s] has one
    bin_of = np.empty(len(lengths), np.int64)
    placed = made = 0

    def leave_open(bins: np.ndarray, space: int) -> None:
        nonlocal spaces
        if space and len(bins):
            open_bins.setdefault(space, []).append(bins)
            spaces |= 1 << space

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left and length and (fitting := spaces >> length):
            space = (
                length + (fitting & -fitting).bit_length() - 1
            )  # the lowest set bit: the tightest fit
            stack = open_bins[space]
            bins = stack.pop()
            if len(bins) > left:
                stack.append(bins[left:])
                bins = bins[:left]
            if not stack:
                spaces &= ~(1 << space)
            bin_of[order[placed : placed + len(bins)]] = bins
            placed, left = placed + len(bins), left - len(bins)
            leave_open(bins, space - length)
        if left:
            each = capacity // max(1, length)
            new = np.arange(made, made + -(-left // each))
            bin_of[order[placed : placed + left]] = np.repeat(new, each)[:left]
            rest = left - (len(new) - 1) * each  # in the last of them
            leave_open(new[:-1], capacity - each * length)
            leave_open(new[-1:], capacity - rest * length)
            placed, made = placed + left, made + len(new)
    return bin_of
