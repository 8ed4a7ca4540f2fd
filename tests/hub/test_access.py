"""What a recipe names on the Hub is told to be there, or not, before anything is loaded."""

import huggingface_hub.constants
import pytest

from finetuning.errors import UserError
from finetuning.hub.access import Need, require_hub


@pytest.mark.parametrize("is_offline", [True, False])
@pytest.mark.parametrize("name", ["a b", "a//b", "-a/b", "a/b.", "a" * 200])
def test_what_no_repository_can_be_called_is_refused_without_asking(monkeypatch, name, is_offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    with pytest.raises(UserError, match=r"data\.path: .* is neither a local path nor a dataset"):
        require_hub([Need(name, "dataset", "data.path")])
