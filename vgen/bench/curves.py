"""Loss by compute: a U-Net beside DiT, told a class, and beside PixArt, told a text, on the same latents of scenes.

The networks of a pair see the same pictures, noise, objective and optimiser; each gets as many steps as the same number
of floating-point operations buys it, and a cosine over them.  Losses are of held-out pictures, by averaged weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vgen import recipes
from vgen.bench.flops import count, gradients
from vgen.data import scenes
from vgen.stages import Run

MINI = dict(
    size=32, vae="mini", eval_count=512, batch=64, flops=6e12, points=8, cached=60_000,
    unet=dict(widths=(64, 128), attention=(0, 1), blocks=1, heads=4, groups=8),
    transformer=dict(depth=4, width=128, heads=4, patch_size=1, unroll=4),
    encoder=dict(depth=0, width=128, heads=4, mlp_dim=256),
)  # fmt: skip
TINY = dict(
    size=16, vae="tiny", eval_count=8, batch=8, flops=1.0, points=1, cached=0,
    unet=dict(widths=(8, 8), attention=(0, 1), blocks=1, heads=2, groups=4),
    transformer=dict(depth=1, width=16, heads=2, patch_size=1, unroll=1),
    encoder=dict(depth=0, width=16, heads=2, mlp_dim=16),
)  # fmt: skip
SCALES = dict(mini=MINI, tiny=TINY)
TEXT = dict(length=20, vocab_size=512)
FOLDERS = {"class: U-Net": "unet_class", "class: DiT": "dit", "text: U-Net": "unet_text", "text: PixArt": "pixart"}


def config(scale: str, steps: Mapping[str, int]) -> dict[str, Any]:
    """Fields of RunConfig: an autoencoder and four networks in its latents.  steps: {name of FOLDERS: of training}."""
    s = SCALES[scale]
    vae = recipes.KL[s["vae"]]
    channels = vae["latent_channels"]
    classes = len(scenes.classes(scenes.World(**recipes.CLASSES), "pair"))
    unet = dict(target="vgen.models.unet:UNet", in_channels=channels, out_channels=channels, **s["unet"])
    shape = dict(in_channels=channels, out_channels=channels, sample_size=s["size"] // vae["patch"], **s["transformer"])
    width = s["encoder"]["width"]
    reader = dict(
        target="vgen.models.text:TextTransformer", length=TEXT["length"], vocab=TEXT["vocab_size"], **s["encoder"]
    )
    told = dict(text_encoder=reader, train_text=True)
    tasks = {
        "class: U-Net": dict(network=dict(unet, num_classes=classes + 1), classes=classes),
        "class: DiT": dict(network=dict(target="vgen.models.dit:DiT", num_classes=classes, **shape), classes=classes),
        "text: U-Net": dict(network=dict(unet, context_dim=width), **told),
        "text: PixArt": dict(network=dict(target="vgen.models.pixart:PixArt", context_width=width,
                                          null_tokens=TEXT["length"], **shape), **told),
    }  # fmt: skip
    flow = dict(schedule=dict(target="vgen.diffusion.schedules:rectified_flow"), prediction="flow", time_scale=1000.0,
                draw=dict(how="logit_normal", mean=1.4, std=1.2))  # fmt: skip
    stages = {}
    for name, task in tasks.items():
        by_class = name.startswith("class")
        settings = dict(steps=steps[name], batch=s["batch"], lr=3e-3, optim=dict(name="muon"),
                        eval_every=max(steps[name] // s["points"], 1))  # fmt: skip
        made = recipes.diffusion(
            FOLDERS[name], dict(size=s["size"], **flow, **task), settings=settings, vae=vae,
            world=recipes.CLASSES if by_class else recipes.TOLD, labels="pair" if by_class else "",
            eval_count=s["eval_count"], autoencoding=recipes.AUTOENCODING[s["vae"]], cached=s["cached"],
            vae_world=recipes.FREE,
        )["stages"]  # fmt: skip
        made[FOLDERS[name]]["data"]["text"] = not by_class
        stages = made | stages
    order = ("vae", *FOLDERS.values())
    return dict(name="curves", scale=scale, seed=0, stages=stages, order=order, text=recipes.bpe(**TEXT),
                mesh=dict(data=-1, fsdp=1, tensor=1))  # fmt: skip


def flops(run: Run, name: str) -> float:
    """Floating-point operations of one training step's loss and gradients, as XLA counts them before it optimises."""
    task, config, arguments = run.task(name), run.train_config(name), run.data_arguments(name, False)
    b, side, length = config.batch_size, arguments["size"], TEXT["length"]
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = dict(
        image=jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8), label=ints(b), text=ints(b, length),
        text_mask=jax.ShapeDtypeStruct((b, length), bool),
    )  # fmt: skip
    function, arguments = gradients(task, batch)
    return count(function, *arguments)


def study(workdir: str | Path, scale: str = "mini", budget: float = 1.0) -> dict[str, Any]:
    """Train all of them below `workdir` (what is there goes on) and return, and write to curves.json, for each network
    {"flops": of a step, "steps", "step_seconds", "curve": [[FLOPs spent, loss], ...]}.

    budget: factor on the FLOPs of a network.
    """
    dry = Run(config(scale, dict.fromkeys(FOLDERS, 1)), workdir)
    each = {name: flops(dry, folder) for name, folder in FOLDERS.items()}
    steps = {name: max(round(SCALES[scale]["flops"] * budget / each[name]), 2) for name in FOLDERS}
    run, found = Run(config(scale, steps), workdir), {}
    run.claim()
    for name in run.config.order:
        run.train_stage(name)
    for name, folder in FOLDERS.items():
        rows = [json.loads(line) for line in (run.folder(folder) / "metrics.jsonl").read_text().splitlines()]
        curve = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
        seconds = sorted(row["step_seconds"] for row in rows if "step_seconds" in row)
        found[name] = {
            "flops": each[name], "steps": steps[name], "step_seconds": seconds[len(seconds) // 2] if seconds else None,
            "curve": [[step * each[name], loss] for step, loss in sorted(curve.items())],
        }  # fmt: skip
    (run.workdir / "curves.json").write_text(json.dumps(found, indent=1))
    return found


def table(workdir: str, scale: str = "mini", budget: float = 1.0) -> Iterator[str]:
    """The lines of the table: loss at shares of the FLOPs that both networks of a pair were given."""
    found = study(workdir, scale, budget)
    shares = (0.25, 0.5, 0.75, 1.0)
    yield f"{'network':<14} {'GFLOP/step':>11} {'steps':>6} {'minutes':>8}" + "".join(
        f"{f'loss at {share:.0%}':>14}" for share in shares
    )
    for name, row in found.items():
        losses = []
        for share in shares:
            near = min(row["curve"], key=lambda point: abs(point[0] - share * row["curve"][-1][0]))
            losses.append(near[1])
        minutes = (row["step_seconds"] or float("nan")) * row["steps"] / 60
        yield f"{name:<14} {row['flops'] / 1e9:11.2f} {row['steps']:6d} {minutes:8.1f}" + "".join(
            f"{loss:14.4f}" for loss in losses
        )
