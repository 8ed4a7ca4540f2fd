"""A file of overrides is a sweep: a line is a run."""

import pytest

from finetuning.errors import UserError
from finetuning.launch.sweep import read_sweep


def test_a_line_is_a_run_with_a_folder_of_its_own(tmp_path):
    file = tmp_path / "rates.txt"
    file.write_text(
        "# rates\ntraining.learning_rate=1e-4\n\n"
        "training.seed=2 'training.run_name=a quoted name' # not a comment\n"
    )
    assert read_sweep(file, ["training.max_steps=1"]) == {
        "1": [
            "training.output_dir=outputs/rates/1",
            "training.max_steps=1",
            "training.learning_rate=1e-4",
        ],
        "2": [
            "training.output_dir=outputs/rates/2",
            "training.max_steps=1",
            "training.seed=2",
            "training.run_name=a quoted name",
            *["#", "not", "a", "comment"],
        ],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [("# nothing\n\n", "has no overrides"), ("training.run_name=it's\n", "No closing quotation")],
)
def test_a_file_without_runs_or_with_an_open_quote_is_refused(tmp_path, text, message):
    (tmp_path / "sweep.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_sweep(tmp_path / "sweep.txt", [])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        read_sweep(tmp_path / "none.txt", [])
