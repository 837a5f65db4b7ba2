"""Models on a hub of Hugging Face: `hf-hub:OWNER/NAME` wherever a model directory is taken."""

from __future__ import annotations

from pathlib import Path

HUB_PREFIX = "hf-hub:"  # as in open_clip
_OTHERS = ["*.h5", "*.msgpack", "*.onnx*", "*.npz"]  # weights of other frameworks


def download_model(named: str) -> Path:
    """Finds the files of `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME@REVISION`; downloads them once.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached and it was not
            downloaded before.
        ValueError: `named` is no name of a repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repo, _, revision = named.removeprefix(HUB_PREFIX).partition("@")
    try:
        found = snapshot_download(repo, revision=revision or None, ignore_patterns=_OTHERS)
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"{named}: the hub has no such model that you may read; check the name, or log in "
            "with `hf auth login`"
        ) from error
    return Path(found)


def upload_model(
    directory: Path | None, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Uploads a model directory as it lies, its card included; makes the repository if need be.

    Args:
        directory: None is refused.
        repo_id: `OWNER/NAME`.
        private: of a new repository; None is the owner's default.
        token: None is that of `hf auth login` or HF_TOKEN.

    Returns:
        the address of the repository.
    """
    if directory is None:
        raise ValueError(
            "there is no directory to upload: this predictor was made of a model in memory; save "
            "it, and load it with from_pretrained"
        )
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    repo = hub.create_repo(repo_id, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=repo.repo_id, folder_path=directory, commit_message="Upload by cloc-mllm"
    )
    return str(repo)
