"""What features know of classes: a linear probe and nearest neighbours, on features that are not trained for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int


def linear_probe(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, "m"],
    *,
    decay: float = 1e-4,
    iterations: int = 300,
) -> float:
    """Accuracy on the test features of multinomial logistic regression, fitted to the train features by L-BFGS.

    Every feature is standardised by the train features' mean and deviation first, as the batch norm without parameters
    does ahead of MAE's probe (He et al. 2021, appendix A.1).  decay: of half the squared weights, beside the mean
    cross-entropy.  iterations: at most; it ends earlier where the gradient's norm falls below 1e-5.
    Raises ValueError where a test label never occurs in training.
    """
    classes = int(train_labels.max()) + 1
    if missing := sorted(set(test_labels.tolist()) - set(train_labels.tolist())):
        raise ValueError(f"linear_probe: test labels {missing[:5]} never occur among the train labels")
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 1e-8, deviation, 1.0)
    x, y = jnp.asarray((train - mean) / deviation), jnp.asarray(train_labels)

    def loss(params):
        logits = x @ params["weight"] + params["bias"]
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return fit + 0.5 * decay * jnp.square(params["weight"]).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, i = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, i + 1

    def going(carry):
        _, state, i = carry
        return (i == 0) | ((i < iterations) & (optax.tree.norm(optax.tree.get(state, "grad")) > 1e-5))

    params = {"weight": jnp.zeros((x.shape[1], classes), x.dtype), "bias": jnp.zeros(classes, x.dtype)}
    params, _, _ = jax.jit(lambda p: jax.lax.while_loop(going, step, (p, solver.init(p), 0)))(params)
    logits = (test - mean) / deviation @ np.asarray(params["weight"]) + np.asarray(params["bias"])
    return float((logits.argmax(1) == test_labels).mean())


def knn(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, "m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour classifier of Wu et al. 2018 (arXiv:1805.01978, section 3.4), as
    DINO's protocol has it.

    Features are normalised here; each of the k nearest votes for its label with exp(cosine / temperature).
    Raises ValueError for a k that is not in 1..n.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"knn: k must be in 1..{len(train)}, the number of labelled features, got {k}")
    train, test = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, test))
    cosine = test @ train.T
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(test), int(max(train_labels.max(), test_labels.max())) + 1))
    weights = np.exp((np.take_along_axis(cosine, near, 1) - 1) / temperature)
    np.add.at(votes, (np.arange(len(test))[:, None], train_labels[near]), weights)
    return float((votes.argmax(1) == test_labels).mean())
