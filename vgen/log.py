"""Logging of a run: JSON lines, TensorBoard, picture grids and one progress bar; works without a terminal.

Of several processes the first one logs.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm


class Log:
    """Where a stage writes: `metrics.jsonl`, TensorBoard event files in `tensorboard/`, pictures in `pictures/`.

    folder: the stage's folder.  title: in front of the progress bar.  quiet: no bar and no lines (other hosts).
    written: called whenever something was.
    The bar goes to stderr; without a terminal a plain line is printed at most every ten seconds.
    """

    def __init__(self, folder: Path, title: str, quiet: bool = False, written: Callable[[], None] | None = None):
        self.folder, self.title, self.quiet = Path(folder), title, quiet
        self.bar = self._writer = None
        self._written = written or (lambda: None)
        self._last_line, self._printed, self._first, self._note = 0.0, -1, 0, ""

    def start(self, step: int, steps: int, batch_size: int) -> None:
        self.steps, self.batch_size = steps, batch_size
        self._begun, self._first = time.monotonic(), step
        if not self.quiet:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._keep_until(step)
            terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=steps, initial=step, desc=self.title, unit="step", disable=not terminal, dynamic_ncols=True,
                smoothing=0.1,
            )  # fmt: skip

    def tick(self, step: int) -> None:
        """Move the bar to `step`."""
        if self.quiet:
            return
        self.bar.update(step - self.bar.n if not self.bar.disable else 0)
        late = time.monotonic() - self._last_line > 10 or step == self.steps
        if self.bar.disable and late and step != self._printed:
            self._last_line, self._printed = time.monotonic(), step
            left = (self._last_line - self._begun) / max(step - self._first, 1) * (self.steps - step)
            print(
                f"{self.title}: step {step}/{self.steps}, {_clock(left)} left{self._note}", file=sys.stderr, flush=True
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one JSON line {"step": ..., name: value}; non-finite values become null."""
        if self.quiet:
            return
        clean = {name: (float(value) if math.isfinite(value) else None) for name, value in values.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
        writer = self._tensorboard()
        for name, value in clean.items():
            if value is not None:
                writer.add_scalar(name, value, step)
        shown = [name for name in values if name.startswith("loss")] + ["images_per_second"]
        shown = {name.replace("images_per_second", "img/s"): values[name] for name in shown if name in values}
        self._note = "".join(f", {name} {value:.4g}" for name, value in shown.items()) or self._note
        if self.bar is not None:
            self.bar.set_postfix_str(self._note.lstrip(", "), refresh=False)
        self.tick(step)
        self._written()

    def picture(self, step: int, name: str, image: np.ndarray) -> Path | None:
        """Write an uint8 [h, w, 3] picture to pictures/<name>_<step>.png and to TensorBoard."""
        if self.quiet:
            return None
        from vgen.data.images import save_png

        path = self.folder / "pictures" / f"{name}_{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, image)
        self._tensorboard().add_image(name, image, step, dataformats="HWC")
        self._written()
        return path

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _keep_until(self, step: int) -> None:
        """Drop lines of steps that a killed run logged after its last checkpoint: they will be taken again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
            if kept != lines:
                temporary = path.with_name("metrics.jsonl.tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                temporary.replace(path)

    def _tensorboard(self):
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # TensorBoard, too, forgets what a killed run logged beyond its checkpoint.
            purge = self._first + 1 if self._first else None
            self._writer = SummaryWriter(
                str(self.folder / "tensorboard"), flush_secs=30, purge_step=purge, filename_suffix=f".{time.time_ns()}"
            )
        return self._writer


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the last line of a killed process may be cut


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
