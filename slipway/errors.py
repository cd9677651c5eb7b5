"""What can go wrong and who can mend it: every error of slipway, with the exit code of the command that meets it."""

from __future__ import annotations


class SlipwayError(Exception):
    """Something the user can mend; the message says where, what is wrong, and what to do."""

    exit_code = 2


class TransientError(SlipwayError):
    """Something that may pass by itself, such as a server that is still starting: trying again can help."""

    exit_code = 75


class ParamsError(SlipwayError):
    """`params.yaml` or a form holds an unknown key, a wrong type, or a value out of range."""


class DataError(SlipwayError):
    """The source data cannot be read, or broke a hard expectation."""


class PictureError(DataError):
    """Bytes that are no usable picture.

    Args:
        message: what is wrong with them.
        fault: the same in one word, such as truncated.
    """

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.fault = fault

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:
        return type(self), (str(self), self.fault)


class CheckpointError(SlipwayError):
    """A training checkpoint is torn or belongs to another model."""


class DivergedError(SlipwayError):
    """Training went wrong: a loss that is no number or explodes.

    Args:
        message: what, where, what to try.
        step: the first step that was bad.
    """

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class ModelError(SlipwayError):
    """A model package is missing, corrupt, or does not give its golden outputs."""


class RequestError(SlipwayError):
    """A client's request is malformed; the message goes back to the client with status 400."""


class OverloadError(TransientError):
    """More requests wait than may, or than can be answered in time; goes back to the client with status 429."""


class DeadlineError(TransientError):
    """A request's time was up before it was answered; goes back to the client with status 504."""


class RegistryError(SlipwayError):
    """The model registry does not hold what was asked for."""


class GateError(SlipwayError):
    """A candidate missed a gate and may not be released."""


class PlatformError(SlipwayError):
    """The platform refused, or did not reach the state it was asked for."""


class CanaryRejectedError(SlipwayError):
    """The canary was judged worse than its limits allow."""


class ChaosError(SlipwayError):
    """Users noticed an injected fault more than the limits allow."""


class StackError(SlipwayError):
    """The local stack cannot start or stop: a port is taken, a program is missing."""
