"""The command line: python -m vgen.main --config=configs/muse.py[:scale] --workdir=DIR [--mode=train|sample|eval].

Every mistake of the caller ends as one sentence on stderr and exit code 2.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vgen.config import UserError

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file("config", flag_values=FLAGS, help_string="configs/<system>.py[:scale]")
flags.DEFINE_string("workdir", None, "where checkpoints, logs and pictures go", flag_values=FLAGS)
flags.DEFINE_enum("mode", "train", ["train", "sample", "eval"], "what to do", flag_values=FLAGS)
flags.DEFINE_string("stage", None, "only this stage (train); only up to this stage (sample)", flag_values=FLAGS)
flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated", flag_values=FLAGS)
flags.DEFINE_string("prompts", None, "a file with one prompt per line", flag_values=FLAGS)
flags.DEFINE_string("negative_prompt", "", "what the picture should not show", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of sampling", flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", None, "strength of guidance; 0 is off", flag_values=FLAGS)
flags.DEFINE_integer("steps", None, "sampling steps of the first stage", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("num_images", 1, "pictures per prompt", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the pictures (default: WORKDIR/samples)", flag_values=FLAGS)
flags.DEFINE_string("image", None, "a picture to edit", flag_values=FLAGS)
flags.DEFINE_string(
    "mask", None, "white where --image is to be made anew; without it: edit by text alone", flag_values=FLAGS
)
flags.DEFINE_string(
    "compilation_cache", "~/.cache/vgen/xla", "folder of compiled programs; '' = off", flag_values=FLAGS
)


def main(argv=None) -> int:
    """Run the command line and return its exit code: 0, or 2 after a mistake of the caller (one sentence on stderr)."""
    try:
        rest = FLAGS(list(sys.argv if argv is None else argv))
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: flags look like --name=value")
        if FLAGS.config is None or FLAGS.workdir is None:
            raise UserError("needs --config=configs/<system>.py and --workdir=DIR")
        return _run()
    except flags.Error as error:
        return _fail(str(error).strip().splitlines()[0])
    except UserError as error:
        return _fail(str(error))


def _fail(sentence: str) -> int:
    print(f"vgen: {sentence}", file=sys.stderr, flush=True)
    return 2


def _run() -> int:
    import jax

    from vgen.stages import Run

    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(FLAGS.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    run = Run(FLAGS.config, FLAGS.workdir)
    if FLAGS.mode == "train":
        run.claim()
        return _train(run)
    run.check()
    return _sample(run) if FLAGS.mode == "sample" else _evaluate(run)


def _train(run) -> int:
    """Train every stage that is not finished, then draw the config's prompts and measure."""
    from vgen.train import Stopped

    if FLAGS.stage is not None:
        run.stage(FLAGS.stage)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(130) if stop.is_set() else stop.set())
    begun = time.monotonic()
    for name in [FLAGS.stage] if FLAGS.stage else run.config.order:
        try:
            run.train_stage(name, should_stop=stop.is_set)
        except Stopped as stopped:
            print(f"stage {name} {stopped}; the same command goes on from there", file=sys.stderr)
            return 0
        if stop.is_set():
            print(f"stopped after stage {name}; the same command goes on from there", file=sys.stderr)
            return 0
        print(f"stage {name} finished after {time.monotonic() - begun:.0f} s", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if FLAGS.stage is None and run.config.generate:
        from vgen.stages import System

        system = System(run)
        _draw(run, system, list(run.config.prompts), Path(FLAGS.out or run.workdir / "samples"))
        if run.config.eval:
            return _evaluate(run, system)
    return 0


def _sample(run) -> int:
    import numpy as np

    from vgen.data import images
    from vgen.stages import System

    prompts = list(FLAGS.prompt)
    if FLAGS.prompts is not None:
        try:
            lines = Path(FLAGS.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompts={FLAGS.prompts}: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            "--mode=sample needs --prompt='...' (may be repeated) or --prompts=FILE with one prompt per line"
        )
    if FLAGS.mask is not None and FLAGS.image is None:
        raise UserError("--mask needs --image, the picture to edit")
    if FLAGS.stage is not None and FLAGS.stage not in (names := list(run.config.generate.get("stages", ()))):
        raise UserError(f"--stage={FLAGS.stage} does not generate; the generating stages are {', '.join(names)}")
    edit = {}
    if FLAGS.image is not None:
        edit["image"] = images.load(FLAGS.image)
    if FLAGS.mask is not None:
        edit["mask"] = np.asarray(images.load(FLAGS.mask)).mean(-1) > 127
        if edit["mask"].shape != edit["image"].shape[:2]:
            raise UserError(
                f"--mask is {edit['mask'].shape[::-1]}, --image is {edit['image'].shape[1::-1]} (width, height)"
            )
        if not edit["mask"].any():
            raise UserError("--mask has no white pixel: nothing would be made anew")
    _draw(run, System(run), prompts, Path(FLAGS.out or run.workdir / "samples"), **edit)
    return 0


def _draw(run, system, prompts, out: Path, **edit) -> None:
    """Write one PNG per picture and a grid with captions per stage; print where they are."""
    from vgen.data import images

    if not prompts:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out={out}: {error.strerror}") from None
    stages = system.names[: system.names.index(FLAGS.stage) + 1] if FLAGS.stage else None
    repeated = [prompt for prompt in prompts for _ in range(FLAGS.num_images)]
    results = system(
        repeated, seed=FLAGS.seed, negative=FLAGS.negative_prompt, stages=stages,
        guidance_scale=FLAGS.guidance_scale, steps=FLAGS.steps, **edit,
    )  # fmt: skip
    for stage, pictures in results.items():
        for i, picture in enumerate(pictures):
            images.save_png(out / f"{stage}_{i:04d}.png", picture)
        path = out / f"{stage}_grid.png"
        images.save_png(path, images.grid(pictures, columns=max(FLAGS.num_images, 4), captions=repeated))
        print(f"{len(pictures)} pictures of stage {stage} in {out}, together in {path}")
    (out / "prompts.txt").write_text("".join(prompt + "\n" for prompt in repeated), encoding="utf-8")


def _evaluate(run, system=None) -> int:
    """Measure the system as its config says, write eval.json and print the table."""
    from vgen.config import build
    from vgen.stages import System

    report = {"config": run.config.name, "scale": run.config.scale, "stages": {}}
    for name in run.config.order:
        path = run.folder(name) / "eval.json"
        if path.exists():
            report["stages"][name] = json.loads(path.read_text())
    if run.config.eval and run.config.generate:
        evaluation = build(run.config.eval, "config.eval")
        report |= evaluation(system or System(run))
    path = run.workdir / "eval.json"
    temporary = path.with_name("eval.json.tmp")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(path)
    for name, value in _rows(report):
        print(f"{name:<44} {value}")
    print(f"written to {path}")
    return 0


def _rows(report, prefix=""):
    for name, value in report.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield prefix + name, f"{value:.4f}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
