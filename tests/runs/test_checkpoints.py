"""A checkpoint is whole or is not used, whatever became of its files and wherever its writing was
cut off.
"""

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetuning.runs.checkpoints import (
    SEAL,
    UNFINISHED,
    checkpoints_of,
    clear_unfinished,
    content_damage,
    damage_of,
    move_into,
    remove,
    seal,
    seal_and_rotate,
    size_damage,
    step_of,
    verify_newest_first,
)

WEIGHTS, OPTIMIZER = "model.safetensors", "global_step7/optimizer.pt"


def write(checkpoint: Path) -> Path:
    """Files as a trainer leaves them, one of them below a folder, one empty; not sealed."""
    (checkpoint / OPTIMIZER).parent.mkdir(parents=True)
    (checkpoint / WEIGHTS).write_bytes(checkpoint.name.encode() * 5)
    (checkpoint / OPTIMIZER).write_bytes(bytes(range(256)))
    (checkpoint / "latest").touch()
    return checkpoint


def whole(folder: Path, *steps: int) -> None:
    for step in steps:
        seal(write(folder / f"checkpoint-{step}"))


def keep_new(
    folder: Path, step: int, limit: int | None = None, best_step: int | None = None
) -> None:
    """What a trainer does to save."""
    seal_and_rotate(
        write(clear_unfinished(folder) / f"checkpoint-{step}"), folder, limit, best_step
    )


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints_of(folder)]


def flip_bit(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


# Whole or damaged


def test_what_was_sealed_is_whole(tmp_path):
    checkpoint = write(tmp_path / "checkpoint-7")
    seal(checkpoint)
    assert damage_of(checkpoint) is None
    contents = json.loads((checkpoint / SEAL).read_text())
    assert {name: entry["bytes"] for name, entry in contents.items()} == {
        WEIGHTS: 60,
        OPTIMIZER: 256,
        "latest": 0,
    }


@pytest.mark.parametrize("content", [b"", b"{}", b"[3]", b"null", b"\xff", b'{"a": 1}'])
def test_a_run_folder_with_a_damaged_seal_is_not_taken_for_whole(content, tmp_path):
    folder = write(tmp_path / "run")
    assert size_damage(folder) is None and content_damage(folder) is None  # as before seals
    seal(folder)
    assert size_damage(folder) is None and content_damage(folder) is None
    (folder / SEAL).write_bytes(content)
    assert size_damage(folder) == content_damage(folder)
    assert size_damage(folder).startswith("sealed.json is damaged")


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "{name} has {less} bytes instead of {size}"),
        (empty, "{name} has 0 bytes instead of {size}"),
        (
            lambda file: file.write_bytes(file.read_bytes() + b"\0"),
            "{name} has {more} bytes instead of {size}",
        ),
        (lambda file: flip_bit(file, 77), "{name} is not what was written"),
        (Path.unlink, "{name} is missing"),
    ],
    ids=["truncated", "empty", "longer", "bit", "missing"],
)
def test_a_damaged_file_is_named(tmp_path, name, damage, said):
    whole(tmp_path, 7)
    checkpoint = tmp_path / "checkpoint-7"
    size = (checkpoint / name).stat().st_size
    damage(checkpoint / name)
    assert damage_of(checkpoint) == said.format(name=name, size=size, less=size - 1, more=size + 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "it was not written to its end"),
        (empty, f"{SEAL} is damaged"),
        (lambda file: os.truncate(file, 40), f"{SEAL} is damaged"),
        (lambda file: file.write_bytes(b"\xff\xfe\0"), f"{SEAL} is damaged"),
        (lambda file: file.write_text("[]"), f"{SEAL} is damaged"),
        (lambda file: file.write_text('{"latest": 3}'), f"{SEAL} is damaged"),
    ],
    ids=["missing", "empty", "truncated", "not text", "a list", "no sizes"],
)
def test_a_checkpoint_without_a_whole_seal_is_not_used(tmp_path, damage, said):
    whole(tmp_path, 7)
    damage(tmp_path / "checkpoint-7" / SEAL)
    assert damage_of(tmp_path / "checkpoint-7") == said


def test_every_flipped_bit_of_a_seal_is_noticed(tmp_path):
    """Some make it other JSON, some another key; none may end in an error of ours."""
    (tmp_path / "latest").touch()
    seal(tmp_path)
    file = tmp_path / SEAL
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        flip_bit(file, bit)
        assert damage_of(tmp_path), bit
        file.write_bytes(content)


def test_all_of_a_checkpoint_is_on_the_disk_before_it_is_in_place(tmp_path, monkeypatch):
    written = write(clear_unfinished(tmp_path) / "checkpoint-7")
    synced, at_rename = set(), set()
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), fsync(number))
    )
    monkeypatch.setattr(os, "rename", lambda *paths: (at_rename.update(synced), rename(*paths)))
    seal_and_rotate(written, tmp_path, limit=1)
    checkpoint = tmp_path / "checkpoint-7"
    assert {path.stat().st_ino for path in [checkpoint, *checkpoint.rglob("*")]} <= at_rename
    assert tmp_path.stat().st_ino in synced - at_rename


# Which one is used


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_ones_before_it_are_named(tmp_path):
    whole(tmp_path, 5, 10, 20, 100)
    empty(tmp_path / "checkpoint-100" / WEIGHTS)
    (tmp_path / "checkpoint-20" / SEAL).unlink()
    found = [(path.name, damage) for path, damage in verify_newest_first(tmp_path)]
    assert found == [
        ("checkpoint-100", f"{WEIGHTS} has 0 bytes instead of 70"),
        ("checkpoint-20", "it was not written to its end"),
        ("checkpoint-10", None),
    ]


def test_a_checkpoint_with_a_weight_that_is_no_number_is_named_and_the_one_before_it_used(tmp_path):
    for step, value in ((5, 1.0), (10, float("nan")), (15, float("inf"))):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        weights = {"good": torch.ones(3), "bad": torch.tensor([0.0, value])}
        save_file(weights, checkpoint / WEIGHTS)
        seal(checkpoint)
    assert [(step_of(path), damage) for path, damage in verify_newest_first(tmp_path)] == [
        (15, f"bad in {WEIGHTS} is not finite"),
        (10, f"bad in {WEIGHTS} is not finite"),
        (5, None),
    ]


def test_where_no_checkpoint_is_whole_there_is_none(tmp_path):
    assert list(verify_newest_first(tmp_path)) == []
    whole(tmp_path, 5)
    empty(tmp_path / "checkpoint-5" / SEAL)
    assert [damage for _, damage in verify_newest_first(tmp_path)] == [f"{SEAL} is damaged"]


def test_only_folders_named_after_a_step_are_checkpoints(tmp_path):
    whole(tmp_path, 5)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").touch()
    (tmp_path / f"{UNFINISHED}-checkpoint-8").mkdir()
    assert steps_of(tmp_path) == [5]


# Rotation


def test_a_checkpoint_is_put_in_place_whole(tmp_path):
    keep_new(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    assert damage_of(tmp_path / "checkpoint-7") is None


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [30, 20, 15, 10]),
        (1, None, [30]),
        (2, None, [30, 20]),
        (9, None, [30, 20, 15, 10]),
        (1, 10, [30, 10]),
        (2, 10, [30, 10]),
        (3, 10, [30, 20, 10]),
        (1, 30, [30]),
        (2, 30, [30, 20]),
        (2, 99, [30, 20]),
    ],
)
def test_the_newest_stay_up_to_the_limit_and_the_best_always(tmp_path, limit, best, left):
    whole(tmp_path, 10, 15, 20)
    keep_new(tmp_path, 30, limit, best)
    assert steps_of(tmp_path) == left
    assert [damage_of(path) for path in checkpoints_of(tmp_path)] == [None] * len(left)
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    whole(tmp_path, 10, 20)
    empty(tmp_path / "checkpoint-20" / WEIGHTS)
    keep_new(tmp_path, 20, limit=2)
    assert steps_of(tmp_path) == [20, 10]
    assert damage_of(tmp_path / "checkpoint-20") is None


def test_damaged_checkpoints_of_later_steps_do_not_push_out_the_one_just_written(tmp_path):
    whole(tmp_path, 10, 40)
    empty(tmp_path / "checkpoint-40" / WEIGHTS)
    keep_new(tmp_path, 20, limit=1)
    assert steps_of(tmp_path) == [20]


def test_a_checkpoint_that_cannot_be_sealed_removes_nothing(tmp_path, monkeypatch):
    whole(tmp_path, 10)

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            keep_new(tmp_path, 20, limit=1)
    assert steps_of(tmp_path) == [10] and damage_of(tmp_path / "checkpoint-10") is None


# Killed anywhere


class Killed(BaseException):
    """What no `except Exception` catches."""


class Clock:
    """Counts the calls that change the file system; from the one that is fatal on, none is done any
    more.
    """

    CALLS = ("open", "fsync", "mkdir", "rename", "replace", "rmdir", "unlink")

    def __init__(self, monkeypatch, fatal: int) -> None:
        self.fatal, self.count = fatal, itertools.count(1)
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: self.write_text(*args))

    def counted(self, call):
        def counted_call(*args, **kwargs):
            if next(self.count) >= self.fatal:
                raise Killed
            return call(*args, **kwargs)

        return counted_call

    def write_text(self, path: Path, text: str) -> None:
        """Killed in its middle, it leaves half of the text."""
        is_fatal = next(self.count) >= self.fatal
        path.write_bytes(text.encode()[: len(text) // 2 if is_fatal else None])
        if is_fatal:
            raise Killed


def killed_everywhere(prepare, act, folder: Path, monkeypatch):
    """Yields a folder for each call of `act` at which it was killed, as the kill left it."""
    for fatal in itertools.count(1):
        prepare(folder)
        with monkeypatch.context() as patch:
            Clock(patch, fatal)
            try:
                act(folder)
            except Killed:
                was_killed = True
            else:
                was_killed = False
        if not was_killed:
            assert fatal > 5, "hardly anything was killed"
            return
        yield folder
        shutil.rmtree(folder)


def newest_whole(folder: Path) -> int | None:
    return next(
        (
            int(path.name.split("-")[1])
            for path, damage in verify_newest_first(folder)
            if damage is None
        ),
        None,
    )


CASES = {
    "the only one is replaced": ([10], 20, 1, None),
    "the best is spared": ([10, 20], 30, 1, 10),
    "several go": ([10, 20, 30], 40, 2, None),
    "all are kept": ([10, 20], 30, None, None),
}


@pytest.mark.parametrize(("before", "step", "limit", "best"), CASES.values(), ids=CASES)
def test_wherever_keeping_is_killed_a_whole_checkpoint_is_found_and_the_next_try_succeeds(
    tmp_path, monkeypatch, before, step, limit, best
):
    def prepare(folder):
        folder.mkdir()
        whole(folder, *before)
        write(clear_unfinished(folder) / f"checkpoint-{step}")

    def act(folder):
        seal_and_rotate(folder / UNFINISHED / f"checkpoint-{step}", folder, limit, best)

    found = set()
    for folder in killed_everywhere(prepare, act, tmp_path / "run", monkeypatch):
        found.add(newest_whole(folder))
        assert found <= {max(before), step}
        assert best is None or damage_of(folder / f"checkpoint-{best}") is None
        keep_new(folder, step, limit, best)
        assert newest_whole(folder) == step
        assert len(list(folder.iterdir())) == len(steps_of(folder)), "something was left over"
    assert found == {max(before), step}


def test_wherever_replacing_a_damaged_one_is_killed_the_one_before_it_is_found(
    tmp_path, monkeypatch
):
    def prepare(folder):
        folder.mkdir()
        whole(folder, 10, 20)
        empty(folder / "checkpoint-20" / WEIGHTS)
        write(clear_unfinished(folder) / "checkpoint-20")

    def act(folder):
        seal_and_rotate(folder / UNFINISHED / "checkpoint-20", folder, limit=1)

    found = [
        newest_whole(folder)
        for folder in killed_everywhere(prepare, act, tmp_path / "run", monkeypatch)
    ]
    assert set(found) == {10, 20} and found == sorted(found)


def test_a_checkpoint_whose_removal_is_killed_is_whole_or_gone(tmp_path, monkeypatch):
    def prepare(folder):
        folder.mkdir()
        whole(folder, 10, 20)

    def act(folder):
        remove(folder / "checkpoint-10")

    for folder in killed_everywhere(prepare, act, tmp_path / "run", monkeypatch):
        assert [damage_of(path) for path in checkpoints_of(folder)] == [None] * len(
            steps_of(folder)
        )
        assert steps_of(folder)[0] == 20
        clear_unfinished(folder)
        assert len(list(folder.iterdir())) == len(steps_of(folder)) + 1


# Beside checkpoints


def test_what_was_begun_is_cleared_and_nothing_else(tmp_path):
    whole(tmp_path, 10)
    write(tmp_path / UNFINISHED / "checkpoint-20")
    write(tmp_path / f"{UNFINISHED}-checkpoint-5")
    (tmp_path / "metrics.jsonl").touch()
    assert clear_unfinished(tmp_path) == tmp_path / UNFINISHED
    assert not list((tmp_path / UNFINISHED).iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        UNFINISHED,
        "checkpoint-10",
        "metrics.jsonl",
    ]


def test_files_move_into_a_folder_and_replace_what_has_their_name(tmp_path):
    written = clear_unfinished(tmp_path)
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "recipe.yaml").write_text("stays")
    for name in ("config.json", "model.safetensors"):
        (written / name).write_text("new")
    move_into(written, tmp_path)
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"config.json": "new", "model.safetensors": "new", "recipe.yaml": "stays"}


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of so many MB, or changes the size of the one it made."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(megabytes: int) -> Path:
        how = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={megabytes}m", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("only root can mount a small file system")
        return folder

    yield resize
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("warm_python")
def test_a_full_disk_leaves_the_checkpoint_before_and_the_same_command_resumes(
    small_disk, run_script
):
    """The quickstart's checkpoints have 8 MB: one fits, and what a second one needs beside it does
    not.
    """
    folder = small_disk(12) / "run"
    steps = ["training.save_steps=2", "training.max_steps=4", "training.eval_strategy=no"]
    silent = ["training.report_to=none", "generation.prompts=[]"]
    command = [
        "sft.py",
        "recipes/quickstart.yaml",
        f"training.output_dir={folder}",
        *steps,
        *silent,
    ]
    full = run_script(*command, timeout=300)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stdout + full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: the disk is full: ")
    assert steps_of(folder) == [2] and damage_of(folder / "checkpoint-2") is None
    assert not (folder / UNFINISHED).exists()

    small_disk(40)
    done = run_script(*command, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {folder / 'checkpoint-2'}" in done.stderr
    assert steps_of(folder) == [4] and (folder / "model.safetensors").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make files of another user")
@pytest.mark.parametrize(
    "name",
    [
        "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt",  # DeepSpeed: weights_only=False
        "optimizer_0/.metadata",  # FSDP: torch.distributed.checkpoint unpickles it
        "pytorch_model_fsdp_0/.metadata",
    ],
)
def test_pickles_of_another_user_are_not_run(name, tmp_path):
    """The seal is written by whoever gives the folder."""
    state = tmp_path / "checkpoint-3" / name
    state.parent.mkdir(parents=True)
    state.write_bytes(b"pickle")
    seal(tmp_path / "checkpoint-3")
    assert [damage for _, damage in verify_newest_first(tmp_path)] == [None]
    os.chown(state, 65534, -1)
    [(_, damage)] = verify_newest_first(tmp_path)
    assert f"{state.name} belongs to another user" in damage
