"""Every error distserve raises on purpose, as one small tree; nothing here knows HTTP or processes.

DistserveError
|-- UsageError               the person who typed the command can mend it: one line, exit status 2
|   |-- PlanError            a plan that is malformed or does not fit the machine or the model
|   |-- ModelError           a checkpoint that is missing, truncated, contradictory or of an unknown architecture
|   `-- WorkloadError        a workload file or name that cannot be read
|-- RequestError             the client's request is wrong (HTTP 4xx); `param` names the field
|-- OverloadedError          not admitted now (HTTP 429); `retry_after` seconds is computed, not guessed
|-- UnavailableError         no instance can serve a phase (HTTP 503)
`-- InstanceError            one attempt failed; the gateway may start another
    |-- InstanceGone         the instance died, was fenced or restarted: its epoch is over
    |-- StaleError           the message or handle speaks of an epoch, attempt or block generation that is over
    `-- PullError            KV bytes could not be read, or were not the bytes that were promised
"""


class DistserveError(Exception):
    """The root; catch it where a process must go on whatever happened."""


class UsageError(DistserveError):
    """Bad usage or input. The message is one line that names the value, the limit and the cure."""


class PlanError(UsageError):
    """A plan that cannot be served or simulated."""


class ModelError(UsageError):
    """A checkpoint that cannot be loaded."""


class WorkloadError(UsageError):
    """A workload that cannot be read."""


class RequestError(DistserveError):
    """The client's request cannot be served as it stands.

    `status` is the HTTP status (400, 401, 404, 413, 422), `param` the field at fault (None: the whole body),
    `code` OpenAI's machine-readable reason where it has one.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class OverloadedError(DistserveError):
    """Refused at the door because what was admitted must keep its SLO. `retry_after`: seconds until there is room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(DistserveError):
    """No instance can run a phase right now. `retry_after`: seconds until one is expected back."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InstanceError(DistserveError):
    """One attempt failed on one instance. Survivable: the gateway decides whether to try again."""


class InstanceGone(InstanceError):
    """The instance died, hung and was fenced, or restarted."""


class StaleError(InstanceError):
    """Spoken to in the name of an epoch, attempt or block generation that is over."""


class PullError(InstanceError):
    """KV could not be pulled. `reason` is one of "gone", "stale", "generation", "digest", "transport"."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
