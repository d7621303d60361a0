"""The command that captions pictures, with a published captioner's folder at the size of a tiny one."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import CACHE, quick_compilation
from tests.convert import tables
from tests.tasks.caption_test import TEXT, VISION
from vgen.convert.pieces import pixels
from vgen.data import images, text
from vgen.main import main
from vgen.models.blip import MEAN, STD

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a red blue green circle square ring on and of the one two ##s".split()]
CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]("imported")
    stage, tower = config.stages.caption, dict(width=24, depth=2, heads=4)
    vision = dict(target="vgen.models.vit:ViT", **tower, mlp_dim=48, patch_size=8, image_size=16, eps=1e-5)
    decoder = dict(target="vgen.models.bert:Bert", vocab=40, **tower, mlp_dim=40, max_length=12, cross=True, head=True)
    stage.task.network = dict(target="vgen.models.blip:Captioner", vision=vision, decoder=decoder)
    stage.task.update(dict(size=16, start=38, end=3, length=9, least=5))
    stage.data.size, config.text.length, config.generate.batch_size, config.mesh = 16, 8, 2, dict()
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(weights, pictures, a config of them, the model)."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("blip")
    config = transformers.BlipConfig(text_config=TEXT | dict(sep_token_id=3, eos_token_id=3), vision_config=VISION)
    model = tables.randomize(transformers.BlipForConditionalGeneration(config)).eval()
    model.save_pretrained(folder / "weights")
    (folder / "weights" / "vocab.txt").write_text("\n".join(WORDS))
    rng = np.random.default_rng(0)
    for i in range(3):
        images.save_png(folder / "pictures" / f"{i}.png", rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
    path = Path(__file__).parents[1] / "configs" / "blip.py"
    (folder / "config.py").write_text(CONFIG.format(path=str(path)))
    return folder, model


def run(folder, workdir, *argv):
    flags = [f"--config={folder}/config.py", f"--config.weights={folder}/weights", f"--workdir={workdir}"]
    with quick_compilation():
        return main(["vgen", *flags, "--mode=sample", f"--compilation_cache={CACHE}", *argv])


def test_a_folder_of_pictures_is_captioned(folder, tmp_path, capsys):
    folder, model = folder
    assert run(folder, tmp_path, f"--image={folder}/pictures") == 0
    said = capsys.readouterr().out.splitlines()
    assert said == (tmp_path / "samples" / "captions.txt").read_text().splitlines()
    pictures = np.stack([images.load(folder / "pictures" / f"{i}.png") for i in range(3)])
    x = ((pictures / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    ids = model.generate(pixels(model, x), num_beams=3, max_length=9, min_length=5).numpy()[:, 1:]
    want = text.Bert.load(folder / "weights").decode(ids)
    assert said == [f"{i}.png: {caption}" for i, caption in enumerate(want)]


@pytest.mark.parametrize(
    "argv, what",
    [([], "takes --image=PICTURE_OR_FOLDER alone"), (["--image=absent.png"], "absent.png")]
    + [(["--image=absent.png", "--prompt=a cat"], "takes --image=PICTURE_OR_FOLDER alone")],
)
def test_mistakes_are_one_sentence(folder, tmp_path, capsys, argv, what):
    assert run(folder[0], tmp_path, *argv) == 2
    assert what in capsys.readouterr().err


def test_word_pieces_against_transformers(folder):
    """BERT's, as a folder's vocab.txt has them; what is given back has no marks."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(folder[0] / "weights")
    ours = text.open_tokenizer("bert", 8, path=str(folder[0] / "weights"))
    said = ["a RED circle", "two rings,  and one blue squares", "", "the zebra"]
    want = theirs(said, padding="max_length", max_length=8, truncation=True)
    ids, mask = ours(said)
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, np.array(want["attention_mask"], bool))
    assert ours.tokenizer.decode([[38, 4, 5, 8, 17, 3, 9, 9]]) == ["a red circles"]
    with pytest.raises(FileNotFoundError, match="vocab.txt or tokenizer.json"):
        text.Bert.load(folder[0])
