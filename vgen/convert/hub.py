"""Checkpoints of the Hugging Face hub: "hf:owner/name", "hf:owner/name@revision", "hf:owner/name/part@revision"."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from vgen.config import UserError, brief

INDEX = ".index.json"  # of shards
PIPELINE = "model_index.json"  # of a folder of parts
VOCABULARIES = ("merges.txt", "spiece.model")  # of tokenizers
FORM = "hf:owner/name[/part][@revision]"


def parse(where: str) -> tuple[str, str, str | None]:
    """("owner/name", "part" or "", revision or None) of an address; UserError if it is none."""
    word = r"[\w.-]+"
    found = re.fullmatch(rf"hf:({word}/{word})((?:/{word})*)(?:@([\w./-]+))?", where)
    if not found or any(part in (".", "..") for part in re.split("[/@]", where[3:])):
        raise UserError(f"{where!r} is not an address of the form {FORM}")
    return found[1], found[2].lstrip("/"), found[3]


def fetch(where: str, pick: Callable[[list[str]], list[str]]) -> Path:
    """The local folder of a checkpoint, downloaded where it is not in huggingface_hub's cache yet.

    pick: of the names of one folder's files, the weights to read (or their index): only those are fetched, of a
      repository that offers the same weights in several forms.
    Raises UserError, one sentence, without huggingface_hub, without a network, or where there is no such thing.
    """
    repo, part, revision = parse(where)
    try:
        import huggingface_hub as hf
        from huggingface_hub.utils import logging
    except ModuleNotFoundError:
        raise UserError(f"{where} needs huggingface_hub: pip install 'vgen[hub]', or name a local folder") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells of every attempt, and the sentence below tells of them all
    try:
        files = hf.HfApi().list_repo_files(repo, revision=revision)
        wanted = choose((name for name in files if not part or name.startswith(part + "/")), pick)
        folder = hf.snapshot_download(repo, revision=revision, allow_patterns=wanted)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001  the client raises its own, requests', httpx's and the system's errors
        folder = _cached(hf, repo, revision)
        if folder is None:
            raise UserError(f"{where}: {_reason(error)}; nothing of it is cached here") from None
    finally:
        logging.set_verbosity(verbosity)
    path = Path(folder) / part
    if not path.is_dir():
        raise UserError(f"{where}: the repository has no folder {part!r}")
    return path


def _cached(hf, repo: str, revision: str | None) -> str | None:
    try:
        return hf.snapshot_download(repo, revision=revision, local_files_only=True)
    except Exception:  # noqa: BLE001
        return None


def _reason(error: Exception) -> str:
    kinds = {
        "RepositoryNotFoundError": "there is no such repository, or it is private and you are not logged in",
        "GatedRepoError": "its owner wants you to accept terms first, on its page, and to log in",
        "RevisionNotFoundError": "the repository has no such revision",
        "OfflineModeIsEnabled": "huggingface_hub is set to be offline",
    }
    for kind in type(error).__mro__:
        if kind.__name__ in kinds:
            return kinds[kind.__name__]
    return f"the hub cannot be reached ({type(error).__name__}: {brief(error, 120)})"


def choose(names: Iterable[str], pick: Callable[[list[str]], list[str]]) -> list[str]:
    """Of a repository's files those to fetch: configs, vocabularies, and of each folder one form of its weights.

    Weights beside a pipeline's index are another form of the whole, but where a config.json makes them a network.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(str(path.parent), []).append(path.name)
    wanted: list[str] = []
    for folder, files in folders.items():
        place = "" if folder == "." else folder + "/"
        wanted += [place + name for name in files if name.endswith((".json", *VOCABULARIES))]
        try:
            chosen = pick(files) if PIPELINE not in files or "config.json" in files else []
        except UserError:
            continue  # several forms of unusual names: whoever opens the folder is told to name one
        for name in chosen:
            wanted.append(place + name)
            if name.endswith(INDEX):
                stem, _, suffix = name.removesuffix(INDEX).rpartition(".")
                shard = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{re.escape(suffix)}")
                wanted += [place + file for file in files if shard.fullmatch(file)]
    return wanted
