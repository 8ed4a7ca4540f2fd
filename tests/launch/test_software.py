"""Nodes of one run that do not have the same software are named."""

import sys

import pytest

from finetuning.errors import UserError
from finetuning.launch.software import require_deepspeed, require_same_software, software
from finetuning.launch.strategy import Strategy

SAME = {"python": "3.12.1", "torch": "2.13.0", "this code": "abc"}


def test_this_node_knows_its_software():
    found = software()
    assert {"python", "torch", "transformers", "trl", "this code"} <= set(found)
    require_same_software([("node1", found), ("node2", found)])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"torch": "2.12.0"}, "torch is 2.13.0 on node1, node2, 2.12.0 on node3"),
        ({"python": "3.11.0"}, "python is 3.12.1 on node1, node2, 3.11.0 on node3"),
        ({"this code": None}, "this code is abc on node1, node2, none on node3"),
        ({"deepspeed": "0.19.8"}, "deepspeed is none on node1, node2, 0.19.8 on node3"),
    ],
)
def test_what_differs_is_named_with_the_nodes(other, said):
    found = [("node1", SAME), ("node1", SAME), ("node2", SAME), ("node3", {**SAME, **other})]
    with pytest.raises(UserError, match=said):
        require_same_software(found)


def test_of_many_nodes_three_are_named():
    found = [(f"node{n}", SAME) for n in range(9)] + [("node9", {**SAME, "torch": "1"})]
    with pytest.raises(UserError, match="node0, node1, node2 and 6 more, 1 on node9"):
        require_same_software(found)


def test_a_config_of_zero_without_deepspeed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"asks for zero3, .* -e '\.\[deepspeed\]'"):
        require_deepspeed(Strategy("zero3", 2))
    require_deepspeed(Strategy("ddp", 2))
