"""What the tables of several families share: rules of torch's layers, and ways to read sizes off a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vgen.convert.rules import CONV, LINEAR, Rule, Table, each, renamed

Shapes = Mapping[str, tuple[int, ...]]
FIRST = each(lambda a: a[0], lambda a: a[None])  # an array stored with a leading axis of one
ACTIVATIONS = {  # transformers' names
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def conv(src: str, dst: str, bias: bool = True) -> list[Rule]:
    """A torch convolution."""
    rules = [Rule(f"{src}.weight", f"{dst}/kernel", CONV), Rule(f"{src}.bias", f"{dst}/bias")]
    return rules if bias else rules[:1]


def norm(src: str, dst: str) -> list[Rule]:
    """A torch norm with scale and bias."""
    return [Rule(f"{src}.weight", f"{dst}/scale"), Rule(f"{src}.bias", f"{dst}/bias")]


def dense(src: str, dst: str) -> list[Rule]:
    """A torch linear layer."""
    return [Rule(f"{src}.weight", f"{dst}/kernel", LINEAR), Rule(f"{src}.bias", f"{dst}/bias")]


def batch_norm(src: str, dst: str) -> list[Rule]:
    """A torch batch norm with its running statistics."""
    return norm(src, dst) + [Rule(f"{src}.running_{x}", f"{dst}/{x}") for x in ("mean", "var")]


def count(shapes: Shapes, template: str) -> int:
    """How many numbers 0, 1, ... a name with {} exists for."""
    n = 0
    while template.format(n) in shapes:
        n += 1
    return n


def known(shapes: Shapes, rename: Sequence[tuple[str, str]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint under the names that the rules use."""
    return {name: tuple(shapes[stored]) for name, stored in renamed(shapes, Table((), rename=tuple(rename))).items()}


def pixels(model: Any, array: np.ndarray) -> Any:
    """Images as the torch network takes them, in the dtype of its parameters."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))).to(next(model.parameters()).dtype)
