"""Why a model was not fetched from the hub, in one line."""

from __future__ import annotations


def hub_error(error: BaseException) -> str:
    """The cause of an error of ``DiffusionPipeline.download``, without the libraries' advice."""
    cause: BaseException | None = error
    while cause is not None:
        names = {kind.__name__ for kind in type(cause).__mro__}
        if names & {"NetworkError", "ConnectionError", "OfflineModeIsEnabled", "gaierror", "TimeoutException"}:
            return f"the hub cannot be reached ({_line(cause)})"
        if names & {"RepositoryNotFoundError", "GatedRepoError"}:
            return "the hub has no such model, or it needs a login (`hf auth login`)"
        cause = cause.__cause__ or cause.__context__
    return f"it was not fetched from the hub ({_line(error)})"


def _line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 120 else line[:120] + "…"
