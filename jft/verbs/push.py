"""The verb `push`: uploads an exported model to a hub, after showing what would be uploaded."""

import argparse
import importlib
import re
import tempfile
from pathlib import Path
from typing import Any

from jft import trained
from jft.errors import ConfigError

_TARGET = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def push(args: argparse.Namespace) -> None:
    """Exports a run and uploads it where --yes says so; without it only lists the files."""
    target = _TARGET.fullmatch(args.to)
    if not target:
        raise ConfigError(f"--to={args.to}: should be hf:OWNER/NAME[@BRANCH]")
    with tempfile.TemporaryDirectory(prefix="jft-push-") as folder:
        out = trained.export(args.workdir, Path(folder) / "export", step=args.step)
        for file in sorted(out.iterdir()):
            print(f"{file.stat().st_size:>14,}  {file.name}")
        if not args.yes:
            print(f"nothing was uploaded; --yes uploads these files to {args.to}")
            return
        print(f"uploaded to {upload(out, target['repo'], target['revision'], args.private)}")


def upload(folder: Path, repo: str, revision: str | None, private: bool) -> str:
    """Uploads a folder as one commit, making the repository if it is not there; returns its URL.

    Raises:
      ConfigError: huggingface_hub is missing, or the hub refuses, in its own words.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError("jft push: needs huggingface_hub: pip install 'jft[hub]'") from error
    api = hub.HfApi(library_name="jft")
    try:
        api.create_repo(repo_id=repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id=repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            revision=revision,
            commit_message="Upload a model fine-tuned with jft",
        )
    except Exception as error:  # the library's errors have many bases, httpx's among them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"jft push: hf:{repo}: {reason} (log in with: hf auth login)") from error
    return str(getattr(done, "commit_url", done))
