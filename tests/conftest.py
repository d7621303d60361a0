"""Shared set-up: compiled programs are kept for the session, x64 is opt-in per test, and one small trained run."""

import contextlib
import gc
import hashlib
import os
import runpy
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported, and for the processes that tests start: programs that were compiled once are read back.
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="vgen-xla-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# XLA's older code generator makes the same programs in three quarters of the time; newer versions have it no more.
if int(version("jaxlib").split(".")[1]) < 11 and "fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
SHARED = os.environ.setdefault("VGEN_TESTS_SHARED", tempfile.mkdtemp(prefix="vgen-runs-"))  # by all test processes

import jax  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def x64():
    """float64 arithmetic for the length of one test."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def quick_compilation():
    """Less optimised programs, for those that run twice: they are ready sooner."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_runs():
    """Give it a config's path for a `stages.Run` of scale tiny, trained for two steps a stage when first asked for.

    Muse goes through the command line, is drawn and measured; of the others the stages are trained and that is all.
    Configs with the same stages (the studies of one system) share what was trained first.
    """
    from vgen.config import to_json
    from vgen.fields import RECORDED
    from vgen.main import main
    from vgen.stages import Run

    made = {}

    def train(path: Path) -> Run:
        """In a folder of all test processes: the first one trains, the others wait for it."""
        config = runpy.run_path(str(path))["get_config"]("tiny")
        stages = to_json({name: config.get(name) for name in RECORDED})
        workdir = Path(SHARED) / hashlib.sha256(stages.encode()).hexdigest()[:16]
        done = workdir.with_suffix(".done")
        with FileLock(workdir.with_suffix(".lock")):
            run = Run(config, workdir) if done.exists() else trained(path, config, workdir)
            done.touch()
        return run

    def trained(path: Path, config, workdir: Path) -> Run:
        with quick_compilation():
            if path.stem == "muse":
                argv = [f"--config={path}:tiny", f"--workdir={workdir}", f"--compilation_cache={CACHE}"]
                assert main(["vgen", *argv]) == 0
                return Run(config, workdir)
            for stage in config.stages.values():
                stage.evaluate = {}
            run = Run(config, workdir)
            run.claim()
            for name in run.stages:
                run.train_stage(name)
        return run

    def get(path: Path) -> Run:
        if path not in made:
            made[path] = train(path)
        return made[path]

    return get


@pytest.fixture(scope="session")
def tiny_run(tiny_runs):
    """configs/muse.py:tiny, trained for two steps a stage, drawn and measured by the command line: a `stages.Run`."""
    return tiny_runs(ROOT / "configs" / "muse.py")


@pytest.fixture(scope="session")
def gs():
    """gs://runs, a bucket of an emulator in this process: the environment of those that use it, which is set here."""
    import logging
    import socket
    import socketserver
    import threading
    from http import HTTPStatus
    from http import server as http

    from gcp_storage_emulator import exceptions
    from gcp_storage_emulator import server as emulator

    one = threading.Lock()  # it is made for one request at a time

    def generations(handler):
        """What the emulator leaves out and tensorstore builds on: generations are told, conditions on them heeded."""

        def run(request, response, storage):
            name = request.params.get("object_id") or request.query.get("name", [""])[0]
            with one:
                try:
                    there = storage.get_file_obj(request.params.get("bucket_name", ""), name)["generation"]
                except exceptions.NotFound:
                    there = "0"
                response["x-goog-generation"] = there
                if request.query.get("ifGenerationMatch", [there])[0] != there:
                    response.status = HTTPStatus.PRECONDITION_FAILED
                elif request.query.get("ifGenerationNotMatch", [""])[0] == there:
                    response.status = HTTPStatus.NOT_MODIFIED
                else:
                    handler(request, response, storage)

        return run

    for _, handlers in emulator.HANDLERS:
        handlers.update({method: generations(handler) for method, handler in handlers.items()})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="runs")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # each file that is looked for and not there
    http.HTTPServer = http.ThreadingHTTPServer  # a client that says nothing would keep the others waiting
    socketserver.TCPServer.handle_error = lambda *_: None  # each client that hangs up
    server.start()
    where = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
        "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",
    }
    where["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # of buckets with folders
    os.environ.update(where)
    yield where
    server.stop()


# Tests that compile for long: second variants of a family, bfloat16, recomputation, gradients that reach every
# parameter of networks held to an oracle elsewhere.  `-m slow` runs them.
TOLD_TWICE = tuple(
    """
    bench/bf16_test.py::test_bfloat16[KL autoencoder]
    bench/bf16_test.py::test_bfloat16[SAM]
    bench/bf16_test.py::test_bfloat16[VQ-GAN decoder]
    bench/bf16_test.py::test_bfloat16[VQ-GAN encoder]
    bench/bf16_test.py::test_bfloat16[dVAE]
    bench/compile_test.py::test_every_case_can_be_called[Stable Diffusion 2.1 U-Net]
    bench/compile_test.py::test_every_case_can_be_called[Stable Diffusion XL U-Net]
    colabs_test.py::test_diffusion_runs
    colabs_test.py::test_encoders_run
    configs_test.py::test_no_group_has_a_gradient_in_another[vqgan]
    configs_test.py::test_two_steps_of_every_stage[amused]
    configs_test.py::test_two_steps_of_every_stage[dalle]
    configs_test.py::test_two_steps_of_every_stage[maskgit]
    configs_test.py::test_two_steps_of_every_stage[stable_diffusion]
    configs_test.py::test_two_steps_of_every_stage[vqgan]
    convert/amused_test.py::test_against_diffusers_in_float32[odd]
    convert/load_test.py::test_memory_is_the_model_and_little_more[bfloat16-1]
    convert/load_test.py::test_memory_is_the_model_and_little_more[float32-8]
    convert/lora_unet_test.py::test_diffusers_in_and_out[sdxl
    convert/sam_test.py::test_against_transformers_in_float32[windows that do not divide the map]
    convert/unet_diffusers_test.py::test_against_diffusers_in_float32[sdxl]
    convert/vqgan_test.py::test_against_diffusers[as aMUSEd-float32
    engine_test.py::test_the_stages_of_the_config
    layers/transformer_test.py::test_dropout_needs_train
    layers/transformer_test.py::test_remat_and_unroll_change_nothing
    layers/transformer_test.py::test_tokens_may_come_in_blocks[blocks1
    metrics/encoder_eval_test.py::test_a_tiny_encoder_is_measured[mae
    metrics/text_edit_eval_test.py::test_guidance
    models/blip_test.py::test_gradients_reach_all_parameters
    models/clip_test.py::test_resnet_float32_and_image_size
    models/inception_test.py::test_other_sizes_without_resizing_against_torch
    models/pixart_test.py::test_layers_count_through_both_stacks[2]
    models/qformer_test.py::test_learned_queries_and_gradients
    models/sam_test.py::test_gradients_reach_all_but_the_gaussian
    models/unet_test.py::test_half_precision
    models/unet_test.py::test_recomputation
    models/uvit_test.py::test_bfloat16_compute
    models/uvit_test.py::test_every_parameter_gets_a_gradient
    models/vit_test.py::test_it_trains_with_everything_on
    models/vqgan_test.py::test_every_parameter_gets_a_gradient[maskgit]
    models/vqgan_test.py::test_every_parameter_gets_a_gradient[taming]
    models/vqgan_test.py::test_remat_changes_nothing
    models/vqgan_test.py::test_shapes_and_tokens[taming]
    tasks/amused_test.py::test_the_same_tokens_and_pictures_as_the_pipeline[prompts1
    tasks/amused_test.py::test_the_same_tokens_and_pictures_as_the_pipeline[prompts2
    tasks/autoencode_test.py::test_relaxed_tokens_are_trained_by_the_bound[0
    tasks/autoencode_test.py::test_relaxed_tokens_are_trained_by_the_bound[75
    tasks/autoencode_test.py::test_relaxed_tokens_are_trained_by_the_bound[999
    tasks/autoregressive_test.py::test_the_loss_starts_near_uniform_and_reaches_the_network_alone[classes]
    tasks/autoregressive_test.py::test_the_loss_starts_near_uniform_and_reaches_the_network_alone[nothing]
    tasks/contrastive_test.py::test_pictures_of_any_size_are_judged_by_their_text
    tasks/segment_test.py::test_remat_is_of_the_rounds
    tasks/segment_test.py::test_what_clip_says_takes_the_place_of_the_first_prompt
    tasks/tokens_test.py::test_loss_starts_near_uniform_and_training_text_matters[superres]
    """.strip().split("\n    ")
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(TOLD_TWICE):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session):
    """What has been imported stays: a collector that looks through it again and again takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
