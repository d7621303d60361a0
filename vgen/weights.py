"""Flat dicts of arrays from weight files; nothing is ever unpickled freely."""

from pathlib import Path

import numpy as np

from vgen.config import UserError


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a .safetensors, .npz, .pth or .pt file, names and layouts as stored.

    .pth and .pt need PyTorch and go through its `weights_only` loader, which accepts tensors alone.
    Raises UserError for a missing file, a suffix that is none of these, a damaged file, or missing PyTorch.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        if path.suffix == ".safetensors":
            from safetensors.flax import load_file

            return dict(load_file(path))
        if path.suffix in (".pth", ".pt"):
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
            return {name: value.float().numpy() for name, value in state.items()}
    except ModuleNotFoundError as error:
        raise UserError(f"reading {path} needs {error.name}: install it, or convert the file to .safetensors") from None
    except Exception as error:  # noqa: BLE001  every reader has its own exceptions for a damaged file
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    raise UserError(f"{path} has suffix {path.suffix!r}, expected .safetensors, .npz, .pth or .pt")
