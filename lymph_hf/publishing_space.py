"""The folder of a Space -> what is sent of it: its sources, its card and its pictures; no cache, nothing hidden."""

import shutil
from pathlib import Path

from huggingface_hub import RepoCard

from .files import folder_files
from .hub_push import PublishError
from .publication_checks import SPACE
from .publishing_stage import Staged

SDKS = ("gradio", "docker", "static")


def stage_space(source: Path, folder: Path) -> Staged:
    """Copy what a Space consists of.

    Hidden files and folders and `__pycache__` stay behind; any other file that a Space may not hold is refused later,
    as it would be missed.

    Raises:
        PublishError: no front matter with an SDK, or its `app_file` is not there.
    """
    sdk = _sdk(source)
    left = 0
    for name, path in folder_files(source).items():
        if any(part.startswith(".") or part == "__pycache__" for part in name.split("/")):
            left += 1
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    note = f"{left} hidden or compiled files of {source.name} are left out."
    return Staged(folder, SPACE, repo_type="space", notes=(note,), space_sdk=sdk)


def _sdk(source: Path) -> str:
    readme = source / "README.md"
    if not readme.is_file():
        raise PublishError(f"--space {source}: no README.md there, whose front matter tells the Hub how to run it.")
    try:
        data = RepoCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=False).data.to_dict()
    except ValueError as error:
        raise PublishError(f"{readme}: its front matter cannot be read ({error}).") from error
    if data.get("sdk") not in SDKS:
        raise PublishError(f"{readme}: sdk={data.get('sdk')!r} in its front matter, expected {', '.join(SDKS)}.")
    app = data.get("app_file")
    if app is None or not (source / app).is_file():
        raise PublishError(f"{readme}: app_file={app!r} in its front matter, expected a file of the folder.")
    return data["sdk"]
