"""What MLflow and the databases behind it do not take, made into something that they do.

A ledger may hold any text: an error message with half a character in it, a metric's name with signs in it that MLflow
forbids. Here each becomes a text that all stores take, the same one each time, and different texts stay different names.
"""

import math
import posixpath
import re
import zlib

LONGEST_NAME = 250  # MLflow's limits, for parameters since 2.8
LONGEST_PARAM = 6000
LONGEST_TAG = 5000
_FORBIDDEN = re.compile(r"[^/\w.\- :]")
_LARGEST_STEP = 2**63 - 1


def clean_text(text: str, limit: int) -> str:
    """A text that UTF-8 and every database can hold, not longer than `limit`; what is cut off is counted."""
    text = text.encode("utf-8", errors="backslashreplace").decode().replace("\0", r"\x00")
    if len(text) <= limit:
        return text
    mark = f" … ({len(text)} characters)"
    return text[: limit - len(mark)] + mark


def clean_name(name: str) -> str:
    """A name that MLflow takes for a parameter, metric or tag; one that was changed ends with a checksum of what it was."""
    cleaned = posixpath.normpath(_FORBIDDEN.sub("_", clean_text(name, len(name) * 10 + 1))).strip("./")
    if name and cleaned == name and len(name) <= LONGEST_NAME:
        return name
    mark = f"_{zlib.crc32(name.encode(errors='surrogatepass')):08x}"
    return cleaned[: LONGEST_NAME - len(mark)] + mark


def clean_number(value: object) -> float | None:
    """A metric's value as a float; none where it is no finite one: stores disagree on NaN, and the ledger has it."""
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever a ledger holds
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def is_step(step: object) -> bool:
    """Whether a step is a number that fits a database's column."""
    return isinstance(step, int) and -_LARGEST_STEP <= step <= _LARGEST_STEP
