"""Stores of objects: one conformance for a folder and for S3, whose server is a real process."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import free_port
from servers import s3_server

from tune_topkd.storage import FolderStore
from tune_topkd.storage import NoObjectError
from tune_topkd.storage import S3Store
from tune_topkd.storage import StoreError
from tune_topkd.storage import StoreNameError
from tune_topkd.storage import check_store
from tune_topkd.storage import copy_of
from tune_topkd.storage import open_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore.*")


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        server.make_bucket("runs")
        yield server


@pytest.fixture
def s3(server, monkeypatch):
    """The environment of the server's users."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/kept")
    request.getfixturevalue("s3")
    return open_store(f"s3://runs/{request.node.name}/below")


# --- conformance ----------------------------------------------------------------------------------------------------


def test_what_is_put_is_got(store, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 40_000)
    store.put("a/b", b"one")
    store.put("a/b", b"two")
    store.put("a/file", file)
    store.get_file("a/file", tmp_path / "back")
    assert store.get("a/b") == b"two"
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_a_new_object_is_put_once(store):
    assert store.put_new("a/x", b"first")
    assert not store.put_new("a/x", b"second")
    assert not store.put_new("a/x", b"first"), "the same content is another's all the same"
    assert store.get("a/x") == b"first"


def test_of_many_at_once_one_puts_a_new_object(store):
    barrier = threading.Barrier(8)

    def put(number):
        barrier.wait()
        return store.put_new("race", str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put, range(8)))
    assert won.count(True) == 1
    assert store.get("race") == str(won.index(True)).encode()


def test_names_are_listed_by_their_beginning(store):
    for name in ("s/ledger/2", "s/ledger/10", "s2/ledger/1", "s/ledge", "other"):
        store.put(name, b"")
    assert store.list("s/ledger/") == ["s/ledger/10", "s/ledger/2"]
    assert store.list("s/led") == ["s/ledge", "s/ledger/10", "s/ledger/2"]
    assert store.list("nothing/") == []
    assert len(store.list()) == 5


@pytest.mark.slow
def test_more_than_one_page_is_listed(store):
    names = [f"many/{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))
    assert store.list("many/") == names


def test_what_is_not_there_is_an_error_that_names_it_and_can_be_deleted(store, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for ask in (lambda: store.get("a/none"), lambda: store.get_file("a/none", tmp_path / "mine")):
        with pytest.raises(NoObjectError, match=r"a/none: is not there"):
            ask()
    assert (tmp_path / "mine").read_text() == "mine"
    store.delete("a/none")
    store.put("a/some", b"")
    store.delete("a/some")
    assert store.list("a/") == []


def test_a_store_that_keeps_drivers_apart_passes_the_check_and_nothing_stays(store):
    check_store(store)
    assert store.list() == []


def test_a_store_that_takes_a_new_object_twice_is_refused(tmp_path):
    class Forgetful(FolderStore):
        def put_new(self, name, content):
            self.put(name, content)
            return True

    with pytest.raises(StoreError, match="knows no If-None-Match"):
        check_store(Forgetful(tmp_path))


# --- S3 alone -------------------------------------------------------------------------------------------------------


class Losing:
    """A client that loses the first answer to a put, and tries again, as botocore does."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        return getattr(self._client, name)

    def put_object(self, **arguments):
        from botocore.exceptions import ClientError

        self._client.put_object(**arguments)
        try:
            self._client.put_object(**arguments)
        except ClientError as error:
            error.response["ResponseMetadata"]["RetryAttempts"] = 1
            raise


def test_a_put_whose_answer_was_lost_is_known_as_ones_own(s3):
    store = S3Store(Losing(open_store("s3://runs")._client), "runs", "lost")
    assert store.put_new("a", b"mine")
    open_store("s3://runs/lost").put("b", b"another's")
    assert not S3Store(open_store("s3://runs")._client, "runs", "lost").put_new("b", b"mine")


def test_what_is_wrong_with_a_bucket_is_told_in_a_line(s3, monkeypatch):
    with pytest.raises(StoreError) as raised:
        open_store("s3://no-such-bucket/x").put_new("a", b"")
    assert str(raised.value) == "s3://no-such-bucket/x/a: there is no such bucket"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        StoreError, match=r"^s3://runs/x: Could not connect to the endpoint URL: .*127\.0\.0\.1"
    ) as raised:
        open_store("s3://runs").list("x")
    assert "\n" not in str(raised.value)


def test_without_credentials_the_variables_are_named(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(StoreError, match=r"no credentials: set AWS_ACCESS_KEY_ID"):
        open_store("s3://runs").list()


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["gs://bucket/x", "hdfs://name/x", "s3:///x", "file://host/x", "file:///"])
def test_a_uri_of_no_store_is_told_which_there_are(uri):
    with pytest.raises(StoreNameError, match=rf"^{uri}: must be a folder, s3://BUCKET/PREFIX, or file:///FOLDER$"):
        open_store(uri)


def test_a_uri_with_a_secret_is_not_repeated():
    with pytest.raises(StoreNameError, match="credentials are in the environment") as raised:
        open_store("s3://key:secret@bucket/x")
    assert "secret" not in str(raised.value)


def test_without_boto3_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    with pytest.raises(StoreNameError, match=r"^s3://b/p: needs boto3: pip install 'tune_topkd\[s3\]'$"):
        open_store("s3://b/p")


def test_each_endpoint_has_a_copy_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TUNE_TOPKD_CACHE_DIR", str(tmp_path))
    here = copy_of("s3://b/p")
    assert here.is_relative_to(tmp_path)
    assert here != copy_of("s3://b/q")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other")
    assert here != copy_of("s3://b/p")
