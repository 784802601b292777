"""Publishing: the real client of the Hub against a server that speaks its protocol and fails on demand; copies by blobfile."""

import hashlib
import os
import socket
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hub_server import LARGE, SIGNATURE, Hub

from torchtitan_bio import hub as publishing

TOKEN = "hf_test_token_that_no_message_may_show"
REPO = "user/model"
FILES = ["config.json", "README.md", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "manifest.json"]
SHARDS = [name for name in FILES if name.endswith(LARGE)]
CARD = b"---\nlicense: bsd-3-clause\ntags:\n- spikes\nlibrary_name: transformers\n---\n# A model\n"
# huggingface_hub 2.4's own, where it sends a file through httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
QUICK = publishing.Patience(tries=2, wait_s=0.001, silence_s=5.0)


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch):
    """No test of this file can reach beyond 127.0.0.1."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_here(self, address):
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"connecting to {address}"
        return connect(self, address)

    def look_up_here(host, *args, **kwargs):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"looking up {host}"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub to push to, with a token for it; the client's own waits between its repetitions take no time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    with Hub("user", TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def export(tmp_path):
    """A finished export of two shards, and a file beside it that is none of the Hub's business."""
    folder = tmp_path / "export"
    folder.mkdir()
    contents = {name: f'{{"of": "{name}"}}'.encode() for name in FILES} | {"README.md": CARD}
    contents |= {name: os.urandom(1_500_000) for name in SHARDS}
    for name, content in (contents | {"notes.txt": b"private"}).items():
        (folder / name).write_bytes(content)
    return folder


def push(export, files=FILES, **options):
    """(what push() returns, what it says)"""
    said = []
    defaults = {"message": "step 50000", "patience": QUICK}
    url = publishing.push(export, files, REPO, say=said.append, **(defaults | options))
    assert not any(secret in line for secret in (TOKEN, SIGNATURE) for line in said)
    return url, "\n".join(said)


def contents(export, files=FILES):
    return {name: (export / name).read_bytes() for name in sorted(files)}


def puts(hub, export, name):
    """How often this file's bytes were sent, in part or whole."""
    return hub.count("PUT", hashlib.sha256((export / name).read_bytes()).hexdigest())


def failure(kind, export, **options):
    """The one line of a push that fails in this way, and what was said before it."""
    said = []
    with pytest.raises(kind) as raised:
        publishing.push(export, FILES, REPO, message="m", patience=QUICK, **({"say": said.append} | options))
    line = str(raised.value)
    assert "\n" not in line and f"the export in {export} is intact" in line
    assert not any(secret in "\n".join([line, *said]) for secret in (TOKEN, SIGNATURE))
    return line


def test_a_first_push_makes_a_private_repo_with_exactly_the_listed_files(hub, export):
    url, said = push(export)
    assert url == f"{hub.url}/{REPO}"
    assert hub.repos[REPO].private and "(private)" in said
    assert hub.files(REPO) == contents(export)
    assert len(hub.repos[REPO].commits) == 2, "the repo's birth, and one commit"


def test_the_same_push_again_sends_nothing_and_commits_nothing(hub, export):
    push(export, tag="step-00050000")
    sent, commits, tags = hub.count("PUT"), len(hub.repos[REPO].commits), dict(hub.repos[REPO].tags)
    push(export, tag="step-00050000")
    assert (hub.count("PUT"), len(hub.repos[REPO].commits), hub.repos[REPO].tags) == (sent, commits, tags)
    assert sent == len(SHARDS) and hub.count("POST", "/commit/") == hub.count("POST", "/tag/") == 1


def test_a_connection_dropped_in_the_middle_of_a_shard_is_survived(hub, export):
    hub.fail("PUT", "/blobs/", drop_after_bytes=500_000)
    push(export)
    assert hub.files(REPO) == contents(export)
    assert sorted(puts(hub, export, name) for name in SHARDS) == [1, 2]


def test_connections_dropped_oftener_than_the_client_repeats_are_survived_too(hub, export):
    hub.fail("PUT", "/blobs/", drop_after_bytes=500_000, times=8)
    _, said = push(export, files=FILES[:3], patience=publishing.Patience(tries=9, wait_s=0.001))
    assert hub.files(REPO) == contents(export, FILES[:3])
    assert puts(hub, export, SHARDS[0]) == 9 and "again in 0.001 s (2 of 9)" in said


@pytest.mark.parametrize("status", [500, 502])
def test_a_server_that_keeps_failing_is_left_after_some_tries_and_a_second_push_sends_only_the_rest(hub, export, status):
    digest = hashlib.sha256((export / SHARDS[1]).read_bytes()).hexdigest()
    hub.fail("PUT", digest, status=status, times=10**9)
    line = failure(RuntimeError, export)
    assert SHARDS[1] in line and str(status) in line, line
    assert puts(hub, export, SHARDS[0]) == 1
    assert QUICK.tries <= puts(hub, export, SHARDS[1]) <= 6 * QUICK.tries, "huggingface_hub itself sends a file up to 6 times"
    assert len(hub.repos[REPO].commits) == 1, "half an export is never seen"

    hub.failures.clear()
    before = puts(hub, export, SHARDS[1])
    push(export)
    assert (puts(hub, export, SHARDS[0]), puts(hub, export, SHARDS[1])) == (1, before + 1)
    assert hub.files(REPO) == contents(export)


@pytest.mark.parametrize(
    "method, where",
    [
        ("POST", "/repos/create"),
        ("GET", f"/models/{REPO}"),
        ("POST", "/validate-yaml"),
        ("POST", "/commit/"),
        ("POST", "/branch/"),
        ("GET", "/refs"),
        ("POST", "/tag/"),
    ],
)
def test_each_step_that_the_client_tries_only_once_survives_errors_of_server_and_gateway(hub, export, method, where):
    hub.fail(method, where, status=500)
    hub.fail(method, where, status=502)
    _, said = push(export, revision="bf16", tag="step-1", patience=publishing.Patience(tries=3, wait_s=0.001))
    assert "again in 0.001 s (2 of 3)" in said and "again in 0.002 s (3 of 3)" in said
    assert hub.files(REPO, "bf16") == hub.files(REPO, "step-1") == contents(export)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, export):
    hub.create(REPO, private=True, **{"model.safetensors": b"of an earlier export"})
    hub.fail("POST", "/commit/", lose_answer=True)
    _, said = push(export)
    assert hub.files(REPO) == contents(export)
    assert len(hub.repos[REPO].commits) == 2 and "again in" in said


@pytest.mark.parametrize("method, where", [("GET", f"/models/{REPO}"), ("POST", "/commit/")])
def test_a_hub_that_falls_silent_is_asked_again(hub, export, method, where):
    from huggingface_hub.utils import get_session

    if not hasattr(get_session(), "timeout"):
        pytest.skip("this huggingface_hub has no timeouts for what it sends")
    hub.fail(method, where, silent_s=20.0)
    started = time.monotonic()
    push(export, patience=publishing.Patience(tries=2, wait_s=0.001, silence_s=0.5))
    assert hub.files(REPO) == contents(export)
    assert time.monotonic() - started < 15


def test_a_refused_token_is_not_tried_again(hub, export, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    assert "does not accept the token (401): run `hf auth login`" in failure(ValueError, export)
    # The client itself, told that the repo may exist, looks for it before it gives up.
    assert hub.count("POST") == 1 and hub.count("GET") <= 1 and not hub.repos


@pytest.mark.parametrize(
    "status, kind, hint", [(401, ValueError, "hf auth login"), (403, ValueError, "right to write to user")]
)
def test_a_token_refused_in_the_middle_is_not_tried_again(hub, export, status, kind, hint):
    hub.fail("POST", "/commit/", status=status, times=10**9)
    assert hint in failure(kind, export)
    assert hub.count("POST", "/commit/") == 1


def test_a_name_of_somebody_else_is_refused_with_the_hubs_reason(hub, export):
    with pytest.raises(ValueError, match="403.*You don't have the rights.*right to write to another"):
        publishing.push(export, FILES, "another/model", message="m", say=print, patience=QUICK)
    assert hub.count("POST", "/repos/create") == 1


def test_without_a_token_nothing_is_asked(hub, export, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no Hub token: run `hf auth login`, or set HF_TOKEN" in failure(ValueError, export)
    assert not hub.requests


def test_a_token_that_cannot_be_renewed_is_an_error_of_one_line(hub, export, monkeypatch):
    def renew():
        raise OSError("the login has run out\nlog in again")

    monkeypatch.setattr("huggingface_hub.get_token", renew)
    assert "no Hub token: the login has run out log in again" in failure(RuntimeError, export)


def test_the_offline_switch_is_named(hub, export, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failure(ValueError, export)
    assert not hub.requests


def test_without_a_network_the_error_is_one_line(hub, export, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        said = []
        assert f"creating {REPO}" in failure(RuntimeError, export, say=said.append)
    assert len(said) == QUICK.tries - 1


def test_an_existing_public_repo_is_refused_unless_public_is_asked_for(hub, export):
    repo = hub.create(REPO, private=False)
    assert f"{REPO} is public and --public was not given" in failure(ValueError, export)
    assert hub.files(REPO) == {} and hub.count("PUT") == 0
    push(export, public=True)
    assert hub.files(REPO) == contents(export) and not repo.private


def test_public_makes_a_public_repo(hub, export):
    push(export, public=True)
    assert not hub.repos[REPO].private


def test_an_existing_private_repo_stays_private(hub, export):
    hub.create(REPO, private=True)
    _, said = push(export, public=True)
    assert hub.repos[REPO].private and "is private and stays so" in said and "/settings" in said
    assert hub.files(REPO) == contents(export)


def test_a_tag_names_the_commit_of_its_step_and_a_moved_one_is_said(hub, export):
    _, said = push(export, tag="step-00050000")
    repo = hub.repos[REPO]
    assert repo.tags == {"step-00050000": repo.branches["main"]} and "moves" not in said
    first = contents(export)
    (export / "config.json").write_bytes(b"{}")
    push(export, tag="step-00060000")
    assert hub.files(REPO, "step-00050000") == first
    assert hub.files(REPO, "step-00060000") == contents(export)
    _, said = push(export, tag="step-00050000")
    assert hub.files(REPO, "step-00050000") == contents(export) and "tag step-00050000 moves from commit" in said


def test_a_revision_is_a_branch_of_its_own(hub, export):
    url, _ = push(export, revision="float32")
    assert url.endswith(f"/{REPO}/tree/float32")
    assert hub.files(REPO, "float32") == contents(export) and hub.files(REPO) == {}
    push(export, revision="float32")
    assert hub.count("POST", "/commit/") == 1


def test_a_card_with_broken_metadata_is_refused_before_any_upload(hub, export):
    (export / "README.md").write_bytes(b"---\nlicense: [\n---\n# A model\n")
    assert "Invalid metadata in README.md" in failure(ValueError, export)
    assert hub.count("PUT") == 0


def test_weights_of_an_earlier_export_that_would_be_read_instead_are_removed_and_nothing_else(hub, export):
    earlier = {"model.safetensors": b"old", "notes.md": b"by hand", "eval.safetensors": b"other"}
    hub.create(REPO, private=True, **earlier)
    _, said = push(export)
    assert hub.files(REPO) == contents(export) | {name: earlier[name] for name in ("notes.md", "eval.safetensors")}
    assert "removing weights of an earlier export from main (its history keeps them): model.safetensors" in said
    push(export, files=["config.json"])
    assert hub.files(REPO).keys() >= set(SHARDS), "an export without such weights leaves those that are there"


def test_files_that_the_repo_ignores_are_missed(hub, export):
    hub.create(REPO, private=True, **{".gitignore": b"*.safetensors\n"})
    assert f"{REPO} lacks {', '.join(SHARDS)}, perhaps because of a .gitignore" in failure(RuntimeError, export)


@pytest.mark.skipif(find_spec("hf_xet") is None, reason="hf_xet is not installed")
def test_shards_that_travel_by_xet_arrive_and_a_refusal_there_is_not_tried_again(hub, export, monkeypatch, tmp_path):
    from huggingface_hub import __version__, constants

    if int(__version__.partition(".")[0]) < 2:
        pytest.skip("an older client agrees on Xet in another way, which this server does not speak")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_store = str(tmp_path / "xet")
    hub.fail("GET", "/xet-write-token/", status=403)
    assert "right to write to user" in failure(ValueError, export)
    assert hub.count("GET", "/xet-write-token/") == 1 and len(hub.repos[REPO].commits) == 1

    push(export)
    import hf_xet

    held = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert {name: held[name]["oid"] for name in SHARDS} == {
        name: hashlib.sha256((export / name).read_bytes()).hexdigest() for name in SHARDS
    }
    group = hf_xet.XetSession().new_download_stream_group(endpoint=f"local://{hub.xet_store}")
    for name in SHARDS:
        info = hf_xet.hash_files([str(export / name)])[0]
        stream = group.download_stream(hf_xet.XetFileInfo(info.hash, (export / name).stat().st_size))
        assert b"".join(stream) == (export / name).read_bytes()
    assert hub.count("PUT") == 0


def test_a_plan_shows_files_sizes_and_visibility_and_asks_nobody(hub, export):
    lines = publishing.plan_push(export, FILES, REPO, public=False, revision=None, tag="step-00050000")
    text = "\n".join(lines)
    assert "5 files, 3 MB" in lines[0] and "private; an existing public repo would be refused" in text
    assert "branch main, tag step-00050000" in text
    for name in FILES:
        assert any(line.endswith(f"  {name}") for line in lines)
    assert "1.5 MB  model-00001-of-00002.safetensors" in text and "notes.txt" not in text
    open_plan = "\n".join(publishing.plan_push(export, FILES, REPO, public=True, revision="bf16", tag=None))
    assert "(public)" in open_plan and "branch bf16, no tag" in open_plan
    assert not hub.requests


@pytest.mark.parametrize("name", ["model", "a/b/c", "user/", "user/a b", "user/-x"])
def test_a_name_that_is_none_is_refused_before_the_network(hub, export, name):
    with pytest.raises(ValueError, match="[Rr]epo"):
        publishing.push(export, FILES, name, message="m", say=print)
    with pytest.raises(ValueError, match="[Rr]epo"):
        publishing.plan_push(export, FILES, name, public=False, revision=None, tag=None)
    assert not hub.requests


def test_an_export_that_lacks_a_listed_file_is_refused_before_the_network(hub, export):
    (export / SHARDS[0]).unlink()
    with pytest.raises(ValueError, match=f"lacks {SHARDS[0]}"):
        push(export)
    assert not hub.requests


def test_a_copy_holds_exactly_the_listed_files_and_the_same_again_copies_nothing(export, tmp_path):
    pytest.importorskip("blobfile")
    said = []
    publishing.copy_to(export, FILES, str(tmp_path / "store" / "model"), said.append)
    there = tmp_path / "store" / "model"
    assert {path.name: path.read_bytes() for path in there.iterdir()} == contents(export)
    assert "manifest.json" in said[-1], "the manifest comes last"
    said.clear()
    publishing.copy_to(export, FILES, f"{there}/", said.append)
    assert said == []


def test_half_a_copy_is_known_as_such_and_completed(export, tmp_path, monkeypatch):
    blobfile = pytest.importorskip("blobfile")
    there = tmp_path / "store"
    copy = blobfile.Context.copy

    def break_off(self, source, target, **options):
        if source.endswith(SHARDS[1]):
            raise blobfile.Error("the line is dead")
        return copy(self, source, target, **options)

    with monkeypatch.context() as patched:
        patched.setattr(blobfile.Context, "copy", break_off)
        with pytest.raises(RuntimeError, match="the line is dead.*is intact, the same command copies what is missing"):
            publishing.copy_to(export, FILES, str(there), print)
    assert not (there / "manifest.json").exists()
    (there / SHARDS[1]).write_bytes(b"a beginning")

    said = []
    publishing.copy_to(export, FILES, str(there), said.append)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == contents(export)
    assert [line.split()[1] for line in said] == [SHARDS[1], "manifest.json"]


def test_a_store_that_keeps_less_than_it_was_sent_is_found_out(export, tmp_path, monkeypatch):
    blobfile = pytest.importorskip("blobfile")
    monkeypatch.setattr(blobfile.Context, "copy", lambda self, source, target, **options: self.write_bytes(target, b"less"))
    with pytest.raises(RuntimeError, match="has 4 bytes, and should have"):
        publishing.copy_to(export, FILES, str(tmp_path / "store"), print)
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize("mark", ["manifest.json", "manifest.json.partial", "config.json"])
def test_a_copy_over_another_export_whole_or_half_is_refused(export, tmp_path, mark):
    pytest.importorskip("blobfile")
    there = tmp_path / "store"
    there.mkdir()
    (there / mark).write_bytes(b"of another export")
    with pytest.raises(ValueError, match="holds"):
        publishing.copy_to(export, FILES, str(there), print)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {mark: b"of another export"}


def test_a_place_that_blobfile_cannot_name_is_an_error_of_one_line(export):
    pytest.importorskip("blobfile")
    with pytest.raises(RuntimeError, match="copying to s3://bucket/model: Unrecognized path.*is intact"):
        publishing.copy_to(export, FILES, "s3://bucket/model", print)


def test_without_blobfile_the_extra_is_named(export, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "blobfile", None)
    with pytest.raises(ValueError, match=r"pip install 'torchtitan_bio\[remote\]'"):
        publishing.copy_to(export, FILES, str(tmp_path / "store"), print)
