"""Publication -> what it changes in the repository, the one commit that does it, and its tag."""

from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from finetuning.errors import UserError
from finetuning.hub.address import Address
from finetuning.hub.client import head_commit, list_files, read_file, with_retries
from finetuning.hub.manifest import NAME, Manifest, parse_manifest
from finetuning.publishing.bundle import Bundle, Publication, checksummed
from finetuning.publishing.provenance import changed_settings
from finetuning.publishing.repository_card import repository_card

CARD = "README.md"  # of the repository


class Change(NamedTuple):
    """What happens to one file of the repository."""

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


def publish(bundle: Bundle, replace: bool) -> Published:
    """One commit and a tag; neither where they are there already. Safe to repeat at any point.

    Raises UserError where it would undo somebody else's work, TryAgain where the Hub does not
    answer.
    """
    address = bundle.address
    committed: list[str] = []

    def commit() -> str:
        # Planned anew in each attempt: where only the answer of the last one was lost, nothing is
        # left to do, and a head that moved is built upon.
        plan = plan_changes(bundle, replace)
        if not plan.operations:
            return plan.head
        committed.append(plan.head)
        title = f"Publish {address.subfolder}"
        made = HfApi().create_commit(
            address.repo, plan.operations, commit_message=title, parent_commit=plan.head
        )
        return made.oid

    made = with_retries(commit, address.repo)
    tag = with_retries(lambda: tag_commit(address, made), address.repo)
    return Published(address._replace(revision=made), tag, is_new=bool(committed))


# Plan


def plan_changes(bundle: Bundle, replace: bool) -> Plan:
    """What is to be done at the head of the repository, under the last tag or the next.

    Raises UserError where it would undo somebody else's work.
    """
    address, last = bundle.address, last_tag(bundle.address)
    if last:
        plan = plan_publication(bundle.tagged(f"{address.tag_prefix}{last}"), replace)
        if not changes_below(plan, address):
            return plan
    return plan_publication(bundle.tagged(f"{address.tag_prefix}{last + 1}"), replace)


def changes_below(plan: Plan, address: Address) -> bool:
    """Whether a file of the subfolder changes."""
    return any(
        change.what != "same" and change.path.startswith(f"{address.subfolder}/")
        for change in plan.changes
    )


def plan_publication(publication: Publication, replace: bool) -> Plan:
    """The same for a card that is written. Raises UserError as plan_changes."""
    repo, subfolder, _ = publication.address
    head = head_commit(repo)
    listed = list_files(repo, head)
    manifests = read_manifests(repo, head, listed)
    existing = {path for path in listed if path.startswith(f"{subfolder}/")}
    require_no_overlap(publication.address, manifests)
    if existing and not replace:
        require_same_run(publication, manifests.get(subfolder))

    before = read_file(repo, listed[CARD], head) if CARD in listed else None
    card = repository_card(repo, before, {**manifests, subfolder: publication.manifest})
    files = {**publication.files, **checksummed({CARD: card.encode()})}
    gone = sorted(existing - set(files))
    changes = [compare_file(operation, listed.get(path)) for path, operation in files.items()]
    sent = [files[change.path] for change in changes if change.what in ("new", "changed")]
    return Plan(
        head,
        [*changes, *(Change(path, "gone", listed[path].size) for path in gone)],
        [*map(fresh_operation, sent), *map(CommitOperationDelete, gone)],
    )


def read_manifests(repo: str, commit: str, listed: dict[str, RepoFile]) -> dict[str, Manifest]:
    """{subfolder: manifest} of every model that was published from here."""
    found = {}
    for path in listed:
        if path.endswith(f"/{NAME}") and (
            manifest := parse_manifest(read_file(repo, listed[path], commit))
        ):
            found[path.removesuffix(f"/{NAME}")] = manifest
    return found


def require_no_overlap(address: Address, manifests: dict[str, Manifest]) -> None:
    """Raises UserError where one model's folder contains the other's."""
    subfolder = address.subfolder
    for other in manifests:
        if other.startswith(f"{subfolder}/") or subfolder.startswith(f"{other}/"):
            raise UserError(
                f"{address.repo}: {subfolder} overlaps the published model in {other}; a subfolder "
                "is replaced as a whole, so one may not contain the other: "
                "choose another publish.subfolder"
            )


def require_same_run(publication: Publication, before: Manifest | None) -> None:
    """Raises UserError unless what is in the subfolder was published from the same recipe."""
    place = f"{publication.address.repo}: {publication.address.subfolder}"
    remedy = "--replace overwrites it, publish.subfolder=... goes elsewhere"
    if before is None:
        raise UserError(f"{place} holds files that were not published from here; {remedy}")
    if changed := changed_settings(before, publication.manifest):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(f"{place} was published from another recipe: {changed[0]}{more}; {remedy}")


def compare_file(operation: CommitOperationAdd, entry: RepoFile | None) -> Change:
    """What an addition does to the file that the repository has, if it has one."""
    what = "new" if entry is None else "same" if is_same(operation, entry) else "changed"
    return Change(operation.path_in_repo, what, operation.upload_info.size)


def is_same(operation: CommitOperationAdd, entry: RepoFile) -> bool:
    if entry.size != operation.upload_info.size:
        return False
    if entry.lfs:
        return entry.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as stream:
        return entry.blob_id == sha.git_hash(stream.read())


def fresh_operation(operation: CommitOperationAdd) -> CommitOperationAdd:
    """A copy, hashed already: the client keeps the head's state in an operation it has tried."""
    copy = CommitOperationAdd(operation.path_in_repo, operation.path_or_fileobj)
    copy.upload_info = operation.upload_info
    return copy


# Tag


def tag_commit(address: Address, commit: str) -> str:
    """The subfolder's tag at the commit: its last one if nothing changed since, else a new one."""
    number = last_tag(address)
    last = f"{address.tag_prefix}{number}"
    if number and blobs_in(address, last) == blobs_in(address, commit):
        return last
    name = f"{address.tag_prefix}{number + 1}"
    HfApi().create_tag(address.repo, tag=name, revision=commit)
    return name


def last_tag(address: Address) -> int:
    """The number of the subfolder's last tag; 0 without one."""
    numbers = [0]
    for tag in HfApi().list_repo_refs(address.repo).tags:
        number = tag.name.removeprefix(address.tag_prefix)
        numbers += [int(number)] if tag.name != number and number.isdigit() else []
    return max(numbers)


def blobs_in(address: Address, revision: str) -> dict[str, str]:
    """{path: git's id of its content} of the subfolder's files."""
    try:
        entries = HfApi().list_repo_tree(
            address.repo, address.subfolder, recursive=True, revision=revision
        )
        return {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}
    except RemoteEntryNotFoundError:
        return {}
