"""Output folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from .caller_settings import undisturbed
from .checkpoints.companions import CARD
from .checkpoints.staging import expanded
from .errors import CheckpointError, OutputError, RecipeError, one_line
from .report.report_json import read_report
from .report.sentences import literal, result_name

FLAG = "--push-to-hub"

_MESSAGE = "Sparse Query Attention by sqa-convert"

_STALE = ["*.safetensors", "*.safetensors.index.json"]
"""files of an earlier upload that go when this one has none of that name"""


def check_push(repo_id: str) -> None:
    """Raises RecipeError or OutputError where an upload could not even begin, before hours of work."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"{FLAG} {repo_id}: give NAME or OWNER/NAME ({one_line(error)})") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a bad one, offline, and whatever the HTTP library raises
        raise OutputError(f"{FLAG} {repo_id}: {_said(error)}") from error


@undisturbed
def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Uploads an output folder. Run again after a failure it does not send again what the hub has already.

    Args:
        folder: made by `convert`.
        repo_id: NAME or OWNER/NAME; it is made where there is none, else its weights are replaced.
        private: whether a repository that is made is private; one that exists stays as it is.

    Returns:
        Its address.

    Raises:
        OutputError: not an output folder, not logged in, out of reach, or no right to write there.
    """
    from huggingface_hub import HfApi

    folder = expanded(folder, "FOLDER")
    try:
        name = result_name(read_report(folder))
    except CheckpointError as error:
        raise OutputError(f"{one_line(error)}; only what sqa-convert made is pushed") from error
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message=_MESSAGE,
            delete_patterns=_STALE,
            ignore_patterns=[CARD],
        )
        card = (folder / CARD).read_text(encoding="utf-8")
        there = card.replace(f"from_pretrained({literal(name)}", f"from_pretrained({literal(address.repo_id)}")
        api.upload_file(
            path_or_fileobj=there.encode(), path_in_repo=CARD, repo_id=address.repo_id, commit_message=_MESSAGE
        )
    except Exception as error:
        raise OutputError(
            f"{folder} is complete, but not on the hub as {repo_id}: {_said(error)}; try again"
        ) from error
    return str(address)


def _said(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off by HF_HUB_OFFLINE"
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in: `hf auth login`, or a token in HF_TOKEN"
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError) and cause.response is not None and cause.response.status_code in (401, 403):
        why = f" {cause.server_message}" if cause.server_message else ""
        said = f"not allowed there ({cause.response.status_code}){why}: `hf auth login` with a token that may write"
        return _without_token(said)
    return _without_token(str(cause) or type(cause).__name__)


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return one_line(Exception(text.replace(token, "…") if token else text))
