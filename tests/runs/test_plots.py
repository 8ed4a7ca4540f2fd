"""Labels of plots are in the language of the person who looks at them."""

import pytest

from finetuning.runs import plots


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "tokens"),
        ({"LANG": "C.UTF-8"}, "tokens"),
        ({"LANG": "ja_JP.UTF-8"}, "事例の長さ (トークン数)"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": "en_US.UTF-8"}, "tokens"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "ja_JP.UTF-8"}, "事例の長さ (トークン数)"),
    ],
)
def test_labels_are_japanese_where_the_locale_is(environment, expected, monkeypatch, tmp_path):
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert plots.label("tokens") == expected
    plots.plot_lengths([3, 4, 5], 9, tmp_path)
    assert (tmp_path / "token_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_a_model_card_is_english_for_everyone(monkeypatch):
    metrics = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.0}]
    monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
    japanese = plots.plot_losses(metrics)
    monkeypatch.setenv("LC_ALL", "C")
    assert japanese == plots.plot_losses(metrics) and plots.plot_losses([]) is None
