"""Multi-stage systems: train the stages of a config in order, and load what they learned (`vgen.system` generates).

A stage is a task, its data, its training settings, and `init`: where parameters that it does not train come from.
"""

import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vgen import debug, features, sharding, trees
from vgen import state as states
from vgen.bucket import Bucket, is_url
from vgen.checkpoint import Checkpoints
from vgen.config import ConfigError, UserError, arguments, build, call, diff, resolve, to_dict, to_json
from vgen.data.cache import cache_source
from vgen.data.open import open_captions, open_pipeline
from vgen.data.text import open_tokenizer
from vgen.fields import RECORDED, GenerateConfig, InitConfig, RunConfig, StageConfig
from vgen.hosts import everyone, in_turn
from vgen.log import Log
from vgen.train import Hook, TrainConfig, build_optimizers, fit, place_frozen


class Run:
    """A config bound to a workdir and a mesh: builds tasks, opens data, finds weights.

    config: a ConfigDict or dict with the fields of RunConfig.  workdir: the run's folder, or the address of one in a
      bucket (see `vgen.bucket`), which is then `bucket`, and `workdir` the folder of this machine that stands for it.
    trainer: name of the config that the workdir was made by, known once it is claimed or checked.
    Raises ConfigError for a mistake in any stage, before any work is done.
    """

    def __init__(self, config, workdir: str | Path, devices=None):
        config = to_dict(config)
        self.config: RunConfig = call(RunConfig, config, "config")
        self.recorded = {name: config.get(name) for name in ("name", *RECORDED)}
        self.bucket = Bucket(str(workdir), warn=warn) if is_url(workdir) else None
        self.workdir = self.bucket.folder if self.bucket else Path(workdir)
        self.machines = len(set(everyone(os.uname().nodename)))
        if self.machines > 1 and self.bucket and not self.bucket.native:
            raise UserError(
                f"--workdir={workdir}: processes on {self.machines} machines need gs:// or a disk that all see, "
                "such as a mounted bucket"
            )
        self.trainer = self.config.name
        self.mesh = call(sharding.make_mesh, self.config.mesh | dict(devices=devices), "config.mesh")
        self.stages = {name: self._stage_config(name) for name in self.config.order}
        self._tasks, self._layouts, self._text, self.kept = {}, {}, None, {}
        self._check_config()

    def _stage_config(self, name: str) -> StageConfig:
        if name not in self.config.stages:
            raise ConfigError(f"config.order names stage {name!r}; config.stages has {', '.join(self.config.stages)}")
        return call(StageConfig, self.config.stages[name], f"config.stages.{name}")

    def _check_config(self) -> None:
        """ConfigError for what would otherwise come to light only when a later stage begins."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for name, stage in self.stages.items():
            where = f"config.stages.{name}"
            self._trace(name)
            train = self.train_config(name)
            if train.batch_size % ways:
                raise ConfigError(f"{where}.train.batch_size: {train.batch_size} does not divide over {ways} devices")
            if train.steps or train.optim:  # what is never trained needs no optimiser
                build_optimizers(train, list(train.groups or self.task(name).groups), f"{where}.train.optim")
            for held_out in (False, True):
                arguments(open_pipeline, self.data_arguments(name, held_out), f"{where}.data")
            for prefix, source in stage.init.items():
                self._init_config(name, prefix, source)
            features.check(self, name)
            if stage.make:
                build(stage.make, f"{where}.make")
        if self.config.eval:
            build(self.config.eval, "config.eval")
        if self.config.generate:
            generate = call(GenerateConfig, self.config.generate, "config.generate")
            for name in (*generate.stages, *generate.knobs, *generate.task):
                self.stage(name)
                self.sampler(name)
                accepted = inspect.signature(self.task(name).sample).parameters
                if unknown := sorted(set(generate.knobs.get(name, {})) - set(accepted)):
                    raise ConfigError(f"config.generate.knobs.{name}: the stage's `sample` has no knob {unknown[0]!r}")
            if generate.choice and not hasattr(self.task(generate.choice.stage), "score"):
                raise ConfigError(
                    f"config.generate.choose.stage: {generate.choice.stage!r} cannot judge pictures; a stage of "
                    "Contrastive or Classify can"
                )

    def _init_config(self, name: str, prefix: str, source: Mapping[str, Any]) -> InitConfig:
        where = f"config.stages.{name}.init.{prefix}"
        init = call(InitConfig, source, where)
        if bool(init.stage) == (init.file is not None):
            raise ConfigError(f"{where}: needs either 'stage' or 'file', got {sorted(source)}")
        if init.through:
            resolve(init.through)
        if init.stage and init.stage not in self.config.order[: self.config.order.index(name)]:
            raise ConfigError(f"{where}.stage: {init.stage!r} is not a stage before {name!r}")
        return init

    def stage(self, name: str) -> StageConfig:
        if name not in self.stages:
            raise UserError(f"there is no stage {name!r}; {self.config.name} has {', '.join(self.stages)}")
        return self.stages[name]

    def folder(self, name: str) -> Path:
        return self.workdir / name

    def checkpoints(self, name: str, *, read_only: bool = True, **settings) -> Checkpoints:
        """Those of a stage; settings: other arguments of `Checkpoints`."""
        return Checkpoints(self.folder(name), warn=warn, read_only=read_only, bucket=self.bucket, **settings)

    def train_config(self, name: str) -> TrainConfig:
        return call(TrainConfig, self.stage(name).train, f"config.stages.{name}.train")

    def task(self, name: str):
        if name not in self._tasks:
            self._tasks[name] = build(self.stage(name).task, f"config.stages.{name}.task")
        return self._tasks[name]

    def sampler(self, name: str):
        """A stage's task as it samples: with the settings of `generate.task`."""
        changed = self.config.generate.get("task", {}).get(name)
        if not changed:
            return self.task(name)
        spec, where = self.stage(name).task, f"config.generate.task.{name}"
        return build({key: value for key, value in spec.items() if key not in changed} | changed, where)

    def claim(self) -> None:
        """Make the workdir and record the config; UserError with a diff when it belongs to another config."""
        path = self.workdir / "config.json"
        try:
            with in_turn():
                self._pull(whole=True)
                self.workdir.mkdir(parents=True, exist_ok=True)
                (self.workdir / ".writable").touch()
                (self.workdir / ".writable").unlink(missing_ok=True)  # another host may have been here
                if not path.exists():
                    temporary = path.with_name("config.json.tmp")
                    temporary.write_text(to_json(self.recorded))
                    temporary.replace(path)
                self.push()
        except OSError as error:
            raise UserError(f"cannot write to the workdir {self.workdir}: {error.strerror or error}") from None
        self._check_recorded(path)

    def check(self) -> None:
        """UserError unless the workdir was made by this config; a new one is claimed where no stage is trained."""
        path = self.workdir / "config.json"
        with in_turn():
            self._pull()
        if not path.exists():
            if not any(self.train_config(name).steps for name in self.stages):
                return self.claim()
            raise UserError(f"{self.shown()} holds no run: train first with --mode=train --workdir={self.shown()}")
        self._check_recorded(path)

    def _check_recorded(self, path: Path) -> None:
        try:
            old = json.loads(path.read_text())
            self.trainer = old.pop("name")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot read {path} ({error}): use a new --workdir") from None
        new = json.loads(to_json(self.recorded))
        lines = diff(old, {name: new[name] for name in RECORDED})
        if lines:
            more = f"\n  (and {len(lines) - 12} more)" if len(lines) > 12 else ""
            raise UserError(
                f"{self.shown()} was made by another config; use another --workdir, or undo:\n  "
                + "\n  ".join(lines[:12]) + more
            )  # fmt: skip

    def shown(self, path: Path | None = None) -> str:
        """Where a file of the workdir is for the user; by default the workdir."""
        path = path or self.workdir
        return self.bucket.shown(path) if self.bucket else str(path)

    def push(self) -> None:
        """Copy to the bucket what is new in the workdir; UserError where that fails."""
        if self.bucket and jax.process_index() == 0:
            self.bucket.push()

    def _pull(self, whole: bool = False) -> None:
        """Bring what the bucket has of the run; whole: and nothing else stays (the first process decides)."""
        if not self.bucket:
            return
        if whole and jax.process_index() == 0:
            self.bucket.begin()
        else:
            self.bucket.pull()

    # ------------------------------------------------------------------------------------------------------- data

    def text_tokenizer(self):
        """The text tokenizer, trained on the corpus once if the config says so; None for systems without text."""
        if self._text is None and self.config.text:
            stage = self.stages[next(name for name in self.config.order if self.stages[name].data.get("text", True))]
            corpus = lambda: open_captions(**stage.data)
            given = dict(corpus=corpus, cache=self.workdir / "tokenizer.json")
            with in_turn():
                self._pull()
                self._text = call(open_tokenizer, self.config.text | given, "config.text")
                self.push()
        return self._text

    def batches(self, name: str, *, held_out: bool = False, cached: bool = False, **changed):
        """An endless iterator over device batches of a stage (held_out: one pass over its evaluation data).

        cached: of its features, which have been computed.  changed: other arguments of `open_pipeline`.
        """
        found = features.kept(self, name, held_out) if cached else None
        text = self.stage(name).data.get("text", True) and not (cached and "context" in found.keys)
        given = dict(tokenizer=self.text_tokenizer() if text else None, features=found)
        settings = self.data_arguments(name, held_out) | given | changed
        return call(open_pipeline, settings, f"config.stages.{name}.data")

    def data_arguments(self, name: str, held_out: bool) -> dict[str, Any]:
        """Arguments of `open_pipeline`, the text tokenizer left out."""
        stage, train = self.stage(name), self.train_config(name)
        settings = stage.data | (stage.evaluate if held_out else {})
        if stage.make and not (held_out and stage.evaluate):
            own = {"options", "split", "cached"}  # of the source that is replaced
            settings = {key: value for key, value in settings.items() if key not in own}
            settings["source"] = f"arrayrecord:{self.folder(name) / 'made'}"
        given = dict(
            batch_size=train.batch_size, seed=self.config.seed, cache_dir=self.workdir / "cache",
            sharding=sharding.batch_sharding(self.mesh), train=not held_out,
        )  # fmt: skip
        return {key: value for key, value in settings.items() if key not in ("batches", "text")} | given

    def layout(self, name: str, cached: bool = False) -> states.Layout:
        """The stage's parameters; cached: those that training on features takes."""
        if (name, cached) not in self._layouts:
            with self.batches(name, held_out=bool(self.stage(name).evaluate), cached=cached) as batches:
                batch = next(iter(batches))
            self._layouts[name, cached] = states.Layout(self.task(name), batch, self.train_config(name).groups)
        return self._layouts[name, cached]

    # ---------------------------------------------------------------------------------------------------- weights

    def given(self, name: str, parts=None) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """({path: array}, where it is from): what a stage's `init` brings in, of some parts or of all."""
        shapes, values, origin = self.layout(name).shapes, {}, {}
        for prefix, source in self.stage(name).init.items():
            wanted = trees.subtree(shapes, prefix)
            if not wanted:
                raise UserError(f"config.stages.{name}.init: {prefix!r} matches no parameter of the task")
            if prefix and parts is not None and prefix.split("/")[0] not in parts:
                continue
            flat, origin[prefix] = self._source(name, prefix, source)
            if source.get("through"):
                wanted = {path: leaf for path, leaf in wanted.items() if path in flat}
            trees.check_same(flat, wanted, f"stage {name}: init of {prefix!r} from {origin[prefix]}")
            values |= trees.add_prefix(flat, prefix)
        return values, origin

    def _source(self, name: str, prefix: str, source: Mapping[str, Any]):
        init = self._init_config(name, prefix, source)
        if not init.stage:
            if not init.file:
                where = f"config.stages.{name}.init.{prefix}.file"
                raise ConfigError(f"{where} is empty: name the weight file, e.g. --{where}=PATH")
            flat, origin = trees.flatten(resolve(init.reader)(init.file)), dict(source)
        else:
            flat, step = self.weights(init.stage)
            origin = {**source, "step": step}
        if init.without:
            flat = {path: leaf for path, leaf in flat.items() if not re.match(rf"({init.without})/", path)}
        flat = trees.subtree(flat, init.part)
        if init.through:
            flat = trees.flatten(resolve(init.through)(trees.unflatten(flat)))
        return flat, origin

    def check_sources(self, name: str) -> None:
        """ConfigError naming the parts of an imported stage that no `init` brings in; nothing is read yet."""
        prefixes = self.stage(name).init
        bare = [path for path in self.layout(name).shapes if not any(trees.subtree({path: 0}, p) for p in prefixes)]
        if bare:
            parts = ", ".join(dict.fromkeys(path.split("/")[0] for path in bare))
            raise ConfigError(
                f"config.stages.{name}: train.steps is 0, so its `init` must bring in every parameter; "
                f"without a source: {parts} ({len(bare)} parameters, e.g. {bare[0]})"
            )

    def weights(self, name: str) -> tuple[dict[str, jax.Array], int]:
        """All parameters of a trained stage (its own, averaged, and the frozen ones it used) and their step.

        Of an imported one: those that its `init` brings in, as config.frozen_dtype, and step 0.
        """
        layout, config = self.layout(name), self.train_config(name)
        if not config.steps:
            self.check_sources(name)
            return place_frozen(list(layout.shapes), self.given(name)[0], self.mesh, config), 0
        places = sharding.param_shardings(layout.shapes, self.mesh, config.rules, config.min_shard_size)
        checkpoints = self.checkpoints(name)
        found = checkpoints.weights(lambda path, _: places[path])
        checkpoints.close()
        if found is None:
            where = self.shown(self.folder(name))
            raise UserError(f"stage {name!r} has no checkpoint in {where}: train it with --mode=train --stage={name}")
        trained, step = found
        frozen = {}
        if layout.frozen:
            given, _ = self.given(name)
            frozen = {path: given[path] for path in layout.frozen}
        return {**frozen, **trained}, step

    # --------------------------------------------------------------------------------------------------- training

    def train_stage(self, name: str, should_stop=lambda: False) -> states.State | None:
        """Train one stage to its last step (continuing where it was) and return its state.

        Of an imported one, read its weights, so that whatever is missing or does not fit comes to light; gives None.
        """
        config, task = self.train_config(name), self.task(name)
        if not config.steps:
            self.weights(name)
            return None
        self._make(name)
        cached, empty = bool(self.stage(name).cache), features.build(self, name, should_stop)
        layout = self.layout(name, cached)
        given, origin = self.given(name, {path.split("/")[0] for path in layout.shapes})
        given |= empty
        quiet = jax.process_index() > 0
        log = Log(self.folder(name), name, quiet, self.bucket.push_soon if self.bucket else None)
        kept = dict(keep=config.keep, keep_every=config.keep_every, meta={"frozen": origin})
        checkpoints = self.checkpoints(name, read_only=False, **kept)
        key = jax.random.fold_in(jax.random.key(self.config.seed), self.config.order.index(name))
        hooks, around = self._hooks(name, config, given, log, cached), lambda step: step
        trace = self._trace(name)
        if self.config.profile:
            hooks.insert(0, Hook(1, trace))
        if self.config.debug:
            watch, around = debug.Watch(), debug.guarded
            task = watch(task)
            hooks.insert(0, Hook(1, watch.check))
        with self.batches(name, cached=cached) as batches:
            try:
                return fit(
                    task, config, batches, layout=layout, mesh=self.mesh, key=key, given=given, around=around,
                    checkpoints=checkpoints, log=log, should_stop=should_stop, hooks=hooks,
                )  # fmt: skip
            finally:
                trace.close()
                log.finish()
                checkpoints.close()
                self.push()

    def _trace(self, name: str) -> debug.Trace:
        return debug.Trace(self.folder(name) / "profile", *self.config.profile_steps)

    def _make(self, name: str) -> None:
        """Write a stage's training data, if it is one that makes them and has not done so."""
        spec, folder = self.stage(name).make, self.folder(name)
        if not spec or all(everyone((folder / "made" / "cache.json").is_file())):
            return
        examples, report = build(spec, f"config.stages.{name}.make")(self)
        with in_turn():
            if jax.process_index() == 0 or self.bucket:  # whose folder other machines do not see
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "made.json").write_text(json.dumps(report, indent=1))
                cache_source(examples, folder / "made")

    def _hooks(self, name: str, config: TrainConfig, given, log: Log, cached: bool) -> list[Hook]:
        task, layout, evaluate = self.task(name), self.layout(name, cached), self.stage(name).evaluate
        frozen = {path: given[path] for path in layout.frozen}
        tree = lambda state: trees.unflatten({**frozen, **state.averaged()})
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2**31 - 1)
        hooks = []
        if hasattr(task, "show") and evaluate:

            def show(step, state):
                with self.batches(name, held_out=True, cached=cached) as batches:
                    for title, picture in task.show(tree(state), next(iter(batches)), key).items():
                        log.picture(step, title, picture)

            hooks.append(Hook(config.sample_every, show, last=True))
        if evaluate:

            def measure(step, state):
                with self.batches(name, held_out=True, cached=cached) as batches:
                    some = (batch for _, batch in zip(range(evaluate.get("batches", 8)), batches))
                    metrics = task.evaluate(tree(state), some, key)
                log.scalars(step, {f"eval/{metric}": value for metric, value in metrics.items()})
                if step == config.steps and not log.quiet:
                    text = json.dumps({"step": step, **{k: float(v) for k, v in metrics.items()}}, indent=1)
                    (self.folder(name) / "eval.json").write_text(text)

            hooks.append(Hook(config.eval_every, measure, last=True))
        return hooks


def tell(sentence: str) -> None:
    """One line on stderr; of all processes the first says it."""
    if jax.process_index() == 0:
        print(sentence, file=sys.stderr, flush=True)


def warn(sentence: str) -> None:
    """A warning, told as `tell` does."""
    tell(f"warning: {sentence}")
