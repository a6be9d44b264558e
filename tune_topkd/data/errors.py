"""What is wrong with the user's data or with what the config says of it."""

from tune_topkd.errors import TuneTopKDError


class DataError(TuneTopKDError):
    """A dataset cannot be used as the config has it; the message names the file or key, and what to do."""


class DatasetNameError(DataError):
    """No dataset is known by a name, or what the name leads to is none."""
