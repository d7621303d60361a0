"""What the converter knows of one published layout: how to build the network, its table, its config, its reference."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vgen.convert.rules import Table


class Family(NamedTuple):
    """One layout of one network family, as `vgen.convert.families` lists them.

    build: (config, shapes) -> the linen module.  config: the parsed config.json, {} where a layout has none; shapes:
      {name as stored: shape} of the checkpoint, from which layouts without a config take their sizes.
    table: module -> Table.
    inputs: (module, numpy Generator) -> keyword arguments of the module's `__call__`, numpy arrays of random values,
      batch 2: what `init` is traced with and what `verify` feeds to both sides.
    config: module -> the contents of config.json for export; None where the layout has no config file.
    reference: "package.module:Class" of the PyTorch network that reads an exported folder by `from_pretrained`; or a
      function -> torch module with the stored names, of config.json's contents, or of the linen module for layouts
      without a config; None where no package has it.
    compare: (torch module, inputs) -> {output name: numpy array} in vgen's axis order, and
    outputs: (result of the module's __call__) -> the same names; `verify` prints the error of each.
    """

    build: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Any]
    table: Callable[[Any], Table]
    inputs: Callable[[Any, np.random.Generator], dict[str, np.ndarray]]
    config: Callable[[Any], dict[str, Any]] | None = None
    reference: str | Callable[[Mapping[str, Any]], Any] | None = None
    compare: Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    outputs: Callable[[Any], Mapping[str, Any]] | None = None
