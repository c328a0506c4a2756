"""Errors a user can cause, each with the exit code of the process that meets it."""


class UserError(Exception):
    """Says what is wrong and what to do in at most three lines; ends the process with `exit_code`, without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A bad command line or configuration, a device that is not there included."""

    exit_code = 2


class DataError(UserError):
    """A data set that is missing, corrupt or cannot be downloaded."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint, or a run to resume, that is not found or unusable."""

    exit_code = 4


class StorageError(UserError):
    """A tracking store or output folder that cannot be used, or a run held by another process."""

    exit_code = 5


class DivergedError(UserError):
    """Training whose loss is no longer a finite number."""

    exit_code = 6
