"""MODEL as it is typed: a folder, or hf:ORG/NAME[@REVISION] of the Hugging Face hub, which is downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

import click

HUB = "hf:"
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "LICENSE*"]
"""What an engine, a tokenizer and a licence need; other formats of the same weights are left where they are."""
SKIPPED = ["original/*", "onnx/*", "openvino/*", "*.msgpack"]


def find_model(text: str) -> Path:
    """The model's folder here; what lies on the hub is downloaded. A connection that breaks is gone on with where it
    was; after a program that ended the files that are whole are kept.

    Raises:
        click.ClickException: there is no such folder or repository, or it cannot be had now.
        click.BadParameter: the name is none.
    """
    if text.startswith(HUB):
        return _downloaded(text)
    folder = Path(text).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.is_dir():
        raise click.ClickException(f"{text} has no config.json; name the folder of a Hugging Face model")
    hint = f"; of the Hugging Face hub write {HUB}{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
    raise click.ClickException(f"{text}: no such folder{hint}")


def short_name(text: str) -> str:
    """What the model is called where nobody says otherwise: its folder's or repository's own name."""
    name = text.removeprefix(HUB).partition("@")[0].rstrip("/")
    return Path(name).expanduser().resolve().name if not text.startswith(HUB) else name.rpartition("/")[2]


def _downloaded(text: str) -> Path:
    import httpx2  # noqa: PLC0415
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415  (it takes a second)

    repository, _, revision = text.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise click.BadParameter(f"{text!r}: write {HUB}ORG/NAME, or {HUB}ORG/NAME@REVISION", param_hint="MODEL")
    try:
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=FILES, ignore_patterns=SKIPPED)
        )
    except errors.HFValidationError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint="MODEL") from None
    except errors.GatedRepoError:
        raise click.ClickException(
            f"{text}: whoever made it asks who you are; accept its terms on its page, and log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise click.ClickException(f"{text}: the repository has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise click.ClickException(
            f"{text}: no such repository, or a private one; check the name, or log in with: hf auth login"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise click.ClickException(
            f"{text} is not in the cache of this machine, and the hub cannot be reached; check the network, or name a "
            "folder"
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        raise click.ClickException(
            f"{text}: the download broke off ({error or type(error).__name__}); run the same command again, the files "
            "that are whole are kept"
        ) from None
    if not (folder / "config.json").is_file():
        raise click.ClickException(f"{text} has no config.json: it is not a model that transformers can read")
    return folder
