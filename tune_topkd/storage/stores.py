"""Where runs can lie besides a folder: objects by name, in an S3 bucket or below a folder.

A `Store` is put to, read, listed and deleted from, and of several processes that put the same new object at once one
succeeds. That is all that runs need of it. Names have slashes, as keys of S3 have.

**Durability.** S3 acknowledges an object once it is stored redundantly; whoever reads or lists afterwards sees it. A folder
holds an object once its content and name are synced.
"""

import contextlib
import errno
import functools
import os
import shutil
import uuid
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Protocol
from typing import Self
from urllib.parse import unquote
from urllib.parse import urlsplit

from tune_topkd.errors import TuneTopKDError
from tune_topkd.storage.files import write_atomically
from tune_topkd.storage.files import write_new

KNOWN = "s3://BUCKET/PREFIX, or file:///FOLDER"
INSTALL = "pip install 'tune_topkd[s3]'"

_ATTEMPTS = 5
_TRIES_OF_A_CONFLICT = 5
_ATTEMPTS_VARIABLE = "AWS_MAX_ATTEMPTS"
_TOLD = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access is denied; are these the right credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)?",
    "InvalidAccessKeyId": "the access key is not known there (AWS_ACCESS_KEY_ID, AWS_PROFILE)",
    "SignatureDoesNotMatch": "the secret key does not fit the access key (AWS_SECRET_ACCESS_KEY, AWS_PROFILE)",
    "ExpiredToken": "the credentials have expired (AWS_SESSION_TOKEN)",
}
"""What S3 calls an error, and what a person is told."""


class StoreError(OSError, TuneTopKDError):
    """A store cannot be reached or refuses; the message names it, and says why."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(errno.EIO, reason, uri)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class NoObjectError(StoreError):
    """There is no object of this name."""


class StoreNameError(TuneTopKDError):
    """A URI names no store, or one whose library is not installed."""


class Store(Protocol):
    """Objects by name. Every method but `at` raises `StoreError` where the store cannot be reached or refuses.

    **Threads.** Several may use one store at once.
    """

    def at(self, name: str) -> str:
        """The URI of an object, for messages."""

    def put_new(self, name: str, content: bytes) -> bool:
        """Store an object if there is none of this name.

        Returns:
            Whether this call stored it: of several at once, one does.
        """

    def put(self, name: str, content: bytes | Path) -> None:
        """Store an object, bytes or a file's, instead of what has this name."""

    def get(self, name: str) -> bytes:
        """An object's content.

        Raises:
            NoObjectError: there is none.
        """

    def get_file(self, name: str, path: Path) -> None:
        """Replace the file at `path`, in a folder that is there, by an object: in one step, once all of it is here.

        Raises:
            NoObjectError: there is none; what was at `path` still is.
            OSError: the disk refused.
        """

    def list(self, prefix: str = "") -> list[str]:
        """The names that begin with `prefix`, sorted."""

    def delete(self, name: str) -> None:
        """Remove an object; it need not be there."""


def is_uri(place: str) -> bool:
    """Whether a place of runs is a URI and not a folder."""
    return "://" in place


def check_uri(uri: str) -> None:
    """Look at the form of a URI.

    Raises:
        StoreNameError: it names no store.
    """
    parts = urlsplit(uri)
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise StoreNameError(
            f"{parts.scheme}://…: must be {KNOWN} and nothing else; credentials are in the environment"
        )
    is_bucket, is_folder = bool(parts.netloc), not parts.netloc and bool(parts.path.strip("/"))
    if not {"s3": is_bucket, "file": is_folder}.get(parts.scheme, False):
        raise StoreNameError(f"{uri}: must be a folder, {KNOWN}")


def open_store(uri: str) -> Store:
    """The store that a URI names. It is not asked for anything yet.

    Raises:
        StoreNameError: there is none of this kind, or boto3 is not installed.
    """
    check_uri(uri)
    parts = urlsplit(uri)
    path = unquote(parts.path)
    return S3Store.connected(parts.netloc, path.strip("/")) if parts.scheme == "s3" else FolderStore(Path(path))


def check_store(store: Store) -> None:
    """Try that objects can be written and deleted there, and that a new one cannot be put twice.

    Raises:
        StoreError: they cannot.
    """
    name = f".probe-{uuid.uuid4().hex}"
    try:
        first, second = (store.put_new(name, content) for content in (b"1", b"2"))
    finally:
        with contextlib.suppress(StoreError):
            store.delete(name)
    if not first or second:
        reason = (
            "takes a new object twice (it knows no If-None-Match), so two drivers of a sweep would not be kept apart"
        )
        raise StoreError(store.at(""), reason)


class FolderStore:
    """Objects as files below a folder: on a disk that all share, or for tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def at(self, name: str) -> str:
        """The file's URI."""
        return f"file://{self._path(name)}"

    def put_new(self, name: str, content: bytes) -> bool:
        """Link a file into its place, which fails where there is one."""
        path = self._path(name)
        with self._told(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            return write_new(path, content)

    def put(self, name: str, content: bytes | Path) -> None:
        """Replace a file in one step."""
        path = self._path(name)
        with self._told(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                if isinstance(content, Path):
                    source = stack.enter_context(open(content, "rb"))
                    write_atomically(path, lambda stream: shutil.copyfileobj(source, stream))
                else:
                    write_atomically(path, lambda stream: stream.write(content))

    def get(self, name: str) -> bytes:
        """Read a file."""
        with self._told(name):
            return self._path(name).read_bytes()

    def get_file(self, name: str, path: Path) -> None:
        """Copy a file."""
        with self._told(name):
            source = open(self._path(name), "rb")
        with source:
            write_atomically(path, lambda stream: shutil.copyfileobj(source, stream))

    def list(self, prefix: str = "") -> list[str]:
        """Walk the folder; temporary files are none of its objects."""
        found = []
        top = self._path(prefix.rpartition("/")[0])
        for root, _, files in os.walk(top):
            here = Path(root).relative_to(self._folder).as_posix()
            found += [name if here == "." else f"{here}/{name}" for name in files if not _is_temporary(name)]
        return sorted(name for name in found if name.startswith(prefix))

    def delete(self, name: str) -> None:
        """Remove a file."""
        with self._told(name):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / name

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NoObjectError(self.at(name), "is not there") from error
        except OSError as error:
            raise StoreError(self.at(name), error.strerror or str(error)) from error


def _is_temporary(name: str) -> bool:
    """Whether a file is one that `write_atomically` has not yet given its name."""
    return name.startswith(".") and name.endswith(".tmp")


class S3Client(Protocol):
    """What `S3Store` asks of boto3's client, which has no types."""

    def put_object(self, *, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str = ...) -> Any:  # noqa: N803
        """Store an object; with `IfNoneMatch="*"` only where there is none."""

    def upload_file(self, Filename: str, Bucket: str, Key: str) -> None:  # noqa: N803
        """Store a file, a large one in parts."""

    def get_object(self, *, Bucket: str, Key: str) -> Mapping[str, Any]:  # noqa: N803
        """An object; its content is the stream `Body`."""

    def list_objects_v2(self, *, Bucket: str, Prefix: str, ContinuationToken: str = ...) -> Mapping[str, Any]:  # noqa: N803
        """A page of at most 1,000 names."""

    def delete_object(self, *, Bucket: str, Key: str) -> Any:  # noqa: N803
        """Remove an object."""


class S3Store:
    """Objects in a bucket, below a prefix.

    Endpoint, region and credentials are those of the environment, as boto3 reads it (`AWS_ENDPOINT_URL`,
    `AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, …). A request that fails is tried five times in all, or as `AWS_MAX_ATTEMPTS` says.
    """

    def __init__(self, client: S3Client, bucket: str, prefix: str = "") -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    def connected(cls, bucket: str, prefix: str = "") -> Self:
        """A store whose client is made from the environment.

        Raises:
            StoreNameError: boto3 is not installed, or the environment is not such as it can read.
        """
        try:
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise StoreNameError(f"s3://{bucket}/{prefix}: needs boto3: {INSTALL}") from error
        given = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        try:
            return cls(_client(given), bucket, prefix)
        except (BotoCoreError, ValueError) as error:
            raise StoreNameError(f"s3://{bucket}/{prefix}: {' '.join(str(error).split())}") from error

    def at(self, name: str) -> str:
        """The object's URI."""
        return f"s3://{self._bucket}/{self._prefix}{name}".rstrip("/")

    def put_new(self, name: str, content: bytes) -> bool:
        """Put with `If-None-Match: *`; that another one is being put at this moment is waited for."""
        for _ in range(_TRIES_OF_A_CONFLICT):
            try:
                with self._told(name):
                    self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content, IfNoneMatch="*")
                return True
            except _RefusedError as refusal:
                if refusal.code == "PreconditionFailed":
                    return refusal.was_retried and self.get(name) == content  # the first answer may have been lost
        raise StoreError(self.at(name), "others put the same object again and again")

    def put(self, name: str, content: bytes | Path) -> None:
        """Put bytes, or a file."""
        with self._told(name):
            if isinstance(content, Path):
                self._client.upload_file(str(content), self._bucket, self._key(name))
            else:
                self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content)

    def get(self, name: str) -> bytes:
        """Read all of an object."""
        with self._told(name):
            body = self._client.get_object(Bucket=self._bucket, Key=self._key(name))["Body"]
            with contextlib.closing(body):
                content: bytes = body.read()
        return content

    def get_file(self, name: str, path: Path) -> None:
        """Write an object to a file as it comes."""
        with self._told(name):
            body = self._client.get_object(Bucket=self._bucket, Key=self._key(name))["Body"]
            with contextlib.closing(body):
                write_atomically(path, lambda stream: shutil.copyfileobj(body, stream, 2**20))

    def list(self, prefix: str = "") -> list[str]:
        """Ask for one page after the other."""
        found: list[str] = []
        more: dict[str, str] = {}
        while True:
            with self._told(prefix):
                page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._key(prefix), **more)
            found += [entry["Key"].removeprefix(self._prefix) for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return sorted(found)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, name: str) -> None:
        """Delete an object."""
        with self._told(name):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(name))

    def _key(self, name: str) -> str:
        return self._prefix + name

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turn what boto3 raises into errors of ours, in a line."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError
        from botocore.exceptions import ClientError
        from botocore.exceptions import NoCredentialsError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404"):
                raise NoObjectError(self.at(name), "is not there") from error
            if code in ("PreconditionFailed", "ConditionalRequestConflict"):
                retries = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                raise _RefusedError(code, retries > 0) from error
            raise StoreError(self.at(name), _TOLD.get(code) or " ".join(str(error).split())) from error
        except NoCredentialsError as error:
            reason = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            raise StoreError(self.at(name), reason) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(self.at(name), " ".join(str(error).split())) from error


@functools.cache
def _client(given: tuple[tuple[str, str], ...]) -> S3Client:
    """boto3's client, one for all stores of an environment: making one takes longer than many requests."""
    import boto3
    from botocore.config import Config

    attempts = int(dict(given).get(_ATTEMPTS_VARIABLE) or _ATTEMPTS)
    retries = {"mode": "standard", "total_max_attempts": attempts}
    config = Config(connect_timeout=10, read_timeout=60, retries=retries)
    client: S3Client = boto3.session.Session().client("s3", config=config)
    return client


class _RefusedError(Exception):
    """S3 has refused a conditional request."""

    def __init__(self, code: str, was_retried: bool) -> None:
        super().__init__(code)
        self.code = code
        self.was_retried = was_retried
