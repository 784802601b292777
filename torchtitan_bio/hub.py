"""An export leaves the machine: to the Hugging Face Hub as one commit, or to an object store with its manifest last.

What lies in the folder is only read. Whatever fails is one line that says what, and the same command goes on where it stopped.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Where transformers looks for weights, a single file before shards: one left by an earlier export would be read in their place.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

# Classes of httpx (huggingface_hub from 1.0 on), requests (before) and Python itself for a line that was lost or fell silent,
# and for a gateway's page in place of JSON. By name, because which library is there depends on huggingface_hub's version.
PASSING = {"NetworkError", "TimeoutException", "RemoteProtocolError", "ProxyError", "JSONDecodeError"}
PASSING |= {"ConnectionError", "ChunkedEncodingError", "Timeout", "TimeoutError"}


@dataclass(frozen=True, kw_only=True)
class Patience:
    tries: int = 5
    """Of each step of a push. huggingface_hub repeats some requests by itself within one of them."""

    wait_s: float = 2.0
    """Before the second try; doubled before each further one."""

    silence_s: float = 120.0
    """How long the Hub may say nothing (huggingface_hub waits for ever). Not kept where huggingface_hub is older than 1.0."""


PATIENCE = Patience()


def plan_push(folder, files: list[str], repo: str, *, public: bool, revision: str | None, tag: str | None) -> list[str]:
    """What push() would do, as lines to print. Opens no connection, so it cannot know what is on the Hub already."""
    check_name(repo)
    sizes = measure(folder, files)
    visibility = "public" if public else "private; an existing public repo would be refused"
    return [
        f"would push {len(sizes)} files, {amount(sum(sizes.values()))}, from {folder}",
        f"  to model repo {repo} ({visibility})",
        f"  branch {revision or 'main'}, {f'tag {tag}' if tag else 'no tag'}",
        *(f"  {amount(size):>12}  {name}" for name, size in sizes.items()),
    ]


def push(
    folder,
    files: list[str],
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str,
    say: Callable[[str], None],
    patience: Patience = PATIENCE,
) -> str:
    """Put these files of the folder on a branch of a model repo, all in one commit, and tag it; the address to look at.

    A new repo is private unless `public`. One that exists keeps its visibility; a public one without `public` is refused before
    anything is uploaded. After a failure, the same call sends only the files that are missing; after success, none.
    ValueError for what the caller can mend, RuntimeError for the network and the Hub.
    """
    from huggingface_hub import HfApi, constants, get_token

    check_name(repo)
    sizes = measure(folder, files)
    intact = f"the export in {folder} is intact"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids the network: unset it; {intact}")
    try:
        token = get_token()
    except Exception as error:  # a login of a kind that is renewed over the network
        raise RuntimeError(f"no Hub token: {one_line(error)}; {intact}, the same command pushes it") from error
    if not token:
        raise ValueError(f"no Hub token: run `hf auth login`, or set HF_TOKEN; {intact}, the same command pushes it")
    api = HfApi(token=token)
    address = f"{api.endpoint}/{repo}"
    branch = revision or "main"
    look = partial(api.repo_info, repo, timeout=patience.silence_s)  # its default sets the session's aside

    def hide(text: str) -> str:
        return text.replace(token, "***")  # what a server answers may quote what it was sent

    def insist(doing: str, call: Callable):
        try:
            return try_again(doing, call, patience, lambda line: say(hide(line)))
        except Exception as error:  # the libraries share no class; what they carry tells them apart
            status = status_of(error)
            kind = ValueError if status is not None and status < 500 and status != 429 else RuntimeError
            raise kind(f"{doing}: {hide(explain(error, repo))}; {intact}, the same command goes on") from error

    # create_repo ignores `private` where the repo exists, so what it is gets asked, not assumed.
    insist(f"creating {repo}", lambda: api.create_repo(repo, private=not public, exist_ok=True))
    is_private = insist(f"looking at {repo}", look).private
    if not (is_private or public):
        raise ValueError(
            f"{repo} is public and --public was not given, so nothing was uploaded: give --public, make it private at "
            f"{address}/settings, or choose another name; {intact}"
        )
    if is_private and public:
        say(f"{repo} is private and stays so; {address}/settings makes it public")
    if branch != "main":
        insist(f"creating branch {branch} of {repo}", lambda: api.create_branch(repo, branch=branch, exist_ok=True))
    visibility = "private" if is_private else "public"
    say(f"pushing {len(sizes)} files, {amount(sum(sizes.values()))}, to {repo} ({visibility}), branch {branch}")
    commit = insist(
        f"uploading to {repo}",
        lambda: commit_files(api, folder, list(sizes), repo, look(revision=branch), branch=branch, message=message, say=say),
    )
    held = insist(f"looking at {repo}", lambda: look(revision=commit, files_metadata=True)).siblings or []
    held = {file.rfilename: file.size for file in held}
    if lost := ", ".join(name for name, size in sizes.items() if held.get(name) != size):
        raise RuntimeError(
            f"{repo} lacks {lost}, perhaps because of a .gitignore there: look at {address}/tree/{branch}; {intact}"
        )
    if tag:
        insist(f"tagging {repo}", lambda: set_tag(api, repo, tag, commit, say))
    return address if branch == "main" else f"{address}/tree/{branch}"


def commit_files(
    api, folder, files: list[str], repo: str, there, *, branch: str, message: str, say: Callable[[str], None]
) -> str:
    """Commit the files, and remove weights of an earlier export that would be read in their place; the commit.

    there: what repo_info() says of the branch. One commit, so that nobody sees half an export. What is uploaded already is not
    sent again, and without a change there is no commit. The operations are made anew at each call, so that a commit counts as
    done though its answer was lost.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = [file.rfilename for file in there.siblings or []]
    has_weights = any(WEIGHTS.fullmatch(name) for name in files)
    stale = [name for name in names if has_weights and WEIGHTS.fullmatch(name) and name not in files]
    if stale:
        say(f"removing weights of an earlier export from {branch} (its history keeps them): {', '.join(stale)}")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(Path(folder) / name)) for name in files]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    return api.create_commit(repo, operations, commit_message=message, revision=branch).oid


def set_tag(api, repo: str, tag: str, commit: str, say: Callable[[str], None]):
    """The tag names this commit; a tag of that name elsewhere is moved, which is said."""
    where = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}.get(tag)
    if where == commit:
        return
    if where is not None:
        say(f"tag {tag} moves from commit {where[:8]} to {commit[:8]}")
        api.delete_tag(repo, tag=tag)
    api.create_tag(repo, tag=tag, revision=commit)


def try_again(doing: str, call: Callable, patience: Patience, say: Callable[[str], None]):
    """call(), again and ever more slowly after what may pass (429, 5xx, a line lost or silent). All else is raised at once."""
    from huggingface_hub.utils import get_session

    for attempt in range(1, patience.tries + 1):
        session = get_session()
        if hasattr(session, "timeout"):  # requests, before huggingface_hub 1.0, has no such setting
            session.timeout = patience.silence_s
        try:
            return call()
        except Exception as error:
            if attempt == patience.tries or not may_pass(error):
                raise
            wait_s = patience.wait_s * 2 ** (attempt - 1)
            say(f"{doing}: {one_line(error)}; again in {wait_s:g} s ({attempt + 1} of {patience.tries})")
            time.sleep(wait_s)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it came from, latest first: an upload's own is wrapped in one that names the file."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error. hf_xet has it only in the text, of a ConnectionError even for a refusal."""
    for cause in causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is None and (told := re.search(r"HTTP status (?:client|server) error \((\d{3}) ", str(cause))):
            status = int(told[1])
        if status is not None:
            return status
    return None


def may_pass(error: BaseException) -> bool:
    status = status_of(error)
    if status is not None:
        return status == 429 or status >= 500
    return any(base.__name__ in PASSING for cause in causes(error) for base in type(cause).__mro__)


def explain(error: BaseException, repo: str) -> str:
    """What went wrong and what to do, in one line."""
    status = status_of(error)
    if status == 401:
        return "the Hub does not accept the token (401): run `hf auth login` again, or set HF_TOKEN, which goes before a login"
    if status == 403:
        owner = repo.partition("/")[0]
        return f"refused (403): {one_line(error)}; a token needs the right to write to {owner}"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """The messages of an error and its causes, less line breaks and what follows a URL's "?", which may be a signature."""
    texts = []
    for cause in causes(error):
        text = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
        if type(cause).__name__ == "JSONDecodeError":
            text = "the answer is not JSON, but perhaps a gateway's page"
        texts.append(re.sub(r"\?[^\s'\"]+", "", " ".join(text.split())))
        if getattr(cause, "response", None) is not None:  # what lies behind it says the same in other words
            break
    return ": ".join(dict.fromkeys(texts))


def check_name(repo: str):
    """ValueError unless it can be the name of a repo."""
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is no name of a repo on the Hub: it reads USER/NAME")
    validate_repo_id(repo)


def measure(folder, files: list[str]) -> dict[str, int]:
    """{file: bytes}; every one of them is there."""
    if missing := [name for name in files if not (Path(folder) / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: the export is not whole; make it again")
    return {name: (Path(folder) / name).stat().st_size for name in files}


def amount(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def need_blobfile():
    try:
        import blobfile  # noqa: F401
    except ImportError as error:
        raise ValueError("--copy_to needs blobfile: pip install 'torchtitan_bio[remote]'") from error


def copy_to(folder, files: list[str], url: str, say: Callable[[str], None], *, manifest: str = "manifest.json"):
    """Copy these files of the folder to a folder that blobfile can name (gs://, az://, local), the manifest last.

    Where the manifest lies, the copy is whole. Until then one named .partial says whose half it is: the same call goes on with
    what is missing, and no file of another export is taken for ours because it has the same size.
    """
    need_blobfile()
    import blobfile

    names = [name for name in files if name != manifest]
    sizes = measure(folder, [*names, manifest])
    ours = (Path(folder) / manifest).read_bytes()
    store = blobfile.create_context(retry_limit=10, log_callback=say)  # it would try for ever
    unfinished = f"{manifest}.partial"
    at = {name: f"{url.rstrip('/')}/{name}" for name in (*sizes, unfinished)}
    try:
        mark = next((at[name] for name in (unfinished, manifest) if store.exists(at[name])), None)
        if mark and store.read_bytes(mark) != ours:
            raise ValueError(f"{url} holds another export ({mark} differs): choose another place, or remove that one")
        if not mark:
            if found := [name for name in names if store.exists(at[name])]:
                raise ValueError(f"{url} holds {found[0]}, and no manifest says of which export: choose an empty place")
            store.write_bytes(at[unfinished], ours)
        for name in [*names, manifest]:
            if store.exists(at[name]) and store.stat(at[name]).size == sizes[name]:
                continue
            store.copy(str(Path(folder) / name), at[name], overwrite=True)
            if (size := store.stat(at[name]).size) != sizes[name]:
                raise RuntimeError(f"{at[name]} has {size} bytes, and should have {sizes[name]}")
            say(f"copied {name} ({amount(sizes[name])}) to {at[name]}")
        if store.exists(at[unfinished]):
            store.remove(at[unfinished])
    except (blobfile.Error, OSError, RuntimeError) as error:
        what = getattr(error, "message", None) or one_line(error)  # blobfile's own text adds the whole request
        raise RuntimeError(
            f"copying to {url}: {what}; the export in {folder} is intact, the same command copies what is missing"
        ) from error
