"""How fast vgen's networks are beside the PyTorch ones they replace: same weights, inputs and machine, float32."""

import functools
import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vgen.config import UserError
from vgen.convert import dit, families, formats, load
from vgen.convert.sources import Source

Inputs = dict[str, np.ndarray]


class Case(NamedTuple):
    """One row of the table.

    name: what is measured.  goal: how many times as fast as the reference vgen should be.
    family: "vgen.convert.module:NAME".  reference: "package:Class" of transformers or diffusers, in its published size
      by `config`, the class's or its config class's arguments.
    inputs: numpy Generator -> keyword arguments of the module's method.  method: of the linen module.
    theirs: (torch module, inputs) -> numpy array in vgen's axis order; by default the one output of the family's
      `compare`.  ours: what the method returned -> the array to compare.  prepare: of the torch module, once.
    forward: (torch module, inputs) -> its output as a tensor.  With it the row is a step of training: output, gradients
      of its mean square, AdamW; what is compared is that loss and the norm of the gradients.
    """

    name: str
    goal: float
    family: str
    reference: str
    config: Mapping[str, Any]
    inputs: Callable[[np.random.Generator], Inputs]
    method: str = "__call__"
    theirs: Callable[[Any, Inputs], np.ndarray] | None = None
    ours: Callable[[Any], Any] = lambda result: result
    prepare: Callable[[Any], Any] = lambda module: module
    forward: Callable[[Any, Inputs], Any] | None = None


def texts(vocab: int, batch: int, length: int) -> Callable[[np.random.Generator], Inputs]:
    """Inputs of a text encoder: random tokens, none of them padding."""
    return lambda rng: dict(
        tokens=rng.integers(1, vocab, (batch, length)).astype(np.int32), mask=np.ones((batch, length), bool)
    )


def normal(name: str, *shape: int) -> Callable[[np.random.Generator], Inputs]:
    """One input of random numbers: images, or latents."""
    return lambda rng: {name: rng.standard_normal(shape, np.float32)}


def noisy(rng: np.random.Generator, size: int, batch: int = 2) -> Inputs:
    """Latents of `size` places a side, and their times."""
    t = np.linspace(300, 700, batch).astype(np.int32)
    return dict(x=rng.standard_normal((batch, size, size, 4), np.float32), t=t)


def classes(size: int, batch: int) -> Callable[[np.random.Generator], Inputs]:
    """Inputs of a denoiser of latents that is told a class of a thousand."""
    return lambda rng: noisy(rng, size, batch) | dict(labels=rng.integers(0, 1000, batch).astype(np.int32))


def latents(
    size: int, length: int, width: int, mask: bool = False, batch: int = 2
) -> Callable[[np.random.Generator], Inputs]:
    """Inputs of a denoiser of latents that is told of a text."""

    def inputs(rng):
        seen = dict(context_mask=np.ones((batch, length), bool)) if mask else {}
        return noisy(rng, size, batch) | dict(context=rng.standard_normal((batch, length, width), np.float32)) | seen

    return inputs


def _torch(x: np.ndarray) -> Any:
    """A torch tensor, of a map [b, h, w, c] with channels first."""
    import torch

    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x.astype(np.int64))


def _states(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x)


def _last(first) -> np.ndarray:
    """A torch map with channels last."""
    return first.numpy().transpose(0, 2, 3, 1)


def _one_embedding(module: Any) -> Any:
    """A DiTTransformer2DModel whose blocks share what embeds time and class, as the published weights do."""
    for block in module.transformer_blocks:
        block.norm1.emb = module.transformer_blocks[0].norm1.emb
    return module


VIT_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
CLIP_L = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
T5_LARGE = dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, vocab_size=32_128)
KL = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32,
          down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
UNET_30M = dict(block_out_channels=(96, 192, 288), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
                down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2)  # fmt: skip
DIT_S = dict(num_attention_heads=6, attention_head_dim=64, num_layers=12)
CASES = (
    Case("ViT-L/16, 8 images of 224 px", 1.5, "vgen.convert.vit:HF_VIT", "transformers:ViTModel", VIT_L,
         normal("images", 8, 224, 224, 3), ours=lambda out: out.tokens,
         theirs=lambda m, x: m(_torch(x["images"])).last_hidden_state.numpy()),
    Case("CLIP-L text, 8 x 77 tokens", 1.5, "vgen.convert.clip:HF_TEXT", "transformers:CLIPTextModel", CLIP_L,
         lambda rng: dict(tokens=rng.integers(1, 49_406, (8, 77)).astype(np.int32)), ours=lambda out: out.states,
         theirs=lambda m, x: m(_torch(x["tokens"])).last_hidden_state.numpy()),
    Case("SAM-B image encoder, 1024 px", 1.5, "vgen.convert.sam:HF", "transformers:SamModel", {},
         normal("pixels", 1, 1024, 1024, 3), "encode",
         lambda m, x: _last(m.vision_encoder(_torch(x["pixels"])).last_hidden_state)),
    Case("KL decoder, 512 px", 1.0, "vgen.convert.autoencoder:DIFFUSERS_KL", "diffusers:AutoencoderKL", KL,
         normal("z", 1, 64, 64, 4), "decode", lambda m, x: _last(m.decode(_torch(x["z"])).sample)),
    *(Case(f"Stable Diffusion 1.5 U-Net, 2 x {n} x {n}", 1.2, "vgen.convert.unet_diffusers:TEXT",
           "diffusers:UNet2DConditionModel", dict(cross_attention_dim=768), latents(n, 77, 768)) for n in (64, 32)),
    Case("DiT-XL/2, 2 x 32 x 32", 1.5, "vgen.convert.dit:DIFFUSERS", "diffusers:DiTTransformer2DModel", {},
         classes(32, 2), prepare=lambda m: _one_embedding(dit.as_authors(m))),
    Case("PixArt-alpha, 2 x 32 x 32", 1.5, "vgen.convert.pixart:DIFFUSERS", "diffusers:PixArtTransformer2DModel",
         dict(sample_size=32, caption_channels=4096, use_additional_conditions=False),
         latents(32, 120, 4096, mask=True)),
    Case("T5-large encoder, 8 x 128 tokens", 1.5, "vgen.convert.t5:T5", "transformers:T5EncoderModel", T5_LARGE,
         texts(32_128, 8, 128)),
    Case("training, U-Net of 30M, 8 x 32 x 32", 1.2, "vgen.convert.unet_diffusers:TEXT",
         "diffusers:UNet2DConditionModel", UNET_30M, latents(32, 77, 768, batch=8),
         forward=lambda m, x: m(_torch(x["x"]), _torch(x["t"]), _states(x["context"])).sample),
    Case("training, DiT-S/2, 8 x 32 x 32", 1.5, "vgen.convert.dit:DIFFUSERS", "diffusers:DiTTransformer2DModel",
         DIT_S, classes(32, 8), prepare=lambda m: _one_embedding(dit.as_authors(m)),
         forward=lambda m, x: m(_torch(x["x"]), _torch(x["t"]), _torch(x["labels"])).sample),
)  # fmt: skip


class Row(NamedTuple):
    """seconds: (vgen, reference), the fastest run of each.  error: of the outputs, relative to the largest value."""

    name: str
    seconds: tuple[float, float]
    goal: float
    error: float

    @property
    def ratio(self) -> float:
        return self.seconds[1] / self.seconds[0]


def table(only: str = "", runs: int = 5) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured; UserError if no case's name has `only` in it."""
    cases = [case for case in CASES if re.search(only, case.name)]
    if not cases:
        raise UserError(f"no case matches {only!r}; there are {', '.join(case.name for case in CASES)}")
    if runs < 1:
        raise UserError(f"--runs={runs}: must be at least 1")
    yield f"{'case':<40} {'vgen s':>9} {'torch s':>9} {'ratio':>7} {'goal':>6} {'error':>9}"
    for case in cases:
        row = measure(case, runs)
        ours, theirs = row.seconds
        yield f"{row.name:<40} {ours:9.3f} {theirs:9.3f} {row.ratio:7.2f} {row.goal:6.1f} {row.error:9.1e}"


def measure(case: Case, runs: int = 5) -> Row:
    """One case: both sides in turn, so that whatever else the machine does falls on both.

    Raises UserError if the outputs differ by more than 1e-3: then it is not the same network that is measured.
    """
    module, source = reference(case)
    inputs = case.inputs(np.random.default_rng(0))
    model, params = load.load_source(source, family=case.family)
    pair = _outputs if case.forward is None else _steps
    import torch

    with torch.inference_mode(case.forward is None):
        sides = pair(case, module, model, params, inputs)
        got, want = (side() for side in sides)  # compiles ours
        error = float(np.abs(got - want).max() / np.abs(want).max())
        if not error <= 1e-3:
            raise UserError(f"{case.name}: the outputs differ by {error:.1e} of the largest value")
        best = [float("inf")] * 2
        for _ in range(runs):
            for i, side in enumerate(sides):
                start = time.perf_counter()
                side()
                best[i] = min(best[i], time.perf_counter() - start)
    return Row(case.name, (best[0], best[1]), case.goal, error)


Sides = tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]


def _outputs(case: Case, module: Any, model: Any, params: Any, inputs: Inputs) -> Sides:
    """Functions that give the outputs of both."""
    apply = jax.jit(lambda params, inputs: case.ours(model.apply({"params": params}, **inputs, method=case.method)))
    theirs = case.theirs or _only_output(families.get(case.family).compare)
    return lambda: np.asarray(apply(params, inputs)), lambda: theirs(module, inputs)


def _steps(case: Case, module: Any, model: Any, params: Any, inputs: Inputs) -> Sides:
    """Functions that take a step of training and give its loss and the norm of its gradients."""
    import torch

    settings = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    ours, theirs = optax.adamw(1e-4, **settings), torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.01)
    state = [jax.device_put(params), None]
    state[1] = ours.init(state[0])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, inputs):
        loss = lambda params: jnp.square(
            case.ours(model.apply({"params": params}, **inputs, method=case.method))
        ).mean()
        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = ours.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, jnp.stack([value, optax.global_norm(gradients)])

    def take():
        *state[:], told = step(*state, inputs)
        return np.asarray(told)

    def take_torch():
        theirs.zero_grad()
        loss = case.forward(module, inputs).square().mean()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        theirs.step()
        return np.asarray([loss.item(), norm.item()])

    return take, take_torch


def reference(case: Case) -> tuple[Any, Source]:
    """(the PyTorch network with random weights, in eval mode; the same weights as an open checkpoint)."""
    package, _, name = case.reference.partition(":")
    try:
        import torch

        kind = getattr(importlib.import_module(package), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{case.name} needs {error.name}: pip install {error.name}") from None
    torch.manual_seed(0)
    with torch.no_grad():
        module = (kind(kind.config_class(**case.config)) if package == "transformers" else kind(**case.config)).eval()
        module = case.prepare(module)
    config = module.config.to_dict() if package == "transformers" else dict(module.config)
    arrays = {key: formats.held(value.detach().numpy()) for key, value in module.state_dict().items()}
    return module, Source(Path(case.name), arrays, config)


def _only_output(compare: Callable[[Any, Inputs], Mapping[str, np.ndarray]]) -> Callable[[Any, Inputs], np.ndarray]:
    def theirs(module: Any, inputs: Inputs) -> np.ndarray:
        (output,) = compare(module, inputs).values()
        return output

    return theirs
