"""Pushes an exported branch to the Hub in one commit, even if requests fail in between.

This file imports nothing from the package: a run starts it as a separate process, which must start fast and be small.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger("cps_hf.hub.push")
Result = TypeVar("Result")

MESSAGE = "Upload a branch trained with cps_hf"
# Seconds before each retry. The clients retry uploads and reads themselves, but no commits (HTTP 5xx).
_WAITS = (1, 4, 16, 60)
_WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")


def push_branch(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str = MESSAGE,
    license: str | None = None,
    push_pictures: bool = False,
) -> str:
    """Upload an exported branch in one commit, and return its URL. The folder does not change.

    In its example, the repository's card names the repository (and `revision`), and if no licence was chosen, it has
    the base model's. Weights of an earlier push that this one does not replace are deleted in the same commit: an old
    `model.safetensors` would be loaded instead of new shards. Temporary failures (no response, 5xx, 409, 429) are
    retried. A commit whose response was lost is looked up first, so there is only one commit.

    Args:
        directory: written by `export_branch`. Everything in it is uploaded.
        repo_id: "user/name" (or "name" of the token's user); created if it does not exist.
        private: whether a new repository is private. If `None`, the default of the user or organization. If true, an
            existing public repository is an error.
        token: if `None`, that of `hf auth login` or HF_TOKEN. It is never logged.
        revision: a branch of the repository, created if missing. If `None`, main.
        tag: a name for the commit, like "v1".
        license: the Hub's licence identifier for the card's metadata. If `None`, the card's or the base model's.
        push_pictures: put the run's `pictures/predictions.png`, next to `directory`, into the card.

    Returns:
        The commit's URL.

    Raises:
        ValueError: `directory` is not an exported branch, a name is not valid, there is no token, `tag` is taken, or
            the repository is public and `private` is true.
        RuntimeError: the Hub did not accept it; the message contains the command that pushes later.
    """
    directory = Path(directory)
    check_push(directory, repo_id, token)
    picture = _picture_of_run(directory) if push_pictures else None
    api = HfApi(token=token)
    try:
        repo_id = make_repo(api, repo_id, private)
        if revision is not None:
            _persist(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        if tag is not None and tag in _tags(api, repo_id):
            raise ValueError(f"`tag` {tag} is already used for a commit of {repo_id}. Choose another name.")
        card = _finished_card(api, directory, repo_id, revision, license, picture)
        address, commit = _commit(api, directory, repo_id, revision, commit_message, card, picture)
        if tag is not None:
            _persist(
                lambda: api.create_tag(repo_id, tag=tag, revision=commit),
                lookup=lambda: commit if _tags(api, repo_id).get(tag) == commit else None,
            )
    except Exception as error:  # of the Hub, the network or the disk
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise  # errors the user can fix
        options = {"private": private, "revision": revision, "tag": tag, "license": license}
        options |= {"push_pictures": push_pictures}
        options |= {} if commit_message == MESSAGE else {"commit_message": commit_message}
        raise RuntimeError(
            f"Pushing {directory} to {repo_id} failed: {describe(error)} Nothing is lost, the branch is in "
            f"{directory}. To push it later: {push_command(directory, repo_id, **options)}"
        ) from error
    logger.info("Pushed %s to %s.", directory, address)
    return address


def push_command(directory: str | os.PathLike, repo_id: str, **options: Any) -> str:
    """The command line that does what `push_branch` would, for copying into a shell. It contains no token."""
    return shlex.join(["cps-hf", "push", str(directory), "--repo_id", repo_id, *option_words(options)])


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options in command-line form. Those that are `None` or false are omitted."""
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)] if value not in (None, False) else []
    return words


def check_push(directory: Path | None, repo_id: str, token: str | None) -> None:
    """All checks that do not need the Hub. `directory` is `None` if the branch does not exist yet.

    Raises:
        ValueError: as in `push_branch`.
    """
    if directory is not None:
        missing = [name for name in ("config.json", "preprocessor_config.json") if not (directory / name).is_file()]
        if not missing and not [*directory.glob("*.safetensors")]:
            missing = ["model.safetensors"]
        if missing:
            inside = sorted(str(path.parent) for path in directory.glob("*/config.json"))
            advice = f" Give one of the branches in it: {', '.join(inside)}." if inside else ""
            raise ValueError(f"{directory} is not an exported branch: it has no {' and no '.join(missing)}.{advice}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'The repository\'s name must be like "user/name", got {repo_id!r}: {error}') from error
    if (token or get_token()) is None:
        raise ValueError("Pushing needs a token: run `hf auth login`, set HF_TOKEN, or pass one.")


def repo_id_of(hub_model_id: str | None, output_dir: str) -> str:
    """The repository of a run: the configured one, or the output folder's name."""
    return hub_model_id or Path(output_dir).resolve().name


def make_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create the repository if needed, and return its full name.

    Raises:
        ValueError: it is public but should be private.
        HfHubHTTPError: the Hub rejects the token.
    """
    repo_id = _persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if private and not _persist(lambda: api.repo_info(repo_id)).private:
        raise ValueError(
            f"{repo_id} exists and is public, but the branch should be private. Choose another name, or make the "
            "repository private."
        )
    return repo_id


def describe(error: Exception) -> str:
    """An error as one line, with advice if the Hub denies access."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".") + "."
    if _status(error) in (401, 403):
        text += " Does the token have write access there? `hf auth login` sets another one."
    return text


def _picture_of_run(directory: Path) -> Path:
    path = directory.parent / "pictures" / "predictions.png"
    if not path.is_file():
        raise ValueError(f"`push_pictures`: {path} does not exist; a run with an evaluation set draws it at its end.")
    return path


def _finished_card(
    api: HfApi, directory: Path, repo_id: str, revision: str | None, license: str | None, picture: Path | None
) -> str | None:
    """The card as the repository gets it: with its own name in the example, a licence, and the picture."""
    path = directory / "README.md"
    if not path.is_file():
        logger.warning("%s has no README.md: the repository will have no model card.", directory)
        return None
    card = ModelCard(path.read_text(encoding="utf-8"))
    card.text = re.sub(r"^model_id = \".*\"$", lambda _: f"model_id = {json.dumps(repo_id)}", card.text, flags=re.M)
    if revision is not None:
        call = r"(from_pretrained\(model_id|model=model_id)"
        card.text = re.sub(call, lambda found: f"{found[1]}, revision={json.dumps(revision)}", card.text)
    if picture is not None and "\n![" not in card.text:
        card.text = card.text.replace("\n## ", f"\n![Predictions of the run](<{picture.name}>)\n\n## ", 1)
    if license is not None:
        card.data.license = license
    elif card.data.license in (None, "unknown") and card.data.base_model:
        try:
            base = _persist(lambda: api.model_info(card.data.base_model)).card_data or {}
        except HfHubHTTPError as error:
            logger.warning("The license of %s is not known: %s", card.data.base_model, describe(error))
            base = {}
        for field in ("license", "license_name", "license_link"):
            if base.get(field):
                setattr(card.data, field, base.get(field))
    return f"{str(card).rstrip()}\n"


def _commit(
    api: HfApi,
    directory: Path,
    repo_id: str,
    revision: str | None,
    message: str,
    card: str | None,
    picture: Path | None,
) -> tuple[str, str]:
    """(URL, hash) of the commit.

    Not with `upload_folder`, which splits a large folder into several commits if hf_xet is installed.
    """
    push_id = f"Push {uuid.uuid4().hex}"

    def commit() -> tuple[str, str]:
        # Checked at each try, so that files that are already in the repository are not committed again.
        files = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}
        files = {name: path for name, path in files.items() if not re.search(r"(^|/)\.", name)}  # no .git, no .cache
        parent = api.repo_info(repo_id, revision=revision).sha
        old = api.list_repo_files(repo_id, revision=parent)
        operations = [CommitOperationDelete(name) for name in old if _WEIGHTS.fullmatch(name) and name not in files]
        content: dict[str, Any] = {name: str(path) for name, path in files.items()}
        if card is not None:
            content["README.md"] = card.encode()
        if picture is not None:
            content[picture.name] = str(picture)
        operations += [CommitOperationAdd(name, source) for name, source in content.items()]
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=push_id,
            revision=revision,
            parent_commit=parent,  # to which the files `old` belong: newer weights would otherwise stay next to ours
        )
        return info.commit_url, info.oid

    def lookup() -> tuple[str, str] | None:
        for found in api.list_repo_commits(repo_id, revision=revision):
            if push_id in found.message:
                return f"{api.endpoint}/{repo_id}/commit/{found.commit_id}", found.commit_id
        return None

    return _persist(commit, lookup=lookup)


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    return {ref.name: ref.target_commit for ref in _persist(lambda: api.list_repo_refs(repo_id)).tags}


def _persist(call: Callable[[], Result], *, lookup: Callable[[], Result | None] = lambda: None) -> Result:
    """`call()`, retried after temporary failures.

    Args:
        lookup: returns the result if an earlier try succeeded although its response was lost, else `None`.
    """
    for wait in (*_WAITS, None):
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            if (found := _quietly(lookup)) is not None:
                return found
            if wait is None:
                raise
            logger.warning("%s Retrying in %g s.", describe(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _quietly(lookup: Callable[[], Result | None]) -> Result | None:
    try:
        return lookup()
    except Exception:  # the Hub is gone: report the first error
        return None


def may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 425, 429)
    return not isinstance(error, OfflineModeIsEnabled | ValueError | FileNotFoundError | PermissionError)


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def main(argv: list[str] | None = None) -> None:
    """Run by `background` to push from a separate process; for people there is `cps-hf push`."""
    parser = argparse.ArgumentParser(prog="push", allow_abbrev=False)
    parser.add_argument("directory")
    parser.add_argument("--repo_id", required=True)
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision")
    parser.add_argument("--commit_message", default=MESSAGE)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(push_branch(**vars(parser.parse_args(argv))))
    except (ValueError, RuntimeError) as error:  # errors the user can fix: one line, no traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
