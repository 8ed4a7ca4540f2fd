"""A run resumes in its folder with steps as before, or is refused."""

from pathlib import Path

import pytest
from commands import RECIPE, ROWS, write_files
from conftest import ROOT

from finetuning.errors import UserError
from finetuning.launch.strategy import Strategy
from finetuning.recipe.recipe import Recipe, load_recipe
from finetuning.runs.environment import read_environment, write_finish, write_start
from finetuning.runs.reopen import is_finished, open_run_folder, with_begun_draw, with_real_folder


@pytest.fixture
def recipe_of(tmp_path):
    """A function that makes the recipe of these overrides; its run folder is tmp_path/run."""
    write_files(tmp_path, {"recipe.yaml": RECIPE, "rows.jsonl": ROWS})
    (tmp_path / "run").mkdir()

    def make(*overrides: str) -> Recipe:
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return make


def begun(recipe: Recipe, strategy: Strategy, fingerprint: str = "rows") -> Path:
    """A run folder whose run was begun like this, and stopped."""
    folder = Path(recipe.training.output_dir)
    launch = {
        "strategy": strategy.name,
        "processes": strategy.processes,
        "host": "node7",
        "process": 4321,
    }
    write_start(folder, recipe, fingerprint, launch)
    return folder


# Resuming


@pytest.mark.parametrize(
    ("before", "processes", "overrides", "now"),
    [
        ([], Strategy("single", 1), [], Strategy("single", 1)),
        (
            ["training.per_device_train_batch_size=4"],
            Strategy("ddp", 2),
            ["training.per_device_train_batch_size=8"],
            Strategy("single", 1),
        ),
        (
            ["training.gradient_accumulation_steps=2"],
            Strategy("single", 1),
            ["training.gradient_accumulation_steps=1"],
            Strategy("ddp", 2),
        ),
        (
            ["training.global_batch_size=16"],
            Strategy("ddp", 2),
            ["training.global_batch_size=16"],
            Strategy("ddp", 4),
        ),
        (
            ["training.global_batch_size=16"],
            Strategy("ddp", 2),
            ["training.global_batch_size=16"],
            Strategy("single", 1),
        ),
        ([], Strategy("zero2", 2), [], Strategy("zero2", 2)),
        (
            ["training.global_batch_size=16"],
            Strategy("fsdp", 2),
            ["training.global_batch_size=16"],
            Strategy("fsdp", 2),
        ),
        (
            ["data.batch_tokens=64", "training.gradient_accumulation_steps=2"],
            Strategy("single", 1),
            ["data.batch_tokens=64", "training.per_device_train_batch_size=3"],
            Strategy("ddp", 2),
        ),
    ],
)
def test_a_run_is_resumed_by_other_processes_where_a_step_stays_the_same(
    recipe_of, before, processes, overrides, now
):
    folder = begun(recipe_of(*before), processes)
    assert open_run_folder(recipe_of(*overrides), "rows", now) == folder


@pytest.mark.parametrize(
    ("before", "strategy", "overrides", "now", "said"),
    [
        (
            [],
            Strategy("single", 1),
            [],
            Strategy("ddp", 2),
            "cannot be resumed: a step had 8 examples (processes x accumulation x examples: "
            "1 x 1 x 8 = 8); now it has 16 (2 x 1 x 8 = 16); change "
            "training.gradient_accumulation_steps, or begin anew in another training.output_dir "
            "with training.global_batch_size",
        ),
        (
            [],
            Strategy("ddp", 2),
            ["training.gradient_accumulation_steps=2"],
            Strategy("ddp", 2),
            "now it has 32",
        ),
        (
            ["data.batch_tokens=64"],
            Strategy("single", 1),
            ["data.batch_tokens=64"],
            Strategy("ddp", 2),
            "a step had 1 micro-batches",
        ),
        (
            ["training.global_batch_size=16"],
            Strategy("zero2", 2),
            ["training.global_batch_size=16"],
            Strategy("zero2", 4),
            "it was trained as zero2 by 2 processes, which each hold a part of the optimizer; now "
            "it is zero2, 4 processes. Only single and ddp can change into each other; start it "
            "as it was",
        ),
        ([], Strategy("zero2", 2), [], Strategy("zero3", 2), "now it is zero3, 2 processes."),
        ([], Strategy("ddp", 2), [], Strategy("zero2", 2), "it was trained as ddp by 2 processes"),
        ([], Strategy("fsdp", 2), [], Strategy("ddp", 2), "it was trained as fsdp by 2 processes"),
    ],
)
def test_a_run_that_would_take_other_steps_or_cannot_read_its_optimizer_is_refused(
    recipe_of, before, strategy, overrides, now, said
):
    folder = begun(recipe_of(*before), strategy)
    with pytest.raises(UserError) as refused:
        open_run_folder(recipe_of(*overrides), "rows", now)
    assert str(refused.value).startswith(f"{folder} cannot be resumed: ") and said in str(
        refused.value
    )


def test_the_last_launch_counts_not_the_first(recipe_of):
    recipe = recipe_of("training.global_batch_size=16")
    begun(recipe, Strategy("single", 1))
    begun(recipe, Strategy("ddp", 2))
    assert [
        launch["processes"]
        for launch in read_environment(begun(recipe, Strategy("ddp", 4)))["launches"]
    ] == [
        1,
        2,
        4,
    ]
    open_run_folder(recipe, "rows", Strategy("single", 1))


def test_a_finished_run_is_left_alone_whatever_the_processes(recipe_of):
    folder = begun(recipe_of(), Strategy("zero3", 8))
    assert is_finished(folder) is None
    (folder / "model.safetensors").touch()
    write_finish(folder, 5)
    assert is_finished(folder).startswith("20")
    assert open_run_folder(recipe_of(), "rows", Strategy("single", 1)) == folder


@pytest.mark.parametrize("change", ["publish.subfolder=other", "publish=null"])
def test_where_it_will_be_published_may_change_meanwhile(recipe_of, change):
    before = ["publish.repo=you/models", "publish.subfolder=one"]
    begun(recipe_of(*before), Strategy("single", 1))
    folder = begun(recipe_of(*before, change), Strategy("single", 1))
    assert load_recipe(folder / "recipe.yaml").publish == recipe_of(*before, change).publish


@pytest.mark.parametrize(
    ("overrides", "fingerprint", "said"),
    [
        (["training.learning_rate=0.5"], "rows", "training.learning_rate was None, is 0.5"),
        (["data.max_length=32"], "rows", "data.max_length was 64, is 32"),
        (["training.global_batch_size=8"], "rows", "training.global_batch_size was None, is 8"),
        ([], "other rows", "its data was not the same"),
    ],
)
def test_a_folder_of_another_run_is_refused(recipe_of, overrides, fingerprint, said):
    begun(recipe_of(), Strategy("single", 1))
    with pytest.raises(UserError, match=f"belongs to another run: {said}"):
        open_run_folder(recipe_of(*overrides), fingerprint, Strategy("single", 1))


def test_a_run_that_was_refused_before_its_first_step_leaves_nothing_to_compare_with(recipe_of):
    folder = open_run_folder(recipe_of(), "rows", Strategy("single", 1))
    assert list(folder.iterdir()) == []
    open_run_folder(recipe_of("training.learning_rate=0.5"), "other rows", Strategy("ddp", 2))


@pytest.mark.parametrize(
    "content", ['{"data": ', "null", "[]", '{"launches": 1}', '{"launches": [3]}']
)
def test_a_damaged_environment_is_named_and_begun_anew(recipe_of, capsys, content):
    recipe = recipe_of()
    folder = begun(recipe, Strategy("single", 1))
    (folder / "environment.json").write_text(content)
    with pytest.raises(UserError, match=r"environment\.json is damaged; the command that began"):
        read_environment(folder)
    assert open_run_folder(recipe, "rows", Strategy("single", 1)) == folder
    assert "environment.json is damaged: its record" in capsys.readouterr().err
    assert len(read_environment(begun(recipe, Strategy("single", 1)))["launches"]) == 1


# What may change


@pytest.mark.parametrize(
    "change",
    [
        *("training.save_steps=7", "training.logging_steps=3", "training.report_to=none"),
        *("training.save_total_limit=3", "training.eval_steps=5", "training.eval_strategy=epoch"),
        *("training.dataloader_num_workers=2", "generation.prompts=[What?]"),
        "training.per_device_eval_batch_size=2",
    ],
)
def test_what_moves_no_weights_may_change_and_is_recorded(recipe_of, change):
    folder = begun(recipe_of("data.eval={every: 2}"), Strategy("single", 1))
    recipe = recipe_of("data.eval={every: 2}", change)
    assert open_run_folder(recipe, "rows", Strategy("single", 1)) == folder
    begun(recipe, Strategy("single", 1))
    assert load_recipe(folder / "recipe.yaml").resolved() == recipe.resolved()


@pytest.mark.parametrize(
    "chooses",
    [
        ["training.lr_scheduler_type=reduce_lr_on_plateau", "training.eval_strategy=steps"],
        [
            *("training.load_best_model_at_end=true", "training.save_strategy=best"),
            "training.eval_strategy=steps",
        ],
    ],
)
def test_where_an_evaluation_decides_its_steps_stay(recipe_of, chooses):
    begun(
        recipe_of("data.eval={every: 2}", "training.eval_steps=4", *chooses), Strategy("single", 1)
    )
    with pytest.raises(UserError, match=r"training\.eval_steps was 4(.0)?, is 5"):
        now = recipe_of("data.eval={every: 2}", "training.eval_steps=5", *chooses)
        open_run_folder(now, "rows", Strategy("single", 1))


def test_a_run_that_began_without_groups_keeps_its_evaluation_set(recipe_of, capsys):
    begun(recipe_of("data.eval={every: 2, group_by: null}"), Strategy("single", 1))
    recipe = with_begun_draw(recipe_of("data.eval={every: 2}"))
    assert recipe.data.eval.group_by is None
    assert "began with data.eval.group_by: null" in capsys.readouterr().err
    open_run_folder(recipe, "rows", Strategy("single", 1))
    said = with_begun_draw(recipe_of("data.eval={every: 2, group_by: same_text}"))
    with pytest.raises(UserError, match=r"data\.eval\.group_by was None, is 'same_text'"):
        open_run_folder(said, "rows", Strategy("single", 1))


def test_a_run_that_began_with_groups_keeps_them(recipe_of, capsys):
    recipe = recipe_of("data.eval={every: 2}")
    assert with_begun_draw(recipe) == recipe
    begun(recipe, Strategy("single", 1))
    assert with_begun_draw(recipe) == recipe and not capsys.readouterr().err


def test_one_folder_has_many_names(recipe_of, tmp_path, monkeypatch):
    folder = begun(recipe_of(), Strategy("single", 1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for name in ("run", "./run", "run/", "link", str(folder), f"{folder}/../run"):
        recipe = recipe_of(f"training.output_dir={name}")
        assert open_run_folder(recipe, "rows", Strategy("single", 1)).samefile(folder)


def test_a_run_folder_may_be_moved_and_its_own_recipe_trains_where_it_is(recipe_of, tmp_path):
    folder = begun(recipe_of(), Strategy("single", 1))
    moved = folder.rename(tmp_path / "moved")
    recipe = load_recipe(moved / "recipe.yaml")
    recipe = with_real_folder(recipe, moved / "recipe.yaml")
    assert open_run_folder(recipe, "rows", Strategy("single", 1)) == moved
    assert not folder.exists()
    other = load_recipe(moved / "recipe.yaml", [f"training.output_dir={tmp_path / 'other'}"])
    assert with_real_folder(other, moved / "recipe.yaml") == other


@pytest.mark.parametrize(
    ("kind", "said"),
    [("constant", "has no end, so the steps before are the same"), ("cosine", "would have had")],
)
@pytest.mark.parametrize("length", ["num_train_epochs", "max_steps"])
def test_a_run_may_be_made_longer_and_what_becomes_of_the_rate_is_said(
    recipe_of, capsys, kind, said, length
):
    schedule = [f"training.lr_scheduler_type={kind}"]
    if length == "num_train_epochs":
        schedule.append("training.max_steps=-1")
    before = recipe_of(*schedule, f"training.{length}=3")
    folder = begun(before, Strategy("single", 1))
    longer = recipe_of(*schedule, f"training.{length}=5")
    open_run_folder(longer, "rows", Strategy("single", 1))
    assert said in capsys.readouterr().err
    begun(longer, Strategy("single", 1))
    with pytest.raises(UserError, match=f"training.{length} was 5(.0)?, is 3"):
        open_run_folder(before, "rows", Strategy("single", 1))
    assert is_finished(folder) is None


def test_a_finished_run_that_is_to_be_longer_needs_a_checkpoint(recipe_of):
    folder = begun(recipe_of("training.max_steps=3"), Strategy("single", 1))
    (folder / "model.safetensors").touch()
    write_finish(folder, 5)
    assert is_finished(folder, recipe_of("training.max_steps=3"))
    with pytest.raises(UserError, match="is finished, but it has no whole checkpoint"):
        is_finished(folder, recipe_of("training.max_steps=4"))


def test_nobody_is_told_to_delete_a_run():
    sources = [ROOT / "src" / "sft.py", ROOT / "src" / "finetuning" / "runs" / "reopen.py"]
    assert not [path for path in sources if "delete" in path.read_text(encoding="utf-8")]


# What is written


def test_a_resumed_run_keeps_what_was_written_first(recipe_of):
    recipe = recipe_of("training.learning_rate=0.5")
    first = read_environment(begun(recipe, Strategy("single", 1)))
    folder = begun(recipe, Strategy("single", 1))
    second = read_environment(folder)
    assert {**second, "launches": second["launches"][:1]} == first and len(second["launches"]) == 2
    assert load_recipe(folder / "recipe.yaml").resolved() == recipe.resolved()
