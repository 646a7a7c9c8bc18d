"""Errors that a user can cause or must act on, each with a stable process exit code.

    0 success                       5 training diverged (non-finite loss or gradient)
    1 unexpected failure (a bug)    6 a score or a data set could not be proved
    2 unknown or missing option     7 the run folder is in use by another process
    3 bad value, config or file     8 another process of the run failed or is gone
    4 artifact over its byte budget 128+N stopped by signal N, resumable

Every message names what was received and what to do about it.
"""

EXTRAS = {
    "jinja2": "tools",
    "jsonschema": "tools",
    "matplotlib": "tools",
    "optuna": "tools",
    "scipy": "tools",
    "tensorboard": "tensorboard",
    "tomli": "tools",
    "trackio": "trackio",
    "transformers": "hf",
    "wandb": "wandb",
}
"""The extra of setup.py that brings a package that [train] lacks."""


def missing_package(error: ImportError) -> str | None:
    """What to install, where `error` means that something outside this distribution is missing or too old."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("golfgpt"):
        package = error.name.split(".")[0]
        return f'{package} is not installed: pip install "golfgpt[{EXTRAS.get(package, "train")}]"'
    # golfgpt_kernels' own sentence about torch has its name and no path, unlike an import that failed inside it.
    return str(error) if error.name == "golfgpt_kernels" and error.path is None else None


class GolfError(Exception):
    """Base of all expected failures; the command line prints the message without a traceback."""

    exit_code = 1


class UsageError(GolfError):
    """A command or an option is unknown, or a required one is missing."""

    exit_code = 2


class InputError(GolfError, ValueError):
    """A file, a value or a configuration is not usable as given."""

    exit_code = 3


class BudgetError(GolfError):
    """The artifact does not fit its byte budget, or the clock does not fit one step."""

    exit_code = 4


class NonFiniteError(GolfError):
    """A loss or a gradient is not finite. The update was not applied."""

    exit_code = 5


class VerificationError(GolfError):
    """Two independent counts disagree, or a digest does not match: no score is printed."""

    exit_code = 6


class BusyError(GolfError):
    """Another process holds the run folder."""

    exit_code = 7


class PeerError(GolfError):
    """Another rank failed and says why; this one only stops."""

    exit_code = 8


class LostPeerError(GolfError):
    """Another rank is gone, or was not heard of for too long, and cannot say why."""

    exit_code = 8


class Interrupted(GolfError):
    """The run was stopped by a signal after saving its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


class Terminated(BaseException):
    """SIGTERM came while nothing else handled it. Like KeyboardInterrupt it is no Exception, for much of the code goes
    on after one of these."""


def interruption(error: BaseException | None) -> Interrupted | None:
    """The Interrupted that caused `error`, if one did: compilers wrap what is raised within them."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
