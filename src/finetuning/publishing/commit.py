"""Publication -> what it changes in the repository, the one commit that does it, and its tag."""

from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from finetuning.errors import UserError
from finetuning.hub.address import Address
from finetuning.hub.client import TIMEOUT, patiently, read, tree_of
from finetuning.hub.manifest import NAME, Manifest, parse_manifest
from finetuning.publishing.bundle import Publication, hashed
from finetuning.publishing.card import repository_card
from finetuning.publishing.provenance import changed_settings

CARD = "README.md"


class Change(NamedTuple):
    path: str
    what: str
    """new, changed, gone or same"""
    size: int
    """bytes"""


class Plan(NamedTuple):
    """What a publication does to the repository as it stands at one commit."""

    head: str
    changes: list[Change]
    operations: list[CommitOperationAdd | CommitOperationDelete]


class Published(NamedTuple):
    """Where a publication is found."""

    address: Address
    """with the commit as its revision"""
    tag: str
    is_new: bool
    """False where everything was there already"""


def plan(publication: Publication, replace: bool) -> Plan:
    """What is to be done at the head of the repository. Raises UserError where it would undo somebody else's work."""
    repo, subfolder, _ = publication.address
    head = HfApi().repo_info(repo, revision="main", timeout=TIMEOUT).sha
    tree = tree_of(repo, head)
    manifests = read_manifests(repo, head, tree)
    there = {path for path in tree if path.startswith(f"{subfolder}/")}
    require_own_room(publication.address, manifests)
    if there and not replace:
        require_same_run(publication, manifests.get(subfolder))

    before = read(repo, tree[CARD], head) if CARD in tree else None
    whole = repository_card(repo, before, {**manifests, subfolder: publication.manifest})
    files = {**publication.files, **hashed({CARD: whole.encode()})}
    changes = [change(operation, tree.get(path)) for path, operation in files.items()]
    changes += [Change(path, "gone", tree[path].size) for path in sorted(there - set(files))]
    added = [
        fresh_operation(files[path]) for path, what, _ in changes if what in ("new", "changed")
    ]
    return Plan(
        head,
        changes,
        [*added, *(CommitOperationDelete(path) for path, what, _ in changes if what == "gone")],
    )


def read_manifests(repo: str, commit: str, tree: dict[str, RepoFile]) -> dict[str, Manifest]:
    """{subfolder: manifest} of every checkpoint of ours."""
    places = [path.removesuffix(f"/{NAME}") for path in tree if path.endswith(f"/{NAME}")]
    found = {place: parse_manifest(read(repo, tree[f"{place}/{NAME}"], commit)) for place in places}
    return {place: manifest for place, manifest in found.items() if manifest is not None}


def change(operation: CommitOperationAdd, entry: RepoFile | None) -> Change:
    what = "new" if entry is None else "same" if is_same(operation, entry) else "changed"
    return Change(operation.path_in_repo, what, operation.upload_info.size)


def require_own_room(address: Address, manifests: dict[str, Manifest]) -> None:
    """Raises UserError where the subfolder lies in another checkpoint, or another in it: it is replaced as a whole."""
    for other in manifests:
        if other.startswith(f"{address.subfolder}/") or address.subfolder.startswith(f"{other}/"):
            raise UserError(
                f"{address.repo}: {address.subfolder} and the checkpoint in {other} would lie in each other, and a "
                "subfolder is replaced as a whole; choose another publish.subfolder"
            )


def require_same_run(publication: Publication, before: Manifest | None) -> None:
    """Raises UserError unless what stands in the subfolder was published from the same recipe."""
    place = f"{publication.address.repo}: {publication.address.subfolder}"
    remedy = "--replace overwrites it, publish.subfolder=... goes elsewhere"
    if before is None:
        raise UserError(f"{place} holds files that were not published from here; {remedy}")
    if changed := changed_settings(before, publication.manifest):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(f"{place} was published from another recipe: {changed[0]}{more}; {remedy}")


def is_same(operation: CommitOperationAdd, entry: RepoFile) -> bool:
    if entry.size != operation.upload_info.size:
        return False
    if entry.lfs:
        return entry.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as stream:
        return entry.blob_id == sha.git_hash(stream.read())


def fresh_operation(operation: CommitOperationAdd) -> CommitOperationAdd:
    """A fresh copy, hashed already: one that was tried keeps what it heard about a head that has moved since."""
    copy = CommitOperationAdd(operation.path_in_repo, operation.path_or_fileobj)
    copy.upload_info = operation.upload_info
    return copy


def publish(publication: Publication, replace: bool) -> Published:
    """One commit and a tag; neither where they are there already. Safe to repeat at any point.

    Raises UserError where it would undo somebody else's work, TryAgain where the Hub does not answer.
    """
    address, sent = publication.address, []

    def commit() -> str:
        # Planned anew in each attempt: a lost answer is then found done, and a head that moved is built upon.
        todo = plan(publication, replace)
        if not todo.operations:
            return todo.head
        sent.append(todo.head)
        title = f"Publish {address.subfolder}"
        return (
            HfApi()
            .create_commit(
                address.repo, todo.operations, commit_message=title, parent_commit=todo.head
            )
            .oid
        )

    made = patiently(commit, address.repo)
    tag = patiently(lambda: tagged(address, made), address.repo)
    return Published(address._replace(revision=made), tag, is_new=bool(sent))


def tagged(address: Address, commit: str) -> str:
    """The tag of the subfolder as it stands in the commit: the last one if that is it, else a new one."""
    api = HfApi()
    numbers = [0]
    for tag in api.list_repo_refs(address.repo).tags:
        number = tag.name.removeprefix(address.tag_prefix)
        numbers += [int(number)] if tag.name != number and number.isdigit() else []
    last = f"{address.tag_prefix}{max(numbers)}"
    if max(numbers) and listing(address, last) == listing(address, commit):
        return last
    name = f"{address.tag_prefix}{max(numbers) + 1}"
    api.create_tag(address.repo, tag=name, revision=commit)
    return name


def listing(address: Address, revision: str) -> dict[str, str]:
    """{path: git's name for its content} of the subfolder's files."""
    try:
        entries = HfApi().list_repo_tree(
            address.repo, address.subfolder, recursive=True, revision=revision
        )
        return {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}
    except RemoteEntryNotFoundError:
        return {}
