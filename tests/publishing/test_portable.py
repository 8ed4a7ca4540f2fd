"""The recipe that travels: nothing of this machine, and everything that others need."""

import pytest
from run_folders import copied, retrained

from finetuning.errors import UserError
from finetuning.publishing.portable import portable_recipe, portable_template
from finetuning.recipe.recipe import load_recipe


@pytest.fixture
def travelled(runs, tmp_path):
    """A function: settings of the recipe -> the recipe as it is published."""

    def travel(**changes: str):
        run = retrained(copied(runs["full"], tmp_path / "run"), **changes)
        return portable_recipe(load_recipe(run / "recipe.yaml"), base_commit=None)

    return travel


def test_folders_of_this_machine_become_names(travelled, runs):
    recipe = travelled()
    assert (recipe.model.name, recipe.data.path, recipe.training.output_dir) == (
        "./gpt2",
        "./rows.jsonl",
        "outputs/run",
    )
    assert str(runs["full"].parents[1]) not in recipe.as_yaml()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("databricks/databricks-dolly-15k", "databricks/databricks-dolly-15k"),
        ("recipes/data/quickstart.jsonl", "recipes/data/quickstart.jsonl"),
        ("recipes/data", "./data"),  # a folder that could be taken for a Hub id
        ("~/mine/rows.jsonl", "./rows.jsonl"),
        ("../mine/rows.jsonl", "./rows.jsonl"),
        ("data/../../../home/ada/client/rows.jsonl", "./rows.jsonl"),
    ],
)
def test_data_keeps_its_name_on_the_hub_or_in_the_project(path, expected, travelled):
    assert travelled(data__path=path).data.path == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/home/ada/client/mine.jinja", "./mine.jinja"),
        ("~/mine.jinja", "./mine.jinja"),
        ("qwen3_training", "qwen3_training"),
        (None, None),
    ],
)
def test_a_chat_template_keeps_its_name_and_not_its_folder(name, expected):
    assert portable_template(name) == expected


def test_every_source_of_a_mixture_is_treated_so(travelled):
    sources = travelled(data__path="[{path: /a/b.jsonl, weight: 2}, {path: owner/name}]").data.path
    assert [(source.path, source.weight) for source in sources] == [
        ("./b.jsonl", 2.0),
        ("owner/name", 1.0),
    ]


def test_a_named_base_takes_the_folders_place(travelled):
    model = travelled(publish__base_model="owner/name@v2").model
    assert (model.name, model.revision) == ("owner/name", "v2")


def test_a_named_data_set_takes_the_files_place(travelled):
    recipe = travelled(publish__data="databricks/databricks-dolly-15k")
    assert recipe.data.path == "databricks/databricks-dolly-15k"
    assert recipe.publish.data is None


@pytest.mark.parametrize("path", ["owner/name", "[{path: /a/b.jsonl}]"])
def test_data_that_is_no_local_copy_is_not_called_otherwise(path, runs, tmp_path):
    changes = {"data__path": path, "publish__data": "databricks/databricks-dolly-15k"}
    run = retrained(copied(runs["full"], tmp_path / "run"), **changes)
    with pytest.raises(UserError, match="of which one local file or folder is a copy"):
        portable_recipe(load_recipe(run / "recipe.yaml"), base_commit=None)
