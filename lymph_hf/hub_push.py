"""A folder -> one commit on the Hub, or a clear reason why not. Repeating a push sends what is missing, or nothing."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from .files import folder_files
from .version import __version__

logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset", "space"]
Change = CommitOperationAdd | CommitOperationDelete
_KEPT = {".gitattributes"}  # the Hub's own
_REASONS = {
    400: "the Hub refuses what was sent ({error})",
    401: "the Hub does not accept the token, or there is no such repository that it may see. Log in with "
    "`hf auth login`",
    403: "the token may not write there. Use one with write permission, of a member of the organisation",
    404: "there is no such repository or organisation, or the token may not see it. Check the name",
    409: "it was changed by someone else at the same time. Look at the repository, then run the command again",
    412: "it was changed by someone else at the same time. Look at the repository, then run the command again",
    413: "the Hub finds it too large",
    429: "too many requests. Wait {wait}, then run the command again",
}


class PublishError(RuntimeError):
    """Nothing was published; the message says why and what to do."""


def push_folder(
    folder: Path,
    repo: str,
    *,
    tag: str,
    private: bool = False,
    message: str = "Publish",
    repo_type: RepoType = "model",
    space_sdk: str | None = None,
) -> str:
    """Make a repository hold exactly the files of a folder, in one commit under a tag.

    Files that are there already are not sent again, and a folder that is already published under the tag changes
    nothing, so that an interrupted push is simply repeated.

    Args:
        folder: its files with their sub-folders.
        repo: organisation/name; made when it does not exist.
        tag: name of the version; one that stands at other content is refused.
        private: of a new repository; an existing public one is refused.
        message: of the commit.
        repo_type: kind of repository.
        space_sdk: of a new Space.

    Returns:
        The commit.

    Raises:
        PublishError: no token, no permission, a conflict, or the Hub or the connection fails. The repository is then
            as it was, save that an empty one may have been made.
    """
    if get_token() is None:
        raise PublishError("No token: log in with `hf auth login`, or set HF_TOKEN to a token that may write.")
    api = hub_api()
    with explained(repo):
        api.create_repo(repo, private=private or None, exist_ok=True, repo_type=repo_type, space_sdk=space_sdk)
        info = api.repo_info(repo, repo_type=repo_type)
        if private and not info.private:
            raise PublishError(f"{repo} exists and is public: make it private on the Hub, or choose another --repo.")
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo, repo_type=repo_type).tags}
        if tag in tags:
            _confirm(_changes(api, repo, tags[tag], folder, repo_type), repo, tag)
            return tags[tag]
        commit = info.sha
        if changes := _changes(api, repo, info.sha, folder, repo_type):
            logger.info("%s: sending %d changed files", repo, len(changes))
            # With the parent named, a commit that someone made in between is not overwritten.
            done = api.create_commit(repo, changes, commit_message=message, parent_commit=info.sha, repo_type=repo_type)
            commit = done.oid
        api.create_tag(repo, tag=tag, revision=commit, repo_type=repo_type)
    return commit


def hub_api() -> HfApi:
    """The client of the Hub, which tells it who asks."""
    return HfApi(library_name="lymph-hf", library_version=__version__)


def _confirm(changes: Sequence[Change], repo: str, tag: str) -> None:
    if changed := [operation.path_in_repo for operation in changes]:
        raise PublishError(
            f"{repo} has a version {tag} with other content ({', '.join(sorted(changed)[:5])}). "
            "A published version does not change: choose another --tag."
        )
    logger.info("%s: version %s is published already", repo, tag)


def _changes(api: HfApi, repo: str, commit: str, folder: Path, repo_type: RepoType) -> list[Change]:
    """What turns a commit into the folder."""
    entries = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    here = folder_files(folder)
    additions = [CommitOperationAdd(name, path) for name, path in here.items() if not _is_same(path, there.get(name))]
    return additions + [CommitOperationDelete(name) for name in sorted(there.keys() - here.keys() - _KEPT)]


def _is_same(path: Path, entry: RepoFile | None) -> bool:
    if entry is None:
        return False
    if entry.lfs is not None:
        with path.open("rb") as file:
            return entry.lfs.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    content = path.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Failures of the Hub and of the connection as `PublishError`."""
    try:
        yield
    except PublishError:
        raise  # explained already
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{repo} was not published: HF_HUB_OFFLINE is set. Unset it to publish.") from error
    except HFValidationError as error:
        raise PublishError(f"--repo {repo}: expected organisation/name ({error}).") from error
    except (httpx2.TransportError, OSError, RuntimeError, ValueError) as error:
        raise PublishError(f"{repo} was not published: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    # The client wraps failed uploads once more.
    while not isinstance(error, HfHubHTTPError | httpx2.TransportError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _reason_of_status(error)
    if isinstance(error, httpx2.TransportError):
        return (
            f"the connection broke off ({type(error).__name__}). Run the command again: what arrived is not sent twice"
        )
    return f"{type(error).__name__}: {error}"


def _reason_of_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status >= 500:
        return f"the Hub fails ({status}). Run the command again later: what arrived is not sent twice"
    wait = error.response.headers.get("Retry-After")
    text = _REASONS.get(status, "{error}").format(error=error, wait=f"{wait} seconds" if wait else "some minutes")
    return f"{text} ({status})"
