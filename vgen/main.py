"""The command line: python -m vgen.main --config=configs/muse.py[:scale] --workdir=DIR [--mode=train|sample|eval|plan].

Every mistake of the caller ends as one sentence on stderr and exit code 2.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vgen.bucket import Bucket, is_url
from vgen.config import UserError
from vgen.platform import start_over


def main(argv=None) -> int:
    """Run the command line and return its exit code: 0, or 2 after a mistake of the caller (one sentence on stderr).

    argv: the program's name and its flags (default: sys.argv).
    """
    try:
        return run(list(sys.argv if argv is None else argv))
    except UserError as error:
        print(f"vgen: {error}", file=sys.stderr, flush=True)
        return 2


def run(argv: list[str]) -> int:
    """As `main`, but a mistake of the caller is raised as UserError."""
    return _run(parse(argv))


def _flags(argv: list[str]) -> flags.FlagValues:
    """The flags that one command line may have, before they are parsed."""
    values = flags.FlagValues()
    # New keys are let in here because `vgen.config` checks every one against what reads it.
    config_flags.DEFINE_config_file(
        "config", flag_values=values, help_string="configs/<system>.py[:scale]; then --config.a.b=value",
        lock_config=False, accept_new_attributes=True, sys_argv=argv,
    )  # fmt: skip
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", None, "where checkpoints, logs and pictures go: a folder, gs:// or s3://", flag_values=values)
    flags.DEFINE_enum("mode", "train", ["train", "sample", "eval", "plan"], "what to do", flag_values=values)
    text("topology", None, "plan: the slice, v4:4x4x16 or (emulated) cpu:8; default: the config's", flag_values=values)
    text("stage", None, "only this stage (train); only up to this stage (sample)", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "a prompt, or the number of a class; may be repeated", flag_values=values)
    text("prompts", None, "a file with one prompt per line", flag_values=values)
    text("negative_prompt", "", "what the picture should not show", flag_values=values)
    number("seed", 0, "seed of sampling", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_float("guidance_scale", None, "strength of guidance; 0 is off", flag_values=values)
    number("steps", None, "sampling steps of the first stage", lower_bound=1, flag_values=values)
    number("num_images", 1, "pictures per prompt", lower_bound=1, flag_values=values)
    text("out", None, "folder for the pictures (default: WORKDIR/samples)", flag_values=values)
    text("image", None, "a picture to edit, of which the central square is taken; or to caption", flag_values=values)
    text("mask", None, "white where --image is to be made anew; without it: edit by text alone", flag_values=values)
    text("compilation_cache", "~/.cache/vgen/xla", "folder of compiled programs; '' = off", flag_values=values)
    number("cpu_devices", 1, "devices emulated on the processor, to try a mesh", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("help", False, "show this", flag_values=values)
    return values


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line; UserError for whatever is wrong with them or with the config file."""
    options = _flags(argv)
    sys.modules.pop("config_config", None)  # what ml_collections calls the file: another may have been loaded before
    try:
        rest = options(argv)
        if not hasattr(options.config, "items") and "config" in options and options["config"].present:
            raise TypeError(f"get_config() must return a ConfigDict, got {options.config!r}")
    except Exception as error:  # noqa: BLE001  a config file is a program, it fails in any way
        raise UserError(_parse_error(error, argv)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags look like --name=value")
    if options.help:
        print(f"{__doc__}\n{options.get_help(include_special_flags=False)}")
    elif options.config is None or options.workdir is None:
        raise UserError("needs --config=configs/<system>.py and --workdir=DIR")
    elif options.out is not None and is_url(options.out):
        raise UserError(f"--out={options.out} is no folder of this machine; a --workdir in a bucket has them, too")
    return options


def _parse_error(error: Exception, argv: list[str]) -> str:
    """One sentence about a command line that does not parse, a config that fails, or an override without its key."""
    spec = next((arg.partition("=")[2] for arg in argv if re.match(r"--?config=", arg)), "")
    path = spec.partition(":")[0]
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines() if line.strip()]
    if path and not Path(path).is_file():
        return f"there is no config file {path}"
    if "whilst parsing config file" in lines[0]:
        return f"--config={spec} fails: {lines[-1]}"
    if isinstance(error, flags.Error):
        return lines[0]
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    if isinstance(error, KeyError) and not inside:
        key = lines[0].strip("'\"")
        arg = next((arg for arg in argv if key in arg.partition("=")[0].split(".")), "an override")
        return " ".join([f"{arg}: the config has no {key!r} there.", *lines[1:]])
    return f"--config={spec} fails: {type(error).__name__}: {lines[-1]}"


def _run(options: flags.FlagValues) -> int:
    if options.help:
        return 0
    import jax

    from vgen.checkpoint import spare_tracebacks
    from vgen.stages import Run

    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(options.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if options.mode == "plan":
        return _plan(options)
    emulate_devices(options.cpu_devices)
    run = Run(options.config, options.workdir)
    if options.mode == "train":
        spare_tracebacks()
        run.claim()
        return _train(run, options)
    if jax.process_count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX listens for it there, but nothing is saved in these modes
    run.check()
    return _sample(run, options) if options.mode == "sample" else _evaluate(run)


def _plan(options: flags.FlagValues) -> int:
    """Print and write to WORKDIR/plan.json what the config takes on --topology; 3 where it does not fit."""
    from vgen import plan

    topology = options.topology or options.config.get("topology", "")
    if not topology:
        raise UserError("--mode=plan needs --topology, such as v4:4x4x16 or cpu:8: this config names no slice")
    if re.fullmatch(r"cpu:[1-9][0-9]{0,2}", topology):
        emulate_devices(int(topology.partition(":")[2]))
    target = plan.target(topology)
    report = plan.plan(options.config, options.workdir, target, [options.stage] if options.stage else [])
    for line in plan.lines(report):
        print(line, flush=True)
    report["fitting"] = {"train": {}, "sample": {}}
    for kind, fitting in report["fitting"].items():
        for name in (name for name, found in report[kind].items() if not found.get("fits", True)):
            print(f"{kind} {name}: looking for settings that fit", flush=True)
            found = fitting[name] = plan.fitting(options.config, options.workdir, name, target, kind)
            told = " ".join(f"--config.{path}={value}" for path, value in (found or {}).items())
            told = f"fits with {told}" if found else "none fits; take more or larger devices"
            print(f"{kind} {name}: {told}", flush=True)
    bucket = Bucket(options.workdir) if is_url(options.workdir) else None
    path = (bucket.folder if bucket else Path(options.workdir)) / "plan.json"
    try:
        plan.write(report, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    if bucket:
        bucket.send(path)
    return 0 if report["fits"] else 3


def emulate_devices(count: int) -> None:
    """Make `count` devices of the processor, to try a mesh; does nothing once JAX runs, or where XLA_FLAGS decides.

    More threads than devices, because XLA's collectives block a thread each: with as many of both a run can deadlock.
    """
    import jax

    if count == 1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    os.environ.setdefault("NPROC", str(4 * count))
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


@contextlib.contextmanager
def _should_stop():
    """A function that says whether SIGTERM or SIGINT has come; the second one ends the process.

    Of several processes it is enough that one gets it: all say so at the same call.  There JAX listens for SIGTERM, and
    its coordination service finds the call that none has made yet; the devices have no part in it.
    """
    import jax
    from jax.experimental import multihost_utils

    stop, calls, several = threading.Event(), itertools.count(1), jax.process_count() > 1

    def handle(*_):
        if stop.is_set():
            os._exit(130)
        stop.set()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def agreed():
        if not reached and multihost_utils.reached_preemption_sync_point(next(calls)):
            reached.append(True)
        return bool(reached)

    reached = []
    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield agreed if several else stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if several:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is saved from here on


def _train(run, options) -> int:
    """Train every stage that is not finished, then draw the config's prompts and measure."""
    from vgen.stages import tell
    from vgen.train import Stopped

    if options.stage is not None:
        run.stage(options.stage)
    names = [options.stage] if options.stage else run.config.order
    for name in names:
        if not run.train_config(name).steps:
            run.check_sources(name)  # before others have been trained in vain
    begun = time.monotonic()
    with _should_stop() as should_stop:
        for name in names:
            try:
                run.train_stage(name, should_stop=should_stop)
            except Stopped as stopped:
                tell(f"stage {name} {stopped}; the same command goes on from there")
                return 0
            if should_stop():
                tell(f"stopped after stage {name}; the same command goes on from there")
                return 0
            tell(f"stage {name} finished after {time.monotonic() - begun:.0f} s")
    if options.stage is not None:
        return 0
    system = None
    if run.config.generate:
        from vgen.system import System

        system = System(run)
        _draw(run, options, system, list(run.config.prompts))
    return _evaluate(run, system)


def _sample(run, options) -> int:
    import numpy as np

    from vgen.data import images
    from vgen.system import System

    if run.config.generate and getattr(run.sampler(list(run.config.generate["stages"])[-1]), "writes", False):
        return _caption(run, options)
    prompts = list(options.prompt)
    if options.prompts is not None:
        try:
            lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompts={options.prompts}: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            "--mode=sample needs --prompt='...' (may be repeated) or --prompts=FILE with one prompt per line"
        )
    if options.mask is not None and options.image is None:
        raise UserError("--mask needs --image, the picture to edit")
    if options.stage is not None and options.stage not in (names := list(run.config.generate.get("stages", ()))):
        raise UserError(f"--stage={options.stage} does not generate; the generating stages are {', '.join(names)}")
    edit = {}
    if options.image is not None:
        edit["image"] = images.load(options.image)
    if options.mask is not None:
        edit["mask"] = np.asarray(images.load(options.mask)).mean(-1) > 127
        if edit["mask"].shape != edit["image"].shape[:2]:
            raise UserError(
                f"--mask is {edit['mask'].shape[::-1]}, --image is {edit['image'].shape[1::-1]} (width, height)"
            )
        if not edit["mask"].any():
            raise UserError("--mask has no white pixel: nothing would be made anew")
    _draw(run, options, System(run), prompts, **edit)
    return 0


def _caption(run, options) -> int:
    """Print what the system tells of --image, or of all pictures in that folder; keep it in captions.txt."""
    import jax

    from vgen.data import images
    from vgen.system import System

    if options.image is None or options.prompt or options.prompts or options.mask:
        raise UserError(f"{run.config.name} captions pictures: --mode=sample takes --image=PICTURE_OR_FOLDER alone")
    given = Path(options.image)
    paths = sorted(path for path in given.iterdir() if path.is_file()) if given.is_dir() else [given]
    if not paths:
        raise UserError(f"--image={given}: the folder has no pictures")
    pictures = [images.load(path) for path in paths]
    told = System(run).write(pictures, seed=options.seed)
    if jax.process_index():
        return 0
    out = _folder(options.out or run.workdir / "samples")
    lines = [f"{path.name}: {caption}" for path, caption in zip(paths, told, strict=True)]
    (out / "captions.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    run.push()
    print("\n".join(lines))
    return 0


def _folder(out) -> Path:
    """The folder for what is made, which can be written to."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out={out}: {error.strerror or error}") from None
    return out


def _draw(run, options, system, prompts, **edit) -> None:
    """Write one PNG per picture and a grid with captions per stage; print where they are."""
    import jax

    from vgen.data import images

    if not prompts:
        return
    out = _folder(options.out or run.workdir / "samples")
    stages = system.names[: system.names.index(options.stage) + 1] if options.stage else None
    repeated = [prompt for prompt in prompts for _ in range(options.num_images)]
    with warnings.catch_warnings(record=True) as told:
        results = system(
            repeated, seed=options.seed, negative=options.negative_prompt, stages=stages,
            guidance_scale=options.guidance_scale, steps=options.steps, **edit,
        )  # fmt: skip
    if jax.process_index():
        return
    for message in dict.fromkeys(str(warning.message) for warning in told):
        print(f"vgen: {message}", file=sys.stderr, flush=True)
    for stage, pictures in results.items():
        for i, picture in enumerate(pictures):
            images.save_png(out / f"{stage}_{i:04d}.png", picture)
        path = out / f"{stage}_grid.png"
        images.save_png(path, images.grid(pictures, columns=max(options.num_images, 4), captions=repeated))
        print(f"{len(pictures)} pictures of stage {stage} in {run.shown(out)}, together in {run.shown(path)}")
    (out / "prompts.txt").write_text("".join(prompt + "\n" for prompt in repeated), encoding="utf-8")
    run.push()


def _evaluate(run, system=None) -> int:
    """Measure the system as its config says; write that and the stages' own scores to eval.json; print the table.

    A config that measures what another one trained writes to eval_<its name>.json.
    """
    import jax

    from vgen.config import build
    from vgen.system import System

    report = {"config": run.config.name, "scale": run.config.scale, "stages": {}}
    for name in run.config.order:
        path = run.folder(name) / "eval.json"
        if path.exists():
            report["stages"][name] = json.loads(path.read_text())
    if run.config.eval:  # of what generates with the `System` that does, of the others with the run
        evaluation = build(run.config.eval, "config.eval")
        report |= evaluation(system or (System(run) if run.config.generate else run))
    if jax.process_index():
        return 0
    name = run.config.name
    path = run.workdir / ("eval.json" if name == run.trainer else f"eval_{name}.json")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(path)
    run.push()
    for name, value in _rows(report):
        print(f"{name:<44} {value}")
    print(f"written to {run.shown(path)}")
    return 0


def _rows(report, prefix=""):
    for name, value in report.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield prefix + name, f"{value:.4f}" if isinstance(value, float) else value


if __name__ == "__main__":
    start_over()
    sys.exit(main())
