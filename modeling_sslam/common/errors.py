"""Errors that inference and training report to their users as one line."""


class InferenceError(Exception):
    """A command or an inference function cannot do what was asked. The message names the value and the remedy."""


class ClipError(InferenceError):
    """A sound cannot be used.

    Args:
        reason: "missing", "empty", "undecodable", "unsupported_rate", "unsupported_samples", "too_short", "not_finite"
            or "out_of_range".
        detail: The fault and, where there is one, the remedy.
    """

    def __init__(self, reason: str, detail: str) -> None:
        # Both arguments, because pickle calls the class with them.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
