"""broker.toml: whose data a folder holds. Written once, so that a folder given to the wrong broker is refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from zrmq.errors import FolderUnusableError
from zrmq.files import Files, read_file, replace_file

FOLDER_FORMAT_VERSION = 1


def claim(files: Files, folder: Path, broker_name: str, cluster: str, new_store_id: str) -> str:
    """Make the folder this broker's, or make sure that it is. Returns the folder's store id: `new_store_id` if it was new.

    Raises `FolderUnusableError` for another broker's, one of a newer format, or a file that is not what was written; `OSError`.
    """
    path = folder / "broker.toml"
    try:
        text = read_file(files, path).decode()
        said = tomllib.loads(text)
    except FileNotFoundError:
        replace_file(files, path, _text(broker_name, cluster, new_store_id).encode())
        return new_store_id
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or such as Python refuses to read
        raise _spoiled(path, str(error)) from error
    version = said.get("format_version")
    if not isinstance(version, int):
        raise _spoiled(path, "it has no format_version")
    if version > FOLDER_FORMAT_VERSION:
        raise FolderUnusableError(
            f"{folder} has format {version}; this zrmq reads up to {FOLDER_FORMAT_VERSION}. Upgrade.",
            folder=str(folder), format_version=version,
        )
    owner, its_cluster = said.get("broker_name"), said.get("cluster")
    if (owner, its_cluster) != (broker_name, cluster):
        raise FolderUnusableError(
            f"{folder} holds the data of broker {owner!r} of cluster {its_cluster!r}, not of {broker_name!r} of {cluster!r}."
            " Give this broker a folder of its own, or start it under that name.",
            folder=str(folder), broker_name=owner, cluster=its_cluster,
        )
    return str(said.get("store_id", ""))


def _spoiled(path: Path, what: str) -> FolderUnusableError:
    return FolderUnusableError(
        f"{path} cannot be read: {what}. It says whose data this is: bring it back, or delete it if you know.", path=str(path)
    )


def _text(broker_name: str, cluster: str, store_id: str) -> str:
    name, its_cluster, its_id = (json.dumps(text, ensure_ascii=False) for text in (broker_name, cluster, store_id))
    return (
        "# Whose data this folder holds. Written once by zrmq; not to be edited.\n"
        f"format_version = {FOLDER_FORMAT_VERSION}\n"
        f"broker_name = {name}\n"
        f"cluster = {its_cluster}\n"
        f"store_id = {its_id}\n"
    )
