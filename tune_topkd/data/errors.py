"""What is wrong with the user's data or with what the config says of it."""

from tune_topkd.errors import TuneTopKDError


class DataError(TuneTopKDError):
    """A dataset that cannot be used as the config has it; the message names the file or key, and what to do."""
