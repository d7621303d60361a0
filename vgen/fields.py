"""What a config holds: of the whole run, of a stage, of where its weights come from, of how the system generates."""

import dataclasses
from typing import Any

from vgen.config import call

# A workdir belongs to one value of these; the name is kept beside them: a study measures the weights of another system.
RECORDED = ("scale", "seed", "stages", "order", "text")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage; with train.steps = 0 an imported one: `init` brings in every parameter, nothing is trained or saved.

    task: spec of the Task.  data: arguments of `vgen.data.open.open_pipeline`.  train: arguments of TrainConfig.
    init: {parameter prefix: arguments of InitConfig}.
    evaluate: data arguments that differ on held-out data, and "batches", how many to use ({} = no evaluation).
    cache: arguments of `vgen.features.CacheConfig`: what frozen encoders say is computed once ({} = in every step).
    make: spec of what makes the training data with the stages before, called with the `Run` once -> (examples, report):
      they are read in the place of the source, the report is `made.json` in the stage's folder ({} = `data` as it is).
    """

    task: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    init: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    evaluate: dict[str, Any] = dataclasses.field(default_factory=dict)
    cache: dict[str, Any] = dataclasses.field(default_factory=dict)
    make: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the parameters below a prefix come from: a stage trained before, or a weight file.

    stage: its name.  file: the weight file, or whatever else `reader` takes, such as a folder; here or in a bucket.
    part: the prefix there ("" = everything).  without: regex of top-level parts left out.
    reader: function of the file's path that returns parameters as they are named here; `vgen.convert.load:params` for
      published checkpoints.
    through: function of those parameters that returns others, which need not be all below the prefix.
    """

    stage: str = ""
    part: str = ""
    without: str = ""
    file: str | None = None
    reader: str = "vgen.convert.sources:read_weights"
    through: str = ""


@dataclasses.dataclass(frozen=True)
class Choose:
    """The best of several pictures is kept (Ramesh et al. 2021, section 2.6; Razavi et al. 2019, section 3.4).

    stage: the one that judges, by `score(params, conds) -> float [b]` of its task: Contrastive says how near a picture
      is to its text, Classify how likely its label.
    of: how many pictures are drawn for each prompt.
    """

    stage: str
    of: int = 8

    def __post_init__(self):
        if self.of < 1:
            raise ValueError(f"Choose: of must be at least 1, got {self.of}")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How a system generates.

    stages: names of the generating stages, in order; each gets what the ones before it returned.
    batch_size: pictures per call of a stage.  knobs: {stage: {knob of the task's `sample`: default}}.
    task: {stage: settings of its task that take the place of those it was trained with, such as another solver}.
    choose: arguments of Choose, {} for pictures as they come.
    """

    stages: tuple[str, ...]
    batch_size: int = 16
    knobs: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    task: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    choose: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def choice(self) -> Choose | None:
        return call(Choose, self.choose, "config.generate.choose") if self.choose else None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole config.

    name, scale: of the system.  seed: of everything random.  stages, order: the stages and their training order.
    text: arguments of `vgen.data.text.open_tokenizer` ({} = the system has no text).  mesh: arguments of make_mesh.
    generate: arguments of GenerateConfig ({} = the system does not generate).
    eval: spec of the system's evaluation, built and called with the `vgen.system.System`, or with the `Run` of what
      does not generate -> metrics ({} = none).
    prompts: what `--mode=train` draws at the end.  published: numbers from the paper; nothing reads them but tests.
    weights: folder of a published checkpoint, for configs whose paths refer to it; nothing else reads it.
    topology: the slice that the scale is made for, such as "v4:4x8x8", which `--mode=plan` takes where none is given.
    profile, profile_steps: write a trace of these steps of every stage's training, see `vgen.debug.Trace`.
    debug: see `vgen.debug`.
    """

    name: str
    scale: str
    seed: int
    stages: dict[str, Any]
    order: tuple[str, ...]
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    generate: dict[str, Any] = dataclasses.field(default_factory=dict)
    eval: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    published: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: str = ""
    topology: str = ""
    profile: bool = False
    profile_steps: tuple[int, int] = (11, 13)
    debug: bool = False
