"""LoRA in the files of PEFT, of diffusers and of kohya's scripts, as deltas of `vgen.adapt.lora`, in and out."""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgen.config import UserError
from vgen.convert import formats
from vgen.convert.export import new_folder
from vgen.convert.lora import Low, Part, delta_of, lows, sites, spellings, times
from vgen.convert.rules import ConvertError, listed
from vgen.convert.sources import Source, open_source
from vgen.types import Params

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
PEFT_PREFIX = "base_model.model."
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # of diffusers' files: PEFT's settings, with the parts' prefixes
# Kinds of LoRA that compute something else from arrays of the same names
REFUSED = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "fan_in_fan_out", "layer_replication")


# ------------------------------------------------------------------------------------------------- reading their files

# Endings of the names of the two factors, and of kohya's alpha.  Older diffusers: `.lora.down`, in front of which the
# attention's processor may stand; its text encoders: `.lora_linear_layer.down`.
_OLD = ((r"\.processor\.to_(q|k|v)_lora\.", r".to_\1.lora."), (r"\.processor\.to_out_lora\.", ".to_out.0.lora."))
_ENDINGS = (
    (r"\.(lora_A|lora\.down|lora_linear_layer\.down|lora_down)\.weight", "down"),
    (r"\.(lora_B|lora\.up|lora_linear_layer\.up|lora_up)\.weight", "up"),
    (r"\.alpha", "alpha"),
)


def _modules(tensors: Mapping[str, formats.Stored]) -> dict[str, dict[str, np.ndarray]]:
    """{module: {"down", "up" and maybe "alpha"}}; ConvertError listing arrays of other names, and factors alone."""
    found: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for stored, tensor in tensors.items():
        name = functools.reduce(lambda name, pair: re.sub(*pair, name), _OLD, stored)
        kinds = [(m[1], kind) for end, kind in _ENDINGS if (m := re.fullmatch(rf"(.+?){end}", name))]
        if not kinds:
            problems.append(f"unread {stored}: neither of two factors nor their alpha")
            continue
        found.setdefault(kinds[0][0], {})[kinds[0][1]] = tensor.read()
    for module, parts in found.items():
        if not {"down", "up"} <= set(parts):
            problems.append(f"{module}: has {', '.join(sorted(parts))} alone")
        elif not (down := parts["down"].shape)[:1] == (up := parts["up"].shape)[1:2] > (0,):
            problems.append(f"{module}: factors {down} and {up} are of no one rank")
    if problems:
        raise ConvertError(listed("not LoRA as vgen reads it", problems))
    return found


def _scale(settings: Mapping[str, Any], module: str, rank: int, alpha: Any = None) -> float:
    """alpha / rank of a module by PEFT's settings; without settings, by its alpha, which is the rank by default."""
    if alpha is None:
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches it, the first that does
                alpha = value
                break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _changes(tensors: Mapping[str, formats.Stored], settings: Mapping[str, Any], where: Any) -> dict[str, Low]:
    """{module: its change} of arrays whose prefix is gone; UserError for kinds of LoRA that vgen does not read."""
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{where}: peft_type is {kind!r}, expected 'LORA'")
    if used := [name for name in REFUSED if settings.get(name)]:
        raise UserError(f"{where}: {used[0]}={settings[used[0]]!r} is not the LoRA that vgen reads")
    try:
        found = _modules(tensors)
    except ConvertError as error:
        raise ConvertError(f"{where}: {error}") from None
    try:
        return {
            module: Low(x["down"], x["up"], _scale(settings, module, x["down"].shape[0], x.get("alpha")))
            for module, x in found.items()
        }
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{where}: its alphas are not the numbers they should be: {error}") from None


def _open(where: str | Path) -> Source:
    source = open_source(where)
    if isinstance(source, dict):
        raise UserError(f"{where} is a pipeline of {', '.join(source)}, expected the files of a LoRA")
    return source


def read_peft(where: str | Path, part: Part) -> Params:
    """The delta of a PEFT adapter: a folder, or "hf:owner/name", of adapter_config.json and adapter_model.safetensors.

    Raises UserError for what cannot be read, ConvertError listing modules and shapes that are not the network's.
    """
    source = _open(where)
    folder = source.path if source.path.is_dir() else source.path.parent
    settings = formats.read_json(folder / PEFT_FILES[0])
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in source.tensors.items()}
    return delta_of(part, _changes(tensors, settings, where))


def read_diffusers(where: str | Path, parts: Mapping[str, Part]) -> dict[str, Params]:
    """{prefix: delta} of pytorch_lora_weights.safetensors, or of another file of that form, or of kohya's.

    parts: {prefix of the names: network}: "unet", "transformer", "text_encoder", "text_encoder_2"; in kohya's files,
      whose names have no dots, "lora_unet", "lora_te" (SD), "lora_te1" and "lora_te2" (SDXL).  Prefixes that the file
      lacks are left out of the result.
    Raises UserError for what cannot be read, ConvertError listing arrays of other prefixes and what does not fit.
    """
    source = _open(where)
    settings, deltas, read = _metadata(source.path), {}, set()
    for prefix, part in parts.items():
        kohya = prefix.startswith("lora_")
        start = prefix + ("_" if kohya else ".")
        own = {name.removeprefix(start): x for name, x in source.tensors.items() if name.startswith(start)}
        if not own:
            continue
        network = sites(part)
        read |= {start + name for name in own}
        own_settings = {key.removeprefix(start): x for key, x in settings.items() if key.startswith(start)}
        changes = _changes(own, own_settings, where)
        if kohya:
            dotted = {module.replace(".", "_"): module for module in network[0]}
            changes = {dotted.get(module, module): low for module, low in changes.items()}
        deltas[prefix] = delta_of(part, changes, network)
    if lost := [f"unread {name}" for name in source.tensors if name not in read]:
        raise ConvertError(listed(f"{where}: belongs to none of {', '.join(parts)}", lost))
    return deltas


def _metadata(path: Path) -> dict[str, Any]:
    """PEFT's settings inside a file of diffusers, {} where it has none."""
    path = path / DIFFUSERS_FILE if path.is_dir() else path
    text = formats.metadata(path).get(METADATA) if path.suffix == ".safetensors" and path.is_file() else None
    return formats.parse_json(text, f"{path}: {METADATA}") if text else {}


# ------------------------------------------------------------------------------------------------- writing their files


def _alpha(low: Low) -> int | float:
    """alpha of a change, without the last digits that its scale lost in float32."""
    rank, exact = low.down.shape[0], low.scale * low.down.shape[0]
    near = float(f"{exact:.6g}")
    alpha = near if np.float32(near / rank) == np.float32(low.scale) else exact
    return int(alpha) if alpha.is_integer() else alpha


def peft_settings(changes: Mapping[str, Low]) -> dict[str, Any]:
    """The contents of adapter_config.json for {module as PEFT will find it: its change}."""
    ranks = {module: low.down.shape[0] for module, low in changes.items()}
    alphas = {module: _alpha(low) for module, low in changes.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    return dict(
        peft_type="LORA",
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(module): r for module, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(module): a for module, a in alphas.items() if a != alpha},
        target_modules=sorted(changes),
        lora_dropout=0.0,
        bias="none",
        task_type=None,
        inference_mode=True,
    )


def write_peft(
    where: str | Path,
    part: Part,
    delta: Params,
    *,
    names: Iterable[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Write a delta as a PEFT adapter, a new folder that `PeftModel.from_pretrained(model, folder)` reads.

    names: of the parameters of the model that PEFT will change, where its library spells them otherwise than the
      published files; by default as the installed library does, and as published without one.
    base_model: the address of that model, for adapter_config.json.
    Raises UserError if `where` holds something already, ConvertError as `lows` does.
    """
    changes, table = lows(part, delta)
    spelled = spellings(part, table, names)
    changes = {spelled.get(module, module): low for module, low in changes.items()}
    settings = peft_settings(changes) | dict(base_model_name_or_path=base_model)
    folder = new_folder(where)
    (folder / PEFT_FILES[0]).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    arrays: dict[str, np.ndarray] = {}
    for module, low in changes.items():
        for end, array in zip(("lora_A", "lora_B"), low[:2], strict=True):
            arrays[f"{PEFT_PREFIX}{module}.{end}.weight"] = np.ascontiguousarray(array)
    formats.write_safetensors(folder / PEFT_FILES[1], arrays)


def write_diffusers(where: str | Path, parts: Mapping[str, tuple[Part, Params]]) -> None:
    """Write deltas {prefix: (network, delta)} as a new folder with pytorch_lora_weights.safetensors.

    Names are the published ones, which diffusers translates itself.  Its form knows no alpha apart from the rank, so a
    scale other than 1 is multiplied into the second factor.
    Raises UserError if `where` holds something already, ConvertError as `lows` does.
    """
    arrays: dict[str, np.ndarray] = {}
    for prefix, (part, delta) in parts.items():
        # text encoders are read by another function of diffusers, which knows the MLP's layers by this spelling alone
        text = prefix.startswith("text_encoder")
        ends = ("lora_linear_layer.down", "lora_linear_layer.up") if text else ("lora_A", "lora_B")
        for module, low in lows(part, delta)[0].items():
            up = low.up if low.scale == 1 else times(low.up, low.scale)
            for end, array in zip(ends, (low.down, up), strict=True):
                arrays[f"{prefix}.{module}.{end}.weight"] = np.ascontiguousarray(array)
    folder = new_folder(where)
    formats.write_safetensors(folder / DIFFUSERS_FILE, arrays)
