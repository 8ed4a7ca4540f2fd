"""What becomes of rows: counted as they are worked on, and reported."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetuning.data.storage import Arrays

# Of each example, and added up in the report: its trained tokens; whether it was cut; whether its
# last trained token is an end mark; spelled and merged of Exceptions.
COUNTED = ("trained", "cut", "closed", "spelled", "merged")
SHOWN_PLACES = 5  # dropped rows of a reason that the report names


@dataclass
class Tally:
    """Counts what becomes of rows."""

    counts: Counter[str] = field(default_factory=Counter)
    """loaded, where, read: rows; made: examples of the rows that were read; empty: rows with a
    trained response of no text; duplicates: examples"""
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    """of the first few dropped rows of each reason"""
    unused: set[str] = field(default_factory=set)
    """columns, and keys of turns, that nothing was read of"""

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < SHOWN_PLACES:
            places.append(f"{reason}: {place}")

    def add(self, other: "Tally") -> None:
        self.counts += other.counts
        self.dropped += other.dropped
        self.unused |= other.unused
        for reason, places in other.places.items():
            self.places[reason] = (self.places.get(reason, []) + places)[:SHOWN_PLACES]


def make_report(
    tally: Tally, arrays: Arrays, kept: NDArray[np.int64], train: int, held_out: int
) -> dict[str, Any]:
    """Of the examples of these numbers, so many of which are trained and evaluated on."""
    counts, lengths = tally.counts, arrays["lengths"][kept]
    longest = lengths
    if "chosen" in arrays:
        chosen, shared = arrays["chosen"][kept], arrays["shared"][kept]
        longest = np.maximum(chosen, lengths - chosen + shared)
    total = int(lengths.sum())
    counted = {name: int(arrays[name][kept].sum()) for name in COUNTED}
    report: dict[str, Any] = {
        "rows": {
            "loaded": counts["loaded"],
            "where": counts["where"],
            "kept": len(kept),
            "train": train,
            "eval": held_out,
        },
        "dropped": {reason: count for reason, count in tally.dropped.items() if count},
        "cut": counted["cut"],
        "tokens": {
            "prompt": total - counted["trained"],
            "response": counted["trained"],
            "total": total,
            "max": int(longest.max(initial=0)),
        },
        "end_mark_share": counted["closed"] / len(kept) if len(kept) else 0.0,
        "places": [place for places in tally.places.values() for place in places],
        "spelled": counted["spelled"],
        "merged": counted["merged"],
        "duplicates": counts["duplicates"],
        "empty": counts["empty"],
        "conversations": counts["read"] if counts["made"] > counts["read"] else 0,
        "examples": counts["made"],
        # A csv file that pandas wrote has its index under no name.
        "unused": sorted(name or "(no name)" for name in tally.unused),
    }
    if "of_chosen" in arrays:
        report["pairs"] = lengths_of_pairs(arrays["of_chosen"][kept], arrays["trained"][kept])
    return report


def lengths_of_pairs(chosen: NDArray[np.int32], both: NDArray[np.int32]) -> dict[str, float]:
    """Mean trained tokens, and the share of pairs that their lengths tell apart."""
    rejected = both - chosen
    means: dict[str, NDArray[Any]] = {"chosen": chosen, "rejected": rejected}
    means |= {"chosen_longer": chosen > rejected, "chosen_shorter": chosen < rejected}
    return {name: float(each.mean()) if len(each) else 0.0 for name, each in means.items()}
