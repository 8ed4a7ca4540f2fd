"""The Harry Potter recipes from file to tokens: what a person would write down, and no more."""

import json

import numpy as np
import pytest
import tiny
from conftest import ROOT

from finetuning.data.cache import prepare
from finetuning.data.chosen_template import load_template
from finetuning.recipe.recipe import load_recipe

# Invented, in the shape of Harry-Potter-Dialogue-Dataset's en_train_set.json.
SESSIONS = {
    "Session-1": {
        "position": "Book0-chapter1",
        "speakers": ["Harry", "Mira"],
        "scene": "Two people wait.\nIt rains.",
        "dialogue": [
            "Harry: Is anyone there?",
            "Mira: Only me: Mira.",
            "Harry: Good: tea: at last.",
            "Harry: With milk?",
            "A door slams",
            "Harry: What was that?",
            "Mira: The wind.",
            "Harry: I see.",
        ],
    },
    "Session-2": {
        "scene": "A garden.",
        "dialogue": ["Mira: Bye.", "Harry: Bye, Mira.", "Oskar: Wait!\nPlease.", "Harry: Why?"],
    },
    "Session-3": {"scene": "Behind the first two.", "dialogue": ["Mira: Late?", "Harry: Late."]},
}
SCENE = "Describe a scene from the story of Harry Potter."
PAIRS = [
    (SCENE, "Two people wait.<NL>It rains."),
    ("Only me: Mira.", "Good: tea: at last."),
    ("The wind.", "I see."),
    (SCENE, "A garden."),
    ("Bye.", "Bye, Mira."),
    ("Wait!<NL>Please.", "Why?"),
]
END = "<|endoftext|>"


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def recipe(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("sessions") / "en_train_set.json"
    file.write_text(json.dumps(SESSIONS), encoding="utf-8")
    name = f"recipes/harry_potter_bloomz_1b1_lora{request.param}.yaml"
    return load_recipe(ROOT / name, [f"data.path={file}", "data.sessions=2"])


def test_the_examples_are_those_written_by_hand_and_every_fifth_is_held_out(recipe):
    tokenizer = tiny.byte_level()
    made = prepare(recipe.data, tokenizer)
    texts = {}
    for part in (made.train, made.eval):
        for row, example in zip(part.rows, part, strict=True):
            is_trained = example["labels"] != -100
            prompt, response = (
                tokenizer.decode(example["input_ids"][mask]) for mask in (~is_trained, is_trained)
            )
            texts[int(row)] = prompt, response
    expected = [
        (f"### 指示:<NL>{asked}<NL><NL>### 回答:<NL>", f"{said}{END}") for asked, said in PAIRS
    ]
    # The line without a colon is a row of its own, the third: counted, named, and not trained on.
    rows = [0, 1, 3, 4, 5, 6]
    assert [texts[row] for row in rows] == expected and len(texts) == len(rows)
    assert made.report["dropped"] == {"invalid": 1}
    (place,) = made.report["places"]
    assert "row 2" in place and "expected 'Speaker: text', found str 'A door slams'" in place
    assert made.eval.rows.tolist() == [rows[0], rows[5]] and made.train.rows.tolist() == rows[1:5]
    assert made.report["end_mark_share"] == 1.0


def test_the_question_that_is_asked_is_the_one_that_was_trained(recipe):
    tokenizer = tiny.byte_level()
    template = load_template(recipe.data, tokenizer)
    (segments,) = [template.render_prompt([{"role": "user", "content": "Wait!\nPlease."}])]
    asked = "".join(segment.text for segment in segments)
    made = prepare(recipe.data, tokenizer)
    texts = [tokenizer.decode(example["input_ids"]) for example in (*made.train, *made.eval)]
    assert f"{asked}Why?{END}" in texts
    assert template.strip_markers("Two people wait.<NL>It rains.") == "Two people wait.\nIt rains."


def test_the_two_recipes_are_one_training_apart_from_the_quantization():
    one, other = (
        load_recipe(ROOT / "recipes" / f"harry_potter_bloomz_1b1_lora{bits}bit.yaml").model_dump()
        for bits in (8, 4)
    )
    assert (one["model"].pop("quantization"), other["model"].pop("quantization")) == (
        "8bit",
        "4bit",
    )
    for whole in (one, other):
        del whole["training"]["output_dir"]
    assert one == other


def test_a_scene_that_is_too_long_is_kept_without_a_false_end(recipe, tmp_path):
    file = tmp_path / "long.json"
    file.write_text(
        json.dumps({"Session-1": {"scene": "word " * 500, "dialogue": ["Mira: a", "Harry: b"]}})
    )
    made = prepare(recipe.data.model_copy(update={"path": str(file)}), tiny.byte_level())
    (scene,) = [example for example in made.eval if len(example["input_ids"]) == 256]
    assert made.report["cut"] == 1 and scene["labels"][-1] != -100
    assert tiny.byte_level().eos_token_id not in np.array(scene["labels"])
