"""Train one config with every combination of some values of its keys: a grid.

    python launch/sweep.py --config=configs/muse.py:mini --workdir=runs/sweep --jobs=2 -- \\
      --config.stages.base.train.optim.main.lr=1e-3,2e-3 --config.seed=0,1

Behind -- stand flags of vgen.main.  Those of the form --config.KEY=A,B,... span the grid, all others go to every point;
commas inside brackets or quotes belong to a value.  Each point has a workdir of its own, named after its values.  A
point that has finished is not run again, so the same command goes on where it was stopped; after one that fails the
others still run.  sweep.json and sweep.csv in --workdir hold every point with the metrics of its eval.json.

Exit code 0, 1 if a point failed, 2 after a mistake of the caller (one sentence on stderr), 143 if stopped by a signal.
"""

import argparse
import csv
import hashlib
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

OPEN, CLOSE = "([{", ")]}"


class UserError(Exception):
    """A mistake of the caller, told in one sentence."""


@dataclass
class Point:
    """One combination: `flags` is what vgen.main gets; `state` is open, finished, failed, stopped or handed over."""

    name: str
    values: dict[str, str]
    flags: list[str]
    state: str = "open"
    code: int | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


# --- the grid


def split(text: str) -> list[str]:
    """The parts of `text` between commas outside of brackets and quotes; ValueError if one of these is left open."""
    parts, stack, quote, start = [], [], "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "'\"":
            quote = c
        elif c in OPEN:
            stack.append(CLOSE[OPEN.index(c)])
        elif c in CLOSE and (not stack or stack.pop() != c):
            raise ValueError(f"{c} closes nothing")
        elif c == "," and not stack:
            parts.append(text[start:i])
            start = i + 1
    if quote or stack:
        raise ValueError(f"{quote or stack[-1]} is missing")
    return [*parts, text[start:]]


def grid(flags: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The axes of the grid (key to values) and the flags that all points share."""
    axes, shared = {}, []
    for flag in flags:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", flag, re.S)
        if match is None:
            if re.match(r"--(config|workdir)\b(?!\.)", flag):
                raise UserError(f"{flag.partition('=')[0]} belongs ahead of --, the sweep sets it for every point")
            shared.append(flag)
            continue
        key, text = match.groups()
        try:
            values = split(text) if "," in text else [text]
        except ValueError as error:
            raise UserError(f"--config.{key}={text}: {error}") from None
        if len(values) == 1:
            shared.append(flag)
            continue
        if key in axes:
            raise UserError(f"--config.{key} is given twice")
        if not all(values) or len(set(values)) < len(values):
            raise UserError(f"--config.{key}={text} has an empty value, or one twice")
        axes[key] = values
    if not axes:
        raise UserError("nothing to sweep: give a key several values, such as --config.seed=0,1")
    return axes, shared


def short_names(keys: list[str]) -> dict[str, str]:
    """The last parts of each key, as many as it takes to tell them apart."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        names[key] = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)
    return names


def points(axes: dict[str, list[str]], shared: list[str], config: str, workdir: Path) -> list[Point]:
    """All combinations, the last key changing first."""
    short = short_names(list(axes))
    found = []
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        wanted = "_".join(f"{short[key]}={value}" for key, value in values.items())
        name = re.sub(r"[^\w.=+-]+", "-", wanted)
        if name != wanted or len(name) > 100:  # what was cut away still tells points apart
            name = f"{name[:90]}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        flags = [f"--config={config}", f"--workdir={workdir / name}", *shared, *overrides]
        found.append(Point(name, values, flags))
    return found


# --- what has happened so far


def measured(path: Path) -> dict[str, float] | None:
    """The numbers of an eval.json, names joined by dots; None where there is none that can be read."""

    def numbers(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from numbers(value, f"{prefix}{key}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield prefix + key, value

    try:
        return dict(numbers(json.loads(path.read_text()), ""))
    except (OSError, ValueError, AttributeError):
        return None


def recall(found: list[Point], workdir: Path, again: bool) -> None:
    """Take over from sweep.json and eval.json what is finished; UserError where a name stood for other flags."""
    try:
        old = {point["name"]: point for point in json.loads((workdir / "sweep.json").read_text())["points"]}
    except FileNotFoundError:
        old = {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {workdir}/sweep.json ({error}): use a new --workdir") from None
    for point in found:
        before = old.get(point.name, {})
        if before and before["flags"] != point.flags:
            raise UserError(f"{workdir / point.name} belongs to other flags: use a new --workdir")
        point.seconds = before.get("seconds")
        if settle(point, workdir):
            continue
        if before.get("state") == "finished" or before.get("state") == "handed over" and not again:
            point.state, point.code = before["state"], before["code"]


def settle(point: Point, workdir: Path) -> bool:
    """Whether the point has been measured; its metrics are taken over."""
    metrics = measured(workdir / point.name / "eval.json")
    if metrics is None:
        return False
    point.state, point.code, point.metrics = "finished", 0, metrics
    return True


def write(axes: dict[str, list[str]], found: list[Point], workdir: Path) -> None:
    """sweep.json and sweep.csv, each replaced at once."""
    names = list(dict.fromkeys(name for point in found for name in point.metrics))
    rows = [["name", "state", "seconds", *axes, *names]]
    for point in found:
        rest = [point.metrics.get(name, "") for name in names]
        rows.append([point.name, point.state, point.seconds, *point.values.values(), *rest])
    with (workdir / "sweep.csv.tmp").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    report = {"axes": axes, "points": [asdict(point) for point in found]}
    (workdir / "sweep.json.tmp").write_text(json.dumps(report, indent=1))
    for name in ("sweep.csv", "sweep.json"):
        (workdir / f"{name}.tmp").replace(workdir / name)


def table(axes: dict[str, list[str]], found: list[Point], wanted: list[str]) -> list[str]:
    """Aligned lines: values, state, and the metrics whose last part is in `wanted` (default: the first six)."""
    names = list(dict.fromkeys(name for point in found for name in point.metrics))
    names = [name for name in names if name.rpartition(".")[2] in wanted or name in wanted] if wanted else names[:6]
    short = short_names(list(axes))
    show = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    rows = [[*(short[key] for key in axes), "state", *names]]
    rows += [
        [*point.values.values(), point.state, *(show(point.metrics.get(name, "")) for name in names)] for point in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# --- running


class Stop:
    """Counts SIGTERM and SIGINT while inside."""

    def __enter__(self):
        self.count = 0
        self.before = {number: signal.signal(number, self._heard) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _heard(self, *_):
        self.count += 1

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def start(point: Point, command: list[str], workdir: Path) -> subprocess.Popen:
    """Start the point, its output going to NAME.log; in a session of its own, so that Ctrl-C reaches it only once."""
    with (workdir / f"{point.name}.log").open("a") as log:
        return subprocess.Popen(
            [*command, *point.flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def run(axes, found: list[Point], command: list[str], workdir: Path, jobs: int, hand_over: bool) -> bool:
    """Run all open points, `jobs` at once; whether it was stopped before the end."""
    waiting = [point for point in found if point.state == "open"]
    running: dict[subprocess.Popen, tuple[Point, float]] = {}
    told = 0
    with Stop() as stop:
        while running or waiting and not stop.count:
            while waiting and len(running) < jobs and not stop.count:
                point = waiting.pop(0)
                running[start(point, command, workdir)] = point, time.monotonic()
            if stop.count > told:  # the first signal asks vgen to save, the second one to end at once
                told = stop.count
                for process in running:
                    process.terminate()
            for process in [process for process in running if process.poll() is not None]:
                point, begun = running.pop(process)
                point.code, point.seconds = process.returncode, round(time.monotonic() - begun, 1)
                if not settle(point, workdir):
                    done = "handed over" if hand_over else "finished"
                    point.state = "stopped" if told else done if point.code == 0 else "failed"
                why = f" with code {point.code}, see {workdir / point.name}.log" if point.state == "failed" else ""
                print(f"{point.name}: {point.state}{why} after {point.seconds:.0f} s", flush=True)
                write(axes, found, workdir)
            time.sleep(0.1 if running else 0)
        return stop.count > 0


# --- the command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one sentence."""

    def error(self, message):
        raise UserError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """The sweep's own flags, and in `flags` those behind --."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="launch/sweep.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="configs/<system>.py[:scale]")
    parser.add_argument("--workdir", required=True, help="where the points' workdirs and the table go")
    parser.add_argument("--jobs", type=int, default=1, help="points at once (default: 1)")
    parser.add_argument("--launcher", help="hand each point to this, e.g. 'sbatch launch/slurm.sbatch --'")
    parser.add_argument("--again", action="store_true", help="hand over again what has no eval.json yet")
    parser.add_argument("--metrics", default="", help="names of metrics to print (default: the first six)")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the commands instead")
    at = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:at])
    options.flags = argv[at + 1 :]
    if options.jobs < 1:
        raise UserError(f"--jobs must be a positive number, got {options.jobs}")
    if "://" in options.workdir:
        raise UserError(f"--workdir must be a folder that this machine sees, got {options.workdir}")
    return options


def command_of(launcher: str | None) -> list[str]:
    """What is put in front of a point's flags."""
    if launcher is None:
        return [sys.executable, "-m", "vgen.main"]
    try:
        command = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher={launcher}: {error}") from None
    if not command or shutil.which(command[0]) is None:
        raise UserError(f"--launcher={launcher}: there is no such program here")
    return command


def sweep(options: argparse.Namespace) -> int:
    workdir = Path(options.workdir)
    axes, shared = grid(options.flags)
    found = points(axes, shared, options.config, workdir)
    command = command_of(options.launcher)
    if not Path(options.config.partition(":")[0]).is_file():
        raise UserError(f"there is no config file {options.config.partition(':')[0]}")
    recall(found, workdir, options.again)
    if options.dry_run:
        for point in found:
            if point.state == "open":
                print(shlex.join([*command, *point.flags]))
        return 0
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write(axes, found, workdir)
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror or error}") from None
    for point in found:
        if point.state != "open":
            print(f"{point.name}: {point.state} before", flush=True)
    stopped = run(axes, found, command, workdir, options.jobs, options.launcher is not None)
    write(axes, found, workdir)
    print("\n".join(table(axes, found, [name for name in options.metrics.split(",") if name])))
    print(f"written to {workdir / 'sweep.json'} and {workdir / 'sweep.csv'}")
    if stopped:
        print("launch/sweep.py: stopped; the same command goes on from there", file=sys.stderr)
        return 143
    return 1 if any(point.state == "failed" for point in found) else 0


def main(argv: list[str]) -> int:
    try:
        return sweep(parse(argv))
    except UserError as error:
        print(f"launch/sweep.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
