"""Credentials are shown nowhere: not in a log, a tag, an error or a trace."""

import logging
import re
import traceback
from collections.abc import Iterator
from urllib.parse import unquote

from tune_topkd.errors import TuneTopKDError

_USER_INFO = re.compile(r"(\w[\w+.-]*://)(?=[^/\s])(\S*)@")
"""Up to the last @ of a word: a password may have any sign in it. Where the URI has no host there is no user either."""
_SECRET_PARAMETER = re.compile(
    r"([?&;](?:sig|[\w.%-]*(?:passw|pwd|passphrase|token|secret|api[_-]?key|access[_-]?key|credential|signature"
    r"|odbc_connect)[\w.%-]*)=)([^&\s]*)",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 4  # what is shorter is starred in URIs only: it may be part of any word


def masked(text: str, *uris: str) -> str:
    """The text with the credentials of every URI in it starred out: users, passwords, tokens, secrets in its query.

    What is secret in `uris` is starred wherever it stands: who fails to take a URI apart shows pieces of it. Where it is
    not clear what belongs to a password, too much is starred rather than too little.
    """
    text = _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))
    for secret in sorted({s for uri in uris for s in _secrets(uri)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(uri: str) -> Iterator[str]:
    """What is secret in a URI: as it stands there, decoded, and in pieces."""
    values = [value for _, value in _SECRET_PARAMETER.findall(uri)]
    for _, info in _USER_INFO.findall(uri):
        user, _, password = info.partition(":")
        values.append(password or user)
    for value in values:
        forms = [value, unquote(value), *re.split(r"[@:/?#&;\[\]]", value)]
        yield from (form for form in forms if len(form) >= _SHORTEST_SECRET)


def reason_of(error: Exception, uri: str) -> str:
    """An error in one line. It is cut when it is masked: half a URI has no @ to be known by. Our own say it all."""
    if isinstance(error, TuneTopKDError):
        return masked(str(error), uri)
    return masked(" ".join(f"{type(error).__name__}: {error}".split()), uri)[:300]


def mask_record(record: logging.LogRecord) -> bool:
    """Mask what MLflow logs by itself, which includes the errors of its database."""
    trace = "\n" + "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
    record.msg, record.args, record.exc_info = masked(record.getMessage() + trace), (), None
    return True
