"""Named errors for everything a user, a data row or a machine can get wrong.

The command line prints them as one line and exits with status 1. `assert` is kept for our own bugs.
"""


class SermllError(Exception):
    """Something outside the code is wrong; the message says what was found and what to do."""


class ConfigError(SermllError):
    """A key, value or combination of settings is not valid."""


class CorpusError(SermllError):
    """A corpus folder is missing, empty, or not the corpus it was said to be."""


class DataError(SermllError):
    """Prepared data are missing, damaged, from another version, or do not fit the experiment."""


class ProtocolError(SermllError):
    """The folds are impossible for these data, or a speaker or recording stands on two sides."""


class CheckpointError(SermllError):
    """A checkpoint is missing, truncated, changed, or belongs to another run."""


class TrainingError(SermllError):
    """Training cannot go on: a loss or gradient stopped being finite, or the workers were lost."""


class StorageError(SermllError):
    """A disk has less room than what is to be written needs, or cannot be written."""


class AudioError(SermllError):
    """An audio file cannot be used; `reason` is the short word counted in the problems table."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[type["AudioError"], tuple[str, str]]:
        return AudioError, (self.reason, str(self))
