"""One commit and a tag, whatever fails on the way and whoever commits in between."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from hub_server import OWNER, REPO, HubServer
from publications import names, published
from run_folders import S, copied, error_of, retrained

import publish
from finetuning.runs.folder import RunFolder

FAULTS = {
    "access, 503": ("auth-check", {"status": 503}),
    "head, 503": ("/revision/main", {"status": 503}),
    "head, 429": ("/revision/main", {"status": 429, "headers": {"Retry-After": "0"}}),
    "head, answer lost": ("/revision/main", {"drop_response": True}),
    "tree, 503": ("/tree/", {"status": 503}),
    "tree, reset": ("/tree/", {"reset_after": 0}),
    "card, 503": ("validate-yaml", {"status": 503}),
    "preupload, 503": ("/preupload/", {"status": 503}),
    "batch, 503": ("objects/batch", {"status": 503}),
    "bytes, 503": ("PUT /_lfs/", {"status": 503}),
    "bytes, 429": ("PUT /_lfs/", {"status": 429, "headers": {"Retry-After": "0"}}),
    "bytes, reset": ("PUT /_lfs/", {"reset_after": 20_000}),
    "bytes, closed early": ("PUT /_lfs/", {"eof_after": 20_000}),
    "bytes, late": ("PUT /_lfs/", {"delay": 0.5}),
    "commit, 500": ("/commit/", {"status": 500}),
    "commit, 503": ("/commit/", {"status": 503}),
    "commit, 429": ("/commit/", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=1'}}),
    "commit, reset": ("/commit/", {"reset_after": 100}),
    "commit, closed early": ("/commit/", {"eof_after": 100}),
    "commit, answer lost": ("/commit/", {"drop_response": True}),
    "commit, 412": ("/commit/", {"status": 412}),
    "tags, 503": ("/refs", {"status": 503}),
    "tag, 503": ("/tag/", {"status": 503}),
    "tag, answer lost": ("/tag/", {"drop_response": True}),
    "neighbour's manifest, 503": ("/resolve/", {"status": 503}),
    "neighbour's manifest, reset": ("/resolve/", {"reset_after": 0}),
    "neighbour's manifest, flipped byte": (
        "GET /elith/llm-book-models/resolve/",
        {"corrupt": True},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_survived_and_makes_one_commit(fault, crowd, crowded, call):
    (hub, run), (match, what) = crowded, FAULTS[fault]
    hub.fault(match, **what)
    published(call, run)
    assert not any(next(fault["due"], False) for fault in hub.faults), "the fault never happened"
    assert_all_is_new(hub, crowd)


LASTING = [
    name
    for name in FAULTS
    if name not in ("bytes, late", "commit, answer lost", "tag, answer lost")
]


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_ends_in_one_line_and_the_same_command_later_succeeds(
    fault, crowd, crowded, call
):
    (hub, run), (match, what) = crowded, FAULTS[fault]
    old = hub.tree(REPO)
    hub.fault(match, times=99, **what)
    done = call(publish, run, "--unasked")
    line = error_of(done)
    assert done.code == 1 and "run the same command again" in line and OWNER not in done.err
    assert hub.tree(REPO) in (old, crowd.tree)
    hub.faults.clear()
    published(call, run)
    assert_all_is_new(hub, crowd)


def assert_all_is_new(hub: HubServer, crowd) -> None:
    """One commit and one tag more than before; every byte is the new state's, the table too."""
    assert hub.tree(REPO) == crowd.tree
    assert hub.titles(REPO) == [
        f"Publish {S}",
        "Publish chapter06/other",
        f"Publish {S}",
        "initial commit",
    ]
    assert hub.tags(REPO)["chapter05.sft_model.v2"] == hub.head(REPO) and len(hub.tags(REPO)) == 3


def test_two_subfolders_published_at_once_both_stand(hub, runs, tmp_path):
    from finetuning.publishing.bundle import gather
    from finetuning.publishing.commit import publish as commit

    prepared = []
    for name, kind in (("chapter05/first", "full"), ("chapter06/second", "sharded")):
        run = retrained(copied(runs[kind], tmp_path / kind), publish__subfolder=name)
        folder = RunFolder(run)
        prepared.append(gather(folder, folder.recipe, None))
    barrier = threading.Barrier(2)
    hub.fault(
        "/commit/", times=2, call=lambda: barrier.wait(10)
    )  # both have read the same head by then
    results = []
    threads = [
        threading.Thread(target=lambda p=p: results.append(commit(p, replace=False)))
        for p in prepared
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 and 412 in hub.sent("/commit/")
    assert {*names(hub, "chapter05/first")} and {*names(hub, "chapter06/second")}
    card = hub.read(REPO, "README.md").decode()
    assert "[chapter05/first]" in card and "[chapter06/second]" in card
    assert sorted(hub.titles(REPO)) == [
        "Publish chapter05/first",
        "Publish chapter06/second",
        "initial commit",
    ]


def test_a_commit_by_somebody_else_in_between_is_built_upon(crowded, call):
    hub, run = crowded
    hub.fault("/commit/", call=lambda: hub.put(REPO, {"chapter07/new.txt": b"theirs"}))
    published(call, run)
    assert hub.read(REPO, "chapter07/new.txt") == b"theirs"
    assert hub.titles(REPO)[:2] == [f"Publish {S}", "by somebody else"]


def test_somebody_else_in_the_same_subfolder_in_between_is_not_overwritten(crowded, call):
    hub, run = crowded
    hub.fault("/commit/", call=lambda: hub.put(REPO, {f"{S}/manifest.json": b"{}"}))
    assert "not published from here" in error_of(call(publish, run, "--unasked"))
    assert hub.read(REPO, f"{S}/manifest.json") == b"{}"


def test_interrupted_it_ends_with_130_and_the_same_command_later_succeeds(crowd, crowded, call):
    hub, run = crowded
    old, reached = hub.tree(REPO), threading.Event()
    hub.fault("/commit/", call=lambda: reached.set() or time.sleep(3))
    command = [sys.executable, "src/publish.py", run, "--unasked"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reached.wait(120)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert (
        errors.splitlines()[-1]
        == "interrupted; the repository is as it was, or has the whole commit"
    )
    assert hub.tree(REPO) in (old, crowd.tree)
    published(call, run)
    assert_all_is_new(hub, crowd)
