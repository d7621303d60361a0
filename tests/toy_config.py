"""Two stages of a toy on the embedded world, for tests that need a whole run: train, sample and resume in seconds."""

from ml_collections import ConfigDict


def get_config(scale: str = "short") -> ConfigDict:
    """short: 4 steps a stage.  long: 60 steps with a checkpoint every third, one stage, 6 MB of state."""
    if scale not in ("short", "long"):
        raise ValueError(f"toy_config.py: scale must be short or long, got {scale!r}")
    world = dict(source="scenes", size=16, options=dict(world=dict(max_objects=1), count=200))
    task = dict(target="tests.toy:Linear", noise=0.1)
    train = dict(steps=4, batch_size=4, optim=dict(main=dict(lr=0.05, b2=0.9)), ema_decay=0.9, log_every=1)
    held_out = dict(batches=2, options=dict(world=dict(max_objects=1), count=8), split="heldout")
    first = dict(
        task=dict(task), data=world, train=dict(train), groups=dict(main="(dense|fixed)/.*"), evaluate=held_out
    )
    first["train"]["groups"] = first.pop("groups")
    second = dict(task=dict(task), data=world, train=dict(train), init=dict(fixed=dict(stage="first", part="fixed")))
    config = dict(name="toy", scale=scale, seed=0, order=("first", "second"), stages=dict(first=first, second=second))
    config |= dict(
        mesh=dict(), text=dict(kind="bpe", length=8, vocab_size=260, path=""), prompts=("a red circle",),
        generate=dict(stages=("second",), batch_size=2, knobs=dict(second=dict(steps=2, guidance_scale=1.0))),
    )  # fmt: skip
    if scale == "long":
        first["task"]["width"] = 2**16
        first["train"] |= dict(steps=60, checkpoint_every=3)
        first["evaluate"] = {}
        config |= dict(order=("first",), stages=dict(first=first), text={}, generate={}, prompts=())
        first["data"]["text"] = False
    return ConfigDict(config)
