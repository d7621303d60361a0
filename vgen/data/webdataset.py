"""Tar shards in the WebDataset convention, read at random without the webdataset package."""

import glob
import json
import os
import tarfile
from collections.abc import Mapping

from absl import logging

from vgen.data.images import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class WebDataset:
    """Tar shards in the WebDataset convention: files that share a path up to the first dot are one example.

    Reads jpg, jpeg, png, webp (image), txt (caption), json (caption or text, label) and cls (label).  The shards are
    indexed once and read at random, so they must not be compressed.  A shard that ends early gives the examples before
    the break and a warning.  Raises DataError if nothing matches, a shard is no tar, or no example has an image.
    """

    def __init__(self, pattern: str):
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise DataError(f"webdataset:{pattern}", "no files", "tar files matching the pattern", "check the path")
        self._shards = paths
        self._index = [entry for shard, path in enumerate(paths) for entry in _index_tar(path, shard)]
        if not self._index:
            raise DataError(
                f"webdataset:{pattern}", "no images", "members ending in .jpg, .jpeg, .png or .webp", "check the shards"
            )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> dict:
        shard, key, members = self._index[i]
        example = {"name": f"{self._shards[shard]}/{key}"}
        with open(self._shards[shard], "rb") as file:
            for suffix, (offset, length) in members.items():
                file.seek(offset)
                data = file.read(length)
                if suffix == "txt":
                    example["caption"] = data.decode("utf-8", "replace").strip()
                elif suffix == "cls":
                    example["label"] = _number(data, example["name"])
                elif suffix == "json":
                    example.update(_json_fields(data, example["name"]))
                else:
                    example["image"] = data
        return example


def _number(data: bytes, name: str) -> int:
    try:
        return int(data)
    except ValueError:
        raise DataError(f"{name}.cls", repr(data[:40]), "a whole number", "repair the shard") from None


def _json_fields(data: bytes, name: str) -> dict:
    try:
        fields = dict(json.loads(data))
    except (ValueError, TypeError):
        raise DataError(f"{name}.json", repr(data[:40]), "a JSON object", "repair the shard") from None
    found = {"caption": caption_of(fields), "label": fields.get("label")}
    return {key: value for key, value in found.items() if value is not None}


def _index_tar(path: str, shard: int) -> list:
    """(shard, key, {suffix: (offset, length)}) of every complete example with an image."""
    examples, size = {}, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                suffix = suffix.lower()
                if not member.isfile() or suffix not in (*IMAGE_SUFFIXES, "txt", "json", "cls"):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if member.offset_data + member.size > size:
                    examples.pop(key, None)
                    raise tarfile.ReadError("unexpected end of data")
                examples.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        if not examples:
            raise DataError(
                f"shard {path}",
                f"{size} bytes that are no plain tar file ({error})",
                "an uncompressed tar file",
                "unpack compressed shards, or download it again",
            ) from error
        logging.warning("shard %s ends early (%s): its first %d examples are used", path, error, len(examples))
    return [(shard, key, members) for key, members in examples.items() if any(s in members for s in IMAGE_SUFFIXES)]


def caption_of(fields: Mapping) -> str | list[str] | None:
    """The caption of a JSON record, under either of the two usual keys."""
    value = fields.get("caption", fields.get("text"))
    return value if value is None or isinstance(value, (str, list)) else str(value)
