"""Best-fit-decreasing bin packing on counts."""

import numpy as np
from numpy.typing import NDArray


def pack_lengths(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The bin of each length (n,), so that no bin holds more than `capacity`.

    Best-fit decreasing on counts: lengths are placed longest first, each into the bin where it
    leaves the least room. Bins with the same room are interchangeable, so equal lengths are placed
    together: time grows with n for sorting, and with distinct lengths times distinct rooms, not
    with n times bins. A length above `capacity` gets a bin of its own.
    """
    lengths = np.minimum(np.asarray(lengths), capacity)
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    open_bins: dict[int, list[NDArray[np.int64]]] = {}  # room -> arrays of bins with just that room
    rooms = 0  # bit s is set where open_bins[s] is not empty
    bin_of = np.empty(len(lengths), np.int64)
    placed = made = 0

    def leave_open(bins: NDArray[np.int64], room: int) -> None:
        nonlocal rooms
        if room and len(bins):
            open_bins.setdefault(room, []).append(bins)
            rooms |= 1 << room

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left and length and (fitting := rooms >> length):
            tightest = (fitting & -fitting).bit_length() - 1  # number of the lowest set bit
            room = length + tightest
            bins = open_bins[room].pop()
            if len(bins) > left:
                open_bins[room].append(bins[left:])
                bins = bins[:left]
            if not open_bins[room]:
                rooms &= ~(1 << room)
            bin_of[order[placed : placed + len(bins)]] = bins
            placed, left = placed + len(bins), left - len(bins)
            leave_open(bins, room - length)
        if left:
            in_each = capacity // max(1, length)
            new = np.arange(made, made + ceil_div(left, in_each))
            bin_of[order[placed : placed + left]] = np.repeat(new, in_each)[:left]
            in_last = left - (len(new) - 1) * in_each
            leave_open(new[:-1], capacity - in_each * length)
            leave_open(new[-1:], capacity - in_last * length)
            placed, made = placed + left, made + len(new)
    return bin_of


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
