# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip push`: uploads a saved folder to the Hub after verifying it in a process without this package.

mlip push runs/mine owner/name --private
mlip push runs/mine owner/name --dry_run
mlip push runs/mine owner/name --space
"""

import argparse

from huggingface_hub import HfApi

from .errors import hub_errors
from .space import check_space_model, default_requirement, push_space
from .verification import NOT_PUSHED, verify_folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="mlip push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="A model saved by 'mlip train', 'mlip convert' or save_pretrained.")
    parser.add_argument("repo", help="The repository on the Hub: owner/name.")
    parser.add_argument("--private", action="store_true", help="Create the repository as a private one.")
    parser.add_argument("--dry_run", action="store_true", help="Verify the folder and upload nothing.")
    parser.add_argument("--commit_message", default="Upload MLIP model", help="The message of the commit.")
    parser.add_argument("--space", action="store_true", help="Also put the page of mlip app on the Hub, as a Space.")
    parser.add_argument(
        "--space_requirement",
        help="How the Space installs this package: a line of requirements.txt. Default: from the repository or package "
        "index that it was installed from here.",
    )
    flags = parser.parse_args(arguments)
    requirement = None
    if flags.space:
        requirement = flags.space_requirement or default_requirement()
        check_space_model(flags.folder)
    print(verify_folder(flags.folder))
    if flags.dry_run:
        print("Nothing was pushed: --dry_run.")
        return
    print(f"Pushed to {push(flags.folder, flags.repo, flags.private, flags.commit_message)}")
    if requirement is not None:
        print(f"The Space is {push_space(flags.repo, requirement, flags.private)}")


def push(folder: str, repo: str, private: bool = False, commit_message: str | None = None) -> str:
    """Creates the repository if it does not exist, and uploads the folder. Call it again after an interruption.

    Returns:
        The address of the repository.

    Raises:
        ValueError: if `private` is set and the repository exists and is public.
        OSError: if the Hub refuses a request or does not answer.
    """
    api = HfApi()
    with hub_errors(f"{repo} on {api.endpoint}"):
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise ValueError(f"{repo} exists and is public: make it private first, or push without private=True.")
        return api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=commit_message, ignore_patterns=[*NOT_PUSHED]
        ).repo_url.url


if __name__ == "__main__":
    main()
