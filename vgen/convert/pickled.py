"""PyTorch's own files (.bin, .pt, .pth, .ckpt, .pkl), through its `weights_only` loader and nothing else.

Such files are pickles: programs that build objects.  torch's restricted loader builds tensors and plain containers;
what else a training run leaves beside them (its arguments, its callbacks, the classes of a whole saved module) is
replaced by `Inert` objects, which keep their state and do nothing.  No code is imported or run at a file's request.
"""

import contextlib
import io
import pickletools
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgen.config import UserError
from vgen.convert.formats import CODES, Stored

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params", "net", "network", "weights")
# Names that may stand in a file because they only describe: each becomes `Inert`.  Any other is refused.
INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|torch\.nn|dall_e|__torch__|torch\.jit\._pickle)\..*"
    r"|argparse\.Namespace|collections\.defaultdict|typing\.Any|pathlib\.\w*Path|(builtins|__builtin__)\.(dict|list|int)"
)


class Inert:
    """Stands for an object of a class that is not imported: holds the state it was given, ignores its arguments."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        self.state: Any = {}

    def __setstate__(self, state):
        self.state = state


def open_pickled(path: Path) -> dict[str, Stored]:
    """The tensors of a PyTorch file: a state dict, one wrapped in {"state_dict": ...}, {"model": ...} and the like, a
    whole module (DALL-E's dVAE), or a TorchScript archive (OpenAI's CLIP), whose code is left aside.

    Raises UserError without PyTorch, for a file that wants code to run, and for one without tensors.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"reading {path} needs PyTorch: pip install torch, or convert the file to .safetensors elsewhere"
        ) from None
    with _without_code(path) as (file, pickles):
        names = {name for data in pickles for name in _globals(data)}
        inert = [(Inert, name) for name in sorted(names) if INERT.fullmatch(name)]
        try:
            with torch.serialization.safe_globals(inert):
                mapped = file == path and zipfile.is_zipfile(path)
                tree = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
        except Exception as error:  # noqa: BLE001  a damaged pickle can fail in any way
            raise _refused(path, str(error)) from None
    tensors = dict(_state(tree, path))
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return {name: _stored(tensor, name, path) for name, tensor in tensors.items()}


def _refused(path: Path, message: str) -> UserError:
    if found := re.search(r"(?:GLOBAL|function|class) (\S+)", message):
        return UserError(
            f"{path}: wants {found[1]} to be imported, which is not done for a file; if you trust it, load it where it "
            "was made and save its state_dict() with safetensors.torch.save_file"
        )
    return UserError(f"cannot read {path}: {' '.join(message.split())[:200]}")


@contextlib.contextmanager
def _without_code(path: Path) -> Iterator[tuple[Path, list[bytes]]]:
    """(what torch.load is given, the pickles in it): the file, or of a TorchScript archive a copy without its code."""
    if not zipfile.is_zipfile(path):
        yield path, [path.read_bytes()]
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [archive.read(name) for name in names if name.endswith("/data.pkl")]
        if len(set(names)) != len(names) or len(pickles) != 1:
            raise UserError(f"{path}: not an archive that torch.save or torch.jit.save wrote")
        if not any(name.endswith("/constants.pkl") for name in names):
            yield path, pickles
            return
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            with zipfile.ZipFile(file, "w") as copy:
                for name in names:
                    if re.fullmatch(r"[^/]+/(data\.pkl|version|byteorder|data/\d+)", name):
                        copy.writestr(name, archive.read(name))
            file.flush()
            yield Path(file.name), pickles


def _globals(data: bytes) -> Iterable[str]:
    """Names ("module.name") that the pickles in `data` refer to, read without running them; also of a damaged file."""
    with contextlib.suppress(Exception):
        stream = io.BytesIO(data)
        while stream.tell() < len(data):  # the form before torch 1.6 holds several, then the bytes of the tensors
            for code, argument, _ in pickletools.genops(stream):
                if code.name == "GLOBAL":
                    yield argument.replace(" ", ".", 1)


def _state(tree: Any, path: Path) -> Iterable[tuple[str, Any]]:
    """(name, tensor) of the state dict in what torch.load returned."""
    import torch

    if isinstance(tree, Inert):
        yield from _module(tree, "")
        return
    while isinstance(tree, Mapping) and not any(isinstance(value, torch.Tensor) for value in tree.values()):
        inner = [key for key in WRAPPERS if isinstance(tree.get(key), (Mapping, Inert))]
        if not inner:
            break
        tree = tree[inner[0]]
        if isinstance(tree, Inert):
            yield from _module(tree, "")
            return
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected a state dict, got {type(tree).__name__}")
    nested = [str(key) for key, value in tree.items() if isinstance(value, Mapping) and value]
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield str(key), value
            nested = []
    if nested:
        raise UserError(
            f"{path}: no tensors at its top and none of {', '.join(WRAPPERS)}; it has {', '.join(nested[:10])}: "
            "save the one you mean in a file of its own"
        )


def _module(module: Inert, prefix: str) -> Iterable[tuple[str, Any]]:
    """Tensors of a saved module by the names of its state_dict: an nn.Module's, or a TorchScript object's fields."""
    import torch

    state = module.state if isinstance(module.state, dict) else {}
    if "_parameters" in state:
        state = {**state["_parameters"], **(state.get("_buffers") or {}), **(state.get("_modules") or {})}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield prefix + key, value
        elif isinstance(value, Inert):
            yield from _module(value, f"{prefix}{key}.")


def _stored(tensor: Any, name: str, path: Path) -> Stored:
    import torch

    try:
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch.").replace("bool", "bool_"))
    except TypeError:
        dtype = None
    if dtype not in CODES or tensor.layout is not torch.strided or tensor.is_quantized:
        raise UserError(f"{path}: {name!r} is a {tensor.layout} tensor of {tensor.dtype}, expected plain numbers")

    def read() -> np.ndarray:
        plain = tensor.detach().contiguous()
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        return plain.view(width).numpy().view(dtype).reshape(tuple(plain.shape))

    return Stored(tuple(tensor.shape), dtype, read)
