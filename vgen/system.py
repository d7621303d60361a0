"""Generate with a trained run: prompts in, pictures of every generating stage out; or pictures in, and texts out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgen import sharding, trees
from vgen.config import UserError, call
from vgen.data import images
from vgen.fields import GenerateConfig
from vgen.hosts import whole
from vgen.stages import Run

JUDGED = ("image_out", "text", "text_mask", "label")  # what a judge is told of a batch


class System:
    """The generating stages of a trained run, compiled once: prompt, seed, guidance and steps are traced.

    Results depend on (seed, place of the prompt in the list, generate.batch_size), not on devices.
    """

    def __init__(self, run: Run):
        self.run = run
        if not run.config.generate:
            raise UserError(f"{run.config.name} does not generate pictures: its config has no `generate`")
        self.settings = call(GenerateConfig, run.config.generate, "config.generate")
        self.names, self.batch_size = list(self.settings.stages), self.settings.batch_size
        self.params = {name: trees.unflatten(run.weights(name)[0]) for name in self.names}
        self.tasks = {name: run.sampler(name) for name in self.names}
        self._functions = {name: jax.jit(task.sample) for name, task in self.tasks.items()}
        self.choice = self.settings.choice
        if self.choice:
            judge = self.choice.stage
            self._judge = jax.jit(run.task(judge).score), trees.unflatten(run.weights(judge)[0])
        self.text = run.text_tokenizer()
        self.size = max(getattr(task, "size", 0) for task in self.tasks.values())
        self.classes = max(getattr(task, "classes", 0) for task in self.tasks.values())

    def knobs(self, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's sampling settings with the given ones (None = unset) on top; one that it has not is left out."""
        known = dict(self.settings.knobs.get(name, {}))
        dtypes = {key: jnp.int32 if isinstance(value, int) else jnp.float32 for key, value in known.items()}
        known |= {key: value for key, value in overrides.items() if key in known and value is not None}
        most = getattr(self.tasks[name], "max_steps", None)
        if not 1 <= known.get("steps", 1) <= (most or known.get("steps", 1)):
            raise UserError(f"steps of stage {name}: expected 1 to {most}, got {known['steps']}")
        return {key: jnp.asarray(value, dtypes[key]) for key, value in known.items()}

    def _check_overrides(self, overrides: Mapping[str, Any]) -> None:
        known = {knob for name in self.names for knob in self.settings.knobs.get(name, {})}
        unknown = sorted(key for key, value in overrides.items() if value is not None and key not in known)
        if unknown:
            raise UserError(
                f"no stage has the knob {unknown[0]!r}; config.generate.knobs has {', '.join(sorted(known))}"
            )

    def _edited(self, image: np.ndarray | None, mask: np.ndarray | None) -> dict[str, Any]:
        """Image and mask as conditions: their central square at the size of the largest stage, one per row."""
        conds = {}
        if image is not None:
            conds["image"] = images.resize(image, self.size)
        if mask is not None:
            white = np.repeat(np.uint8(255) * np.asarray(mask, np.uint8)[..., None], 3, -1)
            conds["mask"] = images.resize(white, self.size)[..., 0] > 16  # a pixel is new when any part of it is
        return {name: self._spread(np.broadcast_to(x, (self.batch_size, *x.shape))) for name, x in conds.items()}

    def _told(self, prompts: Sequence[str], negative: str) -> dict[str, Any]:
        """The conditions of all prompts, and one negative prompt for each: texts, or in a system without text labels.

        Where there are no classes either, labels of 0, which nothing reads.
        """
        if self.text is not None:
            names = ("text", "text_mask")
            told = dict(zip(names, self.text.prompts(list(prompts))))
            if negative:
                told |= dict(zip(("negative", "negative_mask"), self.text.prompts([negative] * len(prompts))))
            return told
        if negative:
            raise UserError(f"negative prompt {negative!r}: {self.run.config.name} has no text")
        if not self.classes:
            return {"label": np.zeros(len(prompts), np.int32)}
        for prompt in prompts:
            if not (re.fullmatch(r"\s*[0-9]+\s*", str(prompt)) and int(prompt) < self.classes):
                raise UserError(
                    f"prompt {prompt!r}: {self.run.config.name} takes the number of a class, 0 to {self.classes - 1}"
                )
        return {"label": np.array([int(prompt) for prompt in prompts], np.int32)}

    @staticmethod
    def batches(n: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
        """(`size` of n rows, how many of them are new), until all were new once; the last row fills up."""
        for start in range(0, n, size):
            yield np.arange(start, start + size).clip(max=n - 1), min(size, n - start)

    def _spread(self, x: np.ndarray) -> jax.Array:
        """A batch on the devices, split over as many of them as divide it."""
        return jax.device_put(x, sharding.batch_sharding(self.run.mesh, self.batch_size))

    def write(self, pictures: Sequence[np.ndarray], *, seed: int = 0, **overrides) -> list[str]:
        """What the last stage tells of each picture, uint8 [h, w, 3] of any sizes, which are made square.

        overrides: knobs (`generate.knobs`).  Raises UserError for one that no stage has, and for a system that makes
        no texts.
        """
        name, found = self.names[-1], []
        if not getattr(self.tasks[name], "writes", False):
            raise UserError(f"stage {name} of {self.run.config.name} makes pictures, it tells nothing of them")
        self._check_overrides(overrides)
        square = np.stack([images.resize(picture, self.size, "resize") for picture in pictures])
        with jax.set_mesh(self.run.mesh):
            for batch, (rows, new) in enumerate(self.batches(len(square), self.batch_size)):
                conds = {"image": self._spread(square[rows])}
                key = jax.random.fold_in(jax.random.key(seed), batch)
                made = self._functions[name](self.params[name], key, conds, **self.knobs(name, overrides))
                found += self.text.tokenizer.decode(whole(made["text_out"])[:new])
        return found

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        negative: str = "",
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        stages: Sequence[str] | None = None,
        of: int | None = None,
        **overrides,
    ) -> dict[str, np.ndarray]:
        """{stage: uint8 images [n, h, w, 3]}, one image per prompt, for every generating stage.

        prompts: texts; numbers of classes, such as "3", where the system has classes and no text; without either
        whatever there is one of for each picture.
        image: uint8 [h, w, 3] to edit, of which the central square is taken; mask: bool [h, w], True where it is to be
        made anew (None with an image: edit without a mask).  stages: only the first few.
        of: how many are drawn for each prompt, of which the best is kept (see `vgen.fields.Choose`); as
        `generate.choose` says by default, where that is empty 1.
        overrides: guidance_scale, steps, ... (`generate.knobs`); steps may be one number for the first stage or
        {stage: number}.
        Raises UserError for a knob that no stage has, for more steps than a stage can take, for a prompt that is no
        class, and for a choice where nothing judges.
        """
        usual = self.choice.of if self.choice else 1
        of = usual if of is None else of
        if of < 1 or (of > 1 and not self.choice):
            reason = "expected at least 1" if of < 1 else f"no stage judges the pictures of {self.run.config.name}"
            raise UserError(f"of={of}: {reason}; see generate.choose")
        self._check_overrides(overrides)
        edited, told = self._edited(image, mask), self._told(prompts, negative)
        results: dict[str, list[Any]] = {name: [None] * len(prompts) for name in (stages or self.names)}
        best = np.full(len(prompts), -np.inf)
        with jax.set_mesh(self.run.mesh):
            for batch, (rows, new) in enumerate(self.batches(len(prompts) * of, self.batch_size)):
                places = rows // of
                conds: dict[str, Any] = {name: self._spread(x[places]) for name, x in told.items()} | edited
                drawn = []
                key = jax.random.fold_in(jax.random.key(seed), batch)
                for i, name in enumerate(results):
                    chosen = dict(overrides)
                    steps = chosen.pop("steps", None)
                    chosen["steps"] = steps.get(name) if isinstance(steps, Mapping) else (steps if i == 0 else None)
                    knobs = self.knobs(name, chosen)
                    conds |= self._functions[name](self.params[name], jax.random.fold_in(key, i), conds, **knobs)
                    drawn.append(whole(conds["image_out"]))
                scores = self._scores(conds) if of > 1 else np.zeros(len(rows))
                for row, place in enumerate(places[:new]):
                    if scores[row] > best[place]:
                        best[place] = scores[row]
                        for pictures, each in zip(results.values(), drawn, strict=True):
                            pictures[place] = each[row]
        return {name: np.stack(pictures) for name, pictures in results.items()}

    def _scores(self, conds: Mapping[str, Any]) -> np.ndarray:
        """What the judge says of a batch; of one that it finds no number for, the least."""
        score, params = self._judge
        told = {name: conds[name] for name in JUDGED if name in conds}
        return np.nan_to_num(whole(score(params, told)).astype(np.float64), nan=-np.finfo(np.float64).max)
