"""Best-fit-decreasing bin packing on counts."""

import numpy as np
from numpy.typing import NDArray

Bins = NDArray[np.int64]


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
    open_bins, bin_of = OpenBins(), np.empty(len(lengths), np.int64)
    placed = made = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = placed + int(counts[length])
        while placed < end and length and (found := open_bins.take(length, end - placed)):
            bins, room = found
            bin_of[order[placed : placed + len(bins)]] = bins
            open_bins.add(bins, room - length)
            placed += len(bins)
        if left := end - placed:
            in_each = capacity // max(1, length)
            new = np.arange(made, made + ceil_div(left, in_each))
            bin_of[order[placed:end]] = np.repeat(new, in_each)[:left]
            in_last = left - (len(new) - 1) * in_each
            open_bins.add(new[:-1], capacity - in_each * length)
            open_bins.add(new[-1:], capacity - in_last * length)
            placed, made = end, made + len(new)
    return bin_of


class OpenBins:
    """Bins that have room, by how much they have."""

    def __init__(self) -> None:
        self.by_room: dict[int, list[Bins]] = {}
        self.rooms = 0  # bit r is set where by_room[r] is not empty

    def add(self, bins: Bins, room: int) -> None:
        if room and len(bins):
            self.by_room.setdefault(room, []).append(bins)
            self.rooms |= 1 << room

    def take(self, length: int, count: int) -> tuple[Bins, int] | None:
        """At most `count` of the bins with the least room for a length, and how much that is."""
        fitting = self.rooms >> length
        if not fitting:
            return None
        lowest = (fitting & -fitting).bit_length() - 1  # number of the lowest set bit
        room = length + lowest
        bins = self.by_room[room].pop()
        if len(bins) > count:
            self.by_room[room].append(bins[count:])
        if not self.by_room[room]:
            self.rooms &= ~(1 << room)
        return bins[:count], room


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
