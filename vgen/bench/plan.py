"""The plans of all configs: what each needs of the slice that it is made for, see `vgen.plan`.

A config names its slice in `topology`; nothing of it has to be there.
"""

import json
import re
import runpy
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vgen.config import UserError, brief, to_json
from vgen.convert.show import size
from vgen.hlo import COLLECTIVES
from vgen.plan import changed, plan, target

HEAD = ("config", "slice", "mesh", "stage", "million parameters", "a device holds", "GFLOP", "sends",
        "ms, at best", "images/s", "chip hours", "compiled")  # fmt: skip


def table(folder: str, only: str = "", scale: str = "paper", out: str = "", topology: str = "") -> Iterator[str]:
    """Rows of a Markdown table, a stage each, as they are done; a config that trains what another did is named with it.

    folder: of the config files.  only: regular expression of "CONFIG/STAGE" for training, "CONFIG/STAGE, sampled" for
    sampling.  topology: in the place of the configs' own.  out: a file for the whole reports, as JSON, or "".
    Raises UserError where nothing is left, or `out` cannot be written.
    """
    cases = list(configs(folder, only, scale, topology))
    if not cases:
        raise UserError(f"no config of scale {scale!r} in {folder} names a slice and matches --only={only}")
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + "---|" * len(HEAD)
    seen: dict[str, str] = {}
    reports = {}
    for name, config in cases:
        trained = to_json({key: config.get(key) for key in ("stages", "order", "text", "mesh", "topology")})
        same = seen.setdefault(trained, name)
        start = time.perf_counter()
        if same != name:
            yield f"| {name} | | | is trained as {same} |" + " |" * (len(HEAD) - 4)
            continue
        try:
            reports[name] = plan(config, "nowhere", target(topology or config.topology), *_asked(name, config, only))
        except UserError as error:
            cells = [name, topology or config.topology, "", brief(error, 1000), *[""] * (len(HEAD) - 4)]
            yield "| " + " | ".join(cells) + " |"
            continue
        for kind in ("train", "sample"):
            for stage, found in reports[name][kind].items():
                yield "| " + " | ".join(_row(name, reports[name], kind, stage, found)) + " |"
        reports[name]["seconds"] = time.perf_counter() - start
        if out:
            try:
                Path(out).write_text(json.dumps(reports, indent=1))
            except OSError as error:
                raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def configs(folder: str, only: str, scale: str, topology: str = "") -> Iterator[tuple[str, Any]]:
    """(name, config) of those that have the scale, and a slice; UserError for a folder without configs."""
    files = sorted(path for path in Path(folder).glob("*.py") if not path.name.startswith("_"))
    if not files:
        raise UserError(f"there are no configs in {folder}; run this in a checkout of vgen, or set --configs=FOLDER")
    for path in files:
        module = runpy.run_path(str(path))
        if scale not in module.get("SCALES", ()):
            continue
        config = module["get_config"](scale)
        if any(_asked(path.stem, config, only)) and (topology or config.get("topology")):
            yield path.stem, config


def _asked(name: str, config: Any, only: str) -> tuple[list[str], list[str]]:
    """The stages whose training, and whose sampling, match."""
    drawn = (config.get("generate") or {}).get("stages", ())
    trained = [stage for stage in config.order if re.search(only, f"{name}/{stage}")]
    return trained, [stage for stage in drawn if re.search(only, f"{name}/{stage}, sampled")]


def scaling(config: Any, stage: str, counts: Sequence[int] = (1, 2, 4, 8)) -> Iterator[str]:
    """Rows of a Markdown table: a stage's step on more and more devices of this machine, emulated, each of which has as
    many examples as one device alone: what a device computes, holds and sends.  Nothing is run, and no time is told.

    `data` has all of the parameters on each device, `fsdp` a part of them.
    """
    if stage not in config["order"]:
        raise UserError(f"there is no stage {stage!r}; {config['name']} has {', '.join(config['order'])}")
    yield "| mesh | batch | GFLOP a device | a device holds | " + " | ".join(COLLECTIVES) + " |"
    yield "|" + "---|" * (4 + len(COLLECTIVES))
    one = config["stages"][stage]["train"]["batch_size"]
    for axis in ("data", "fsdp"):
        for count in counts[axis == "fsdp" :]:  # one device alone is said once
            settings = {f"stages.{name}.train.batch_size": one * count for name in config["order"]}
            mesh = {"mesh": {"data": 1, axis: count}}
            found = plan(changed(config, settings | mesh), "nowhere", target(f"cpu:{count}"), [stage])["train"][stage]
            sent = [found["collectives"].get(kind) for kind in COLLECTIVES]
            cells = [size(each["bytes"]) if each else "" for each in sent]
            held = size(found["bytes"]["peak"])
            yield (
                f"| {axis} {count} | {one * count} | {found['flops'] / 1e9:,.2f} | {held} | " + " | ".join(cells) + " |"
            )


def _row(name: str, report: Mapping[str, Any], kind: str, stage: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The cells of a program: of a sampling one, no time is told beyond the roofline's of one call."""
    place = report["target"]
    memory = place.get("memory")
    yield from (name, f"{place['topology']} ({place['devices']})")
    yield " ".join(f"{axis} {ways}" for axis, ways in report["mesh"].items() if ways > 1) or "1"
    yield stage if kind == "train" else f"{stage}, sampled"
    counts = found.get("parameters")
    yield f"{counts['trained'] / 1e6:,.0f} + {counts['frozen'] / 1e6:,.0f} frozen" if counts else ""
    over = "" if found.get("fits", True) else ": TOO MUCH"
    yield size(found["bytes"]["peak"]) + (f" of {size(memory)}{over}" if memory else "")
    yield f"{found['flops'] / 1e9:,.0f}"
    yield size(sum(each["bytes"] for each in found["collectives"].values()))
    seconds = found.get("roofline")
    bound = max(("computing", "memory", "network"), key=seconds.get) if seconds else ""
    yield f"{seconds['step'] * 1e3:,.0f} ({bound})" if seconds else ""
    yield f"{found['images_per_second']:,.0f}" if "images_per_second" in found else ""
    yield f"{found['chip_hours']:,.0f}" if "chip_hours" in found else ""
    yield f"{found['compile_seconds']:.0f} s" + (f" at {level}" if (level := place.get("optimization_level")) else "")
