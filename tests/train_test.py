"""The training loop on tasks of one matrix: what is trained, averaged, skipped and counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy import Linear, Pair, Stream, fixed, settings, train
from vgen import state as states
from vgen import trees
from vgen.config import UserError, call
from vgen.train import Diverged, Hook, Stopped, TrainConfig, build_optimizers, make_step
from vgen.types import Context

ADAM = {"main": dict(lr=0.05)}


class Record:
    """A log that keeps what it is given."""

    def __init__(self):
        self.rows = []

    def start(self, *_): ...

    def tick(self, step): ...

    def finish(self): ...

    def scalars(self, step, values):
        self.rows.append((step, values))


class Counted:
    """Checkpoints that only note what is saved; restores nothing."""

    def __init__(self):
        self.saved = []

    def restore(self, *_):
        return None

    def save(self, step, state, batches):
        self.saved.append(step)

    def wait(self): ...


def poisoned(*steps):
    """A stream whose batches of these steps make Linear(poison=True) give NaN."""
    return Stream(change=lambda k, x: x + 1000 * (k in steps))


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_only_trained_parameters_have_gradients_and_optimiser_state():
    config = settings(optim=ADAM, ema_decay=0.9)
    state = train(Linear(), config)
    assert set(state.params) == {"dense/kernel", "dense/bias"} and set(state.buffers) == {"seen/batches"}
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [(8, 4), (4,)])
    assert set(state.ema) == set(state.params) | set(state.buffers)
    layout = states.Layout(Linear(), {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    assert layout.frozen == ["fixed/kernel"]
    step = make_step(Linear(), layout.groups, build_optimizers(config, ["main"])[0])
    new, metrics = step(state, fixed(), next(Stream()))
    assert set(new.params) == set(state.params) and set(metrics) >= {"loss", "noise", "grad_norm", "skipped"}


def test_it_learns_the_frozen_matrix():
    state = train(Linear(), settings(200, optim={"main": dict(lr=0.1)}))
    np.testing.assert_allclose(state.params["dense/kernel"], fixed()["fixed/kernel"], atol=0.05)
    assert int(state.step) == 200 and float(state.buffers["seen/batches"]) == 200


def test_groups_can_be_chosen_and_must_match_the_optimisers():
    state = train(Linear(), settings(1, groups={"main": "dense/kernel"}), given=fixed() | {"dense/bias": np.ones(4)})
    assert set(state.params) == {"dense/kernel"}
    with pytest.raises(UserError, match=r"one entry per optimiser group \['main'\], got \['gen'\]"):
        train(Linear(), settings(1, optim={"gen": dict(lr=1.0)}))
    with pytest.raises(UserError, match=r"train\.optim\.main\.lrr: .*did you mean 'lr'"):
        train(Linear(), settings(1, optim={"main": dict(lrr=1.0)}))


def test_one_summed_backward_gives_each_group_its_own_gradient(x64):
    task, sgd = Pair(), dict(lr=1.0, name="sgd", b1=0.0, kind="constant", moment_dtype="float64")
    config = settings(1, optim={"gen": sgd, "disc": sgd})
    layout = states.Layout(task, {"x": jax.ShapeDtypeStruct((8, 8), jnp.float64)})
    params = layout.pick(layout.trained, jax.random.key(0))
    batch = {"x": jnp.asarray(next(Stream())["x"], jnp.float64)}
    optimizers, _ = build_optimizers(config, list(layout.groups))
    opt = {name: tx.init({p: params[p] for p in layout.groups[name]}) for name, tx in optimizers.items()}
    zero = jnp.zeros((), jnp.int32)
    state = states.State(zero, params, {}, opt, {}, jax.random.key_data(jax.random.key(1)), zero, zero)
    new, metrics = make_step(task, layout.groups, optimizers)(state, {}, batch)
    for group, path in (("gen", "gen/kernel"), ("disc", "disc/kernel")):
        loss = lambda p: task.losses(trees.unflatten(p), Context(0), batch, None)[group].value  # noqa: B023
        grads = jax.grad(loss)(params)
        np.testing.assert_allclose(params[path] - new.params[path], grads[path], rtol=1e-12)
        np.testing.assert_allclose(metrics[f"grad_norm/{group}"], jnp.sqrt((grads[path] ** 2).sum()), rtol=1e-12)
        assert all(not grads[other].any() for other in grads if other != path)
    assert {"loss/gen", "loss/disc"} < set(metrics)
    leaky, _ = make_step(Pair(stop=False), layout.groups, optimizers)(state, {}, batch)
    assert abs(leaky.params["gen/kernel"] - new.params["gen/kernel"]).max() > 0.1  # this test can fail


def test_microbatches_add_up_to_the_batch():
    whole, split = (train(Linear(), settings(5, optim=ADAM, accumulate=n)) for n in (1, 4))
    for path in whole.params:
        np.testing.assert_allclose(split.params[path], whole.params[path], rtol=2e-5, atol=1e-6)
    assert float(split.buffers["seen/batches"]) == 5  # updates are averaged over microbatches, not added up
    noisy = [train(Linear(noise=1.0), settings(1, accumulate=n)).params["dense/bias"] for n in (1, 4)]
    assert abs(noisy[0] - noisy[1]).max() > 1e-4  # every microbatch has a key of its own


def test_ema_in_closed_form():
    seen = []
    hook = Hook(1, lambda step, state: seen.append(jax.device_get((state.params, state.buffers, state.ema))))
    train(Linear(), settings(6, optim=ADAM, ema_decay=0.3), hooks=[hook])
    fresh = train(Linear(), settings(1, optim={"main": dict(lr=0.0)})).params
    want = dict(jax.device_get(fresh), **{"seen/batches": 0.0})
    for step, (params, buffers, ema) in enumerate(seen):
        decay = min(0.3, (1 + step) / (10 + step))
        want = {path: decay * want[path] + (1 - decay) * value for path, value in (params | buffers).items()}
        for path in want:
            np.testing.assert_allclose(ema[path], want[path], rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    states_seen, log = [], Record()
    hook = Hook(1, lambda step, state: states_seen.append(jax.device_get(state)))
    config = settings(5, optim=ADAM, ema_decay=0.5, log_every=1)
    state = train(Linear(poison=True), config, batches=poisoned(2), hooks=[hook], log=log)
    before, after = states_seen[1], states_seen[2]
    for part in ("params", "buffers", "opt", "ema"):
        assert equal(getattr(before, part), getattr(after, part))
        assert not equal(getattr(after, part), getattr(states_seen[3], part))
    assert [int(s.skipped) for s in states_seen] == [0, 0, 1, 1, 1]
    assert [int(s.bad_in_row) for s in states_seen] == [0, 0, 1, 0, 0] and int(state.step) == 5
    assert [step for step, _ in log.rows] == [1, 2, 3, 4, 5]
    assert np.isnan(log.rows[2][1]["loss"]) and log.rows[2][1]["skipped"] == 1
    assert all(np.isfinite(row["loss"]) for i, (_, row) in enumerate(log.rows) if i != 2)


@pytest.mark.parametrize("log_every", [1, 0])
def test_too_many_in_a_row_end_the_run(log_every):
    config = settings(20, log_every=log_every, max_bad_steps=3)
    train(Linear(poison=True), config, batches=poisoned(4, 5, 7, 8))
    with pytest.raises(Diverged, match=r"not finite for 3 steps in a row .*lower the learning rate"):
        train(Linear(poison=True), config, batches=poisoned(*range(4, 20)))


def test_divergence_at_the_end_is_not_saved_as_a_result():
    checkpoints = Counted()
    with pytest.raises(Diverged):
        train(Linear(poison=True), settings(6, max_bad_steps=3), batches=poisoned(3, 4, 5), checkpoints=checkpoints)
    assert not checkpoints.saved


def test_frozen_parameters_need_a_source_and_keep_their_dtype():
    with pytest.raises(UserError, match=r"1 frozen parameters have no source \(e\.g\. fixed/kernel\).*`init`"):
        train(Linear(), settings(), given={})
    dtypes = []

    class Spy(Linear):
        def losses(self, params, ctx, batch, key):
            dtypes.append((params["fixed"]["kernel"].dtype.name, params["dense"]["kernel"].dtype.name))
            return super().losses(params, ctx, batch, key)

    train(Spy(), settings(1, frozen_dtype="bfloat16"))
    assert set(dtypes) == {("bfloat16", "float32")}


def test_given_values_start_trained_parameters():
    start = {"dense/kernel": np.full((8, 4), 3.0, np.float32), "seen/batches": np.float32(7)}
    state = train(Linear(), settings(1, optim={"main": dict(lr=0.0)}), given=fixed() | start)
    np.testing.assert_array_equal(state.params["dense/kernel"], start["dense/kernel"])
    assert float(state.buffers["seen/batches"]) == 8


def test_unknown_updates_and_wrong_groups_are_errors():
    with pytest.raises(ValueError, match=r"Loss\.updates has \['nowhere'\].*`buffers`"):
        train(Linear(unknown_update=True), settings(1))

    class Other(Linear):
        def losses(self, *args):
            return {"other": super().losses(*args)["main"]}

    with pytest.raises(ValueError, match=r"returned groups \['other'\], its groups are \['main'\]"):
        train(Other(), settings(1))


def test_a_run_is_a_function_of_its_seed():
    run = lambda seed: train(Linear(noise=1.0), settings(3), seed=seed)
    first, again, other = run(0), run(0), run(1)
    assert equal(first, again) and not equal(first.params, other.params)
    log = Record()
    train(Linear(noise=1.0), settings(3, log_every=1), log=log)
    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(3)]
    np.testing.assert_allclose(
        [row["noise"] for _, row in log.rows], [jax.random.normal(key) for key in keys], rtol=1e-6
    )


def test_hooks_checkpoints_and_logs_come_at_their_steps():
    seen, log, checkpoints = {}, Record(), Counted()
    note = lambda name: lambda step, state: seen.setdefault(name, []).append((step, int(state.step)))
    hooks = [
        Hook(3, note("third")),
        Hook(0, note("never")),
        Hook(0, note("last"), last=True),
        Hook(4, note("both"), True),
    ]
    config = settings(8, log_every=5, checkpoint_every=3)
    train(Linear(), config, hooks=hooks, log=log, checkpoints=checkpoints)
    assert seen == {"third": [(3, 3), (6, 6)], "last": [(8, 8)], "both": [(4, 4), (8, 8)]}
    assert [step for step, _ in log.rows] == [5, 8] and checkpoints.saved == [3, 6, 8]
    assert log.rows[0][1]["lr"] == pytest.approx(0.05) and log.rows[0][1]["images_per_second"] > 0


def test_stopping_finishes_the_step_logs_it_and_saves():
    log, checkpoints, calls = Record(), Counted(), iter([False, False, True])
    with pytest.raises(Stopped, match="stopped at step 3 of 8"):
        train(
            Linear(), settings(8, log_every=3), log=log, checkpoints=checkpoints, should_stop=lambda: next(calls)
        )  # fmt: skip
    assert checkpoints.saved == [3] and [step for step, _ in log.rows] == [3]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(steps=-1), "train: steps must be at least 0, got -1"),
        (dict(batch_size=0), "train: batch_size must be at least 1, got 0"),
        (dict(accumulate=3), "batch_size 8 does not divide into 3 microbatches"),
        (dict(ema_decay=1.0), r"ema_decay must be in \[0, 1\)"),
        (dict(frozen_dtype="int8"), "frozen_dtype must be float32, bfloat16 or float16, got 'int8'"),
        (dict(log_evry=1), "train.log_evry: TrainConfig does not take it; did you mean 'log_every'"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(UserError, match=message):
        call(TrainConfig, dict(steps=4, batch_size=8, optim=ADAM) | wrong, "train")
