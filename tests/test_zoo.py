"""The cache of trained models, on a recipe that trains in no time; then the real models."""

import hashlib
import importlib
import io
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from lib.data import DIGIT_NAMES, digits, english_text
from lib.models import zoo
from lib.models.glyph_clip import glyph_clip, glyph_parts, name_words
from lib.models.two_tower import encode_names

RECIPE = '''
import os
from pathlib import Path
import torch
from {package}.parts import WIDTH, helper

SCALE = 2.0

def unused():
    return 1

def build():
    """Makes it."""
    return torch.nn.Linear(3, WIDTH)

def train(model, seed):
    # leaves a mark of each training
    with open(Path(__file__).parent / "trainings.log", "a") as log:
        log.write(f"{{seed}} {{torch.get_num_threads()}} {{torch.get_default_dtype()}}\\n")
    x = torch.rand(4, 3)
    model(x).sum().backward()
    model.weight.data += helper(SCALE) * torch.randn(WIDTH, 3)
    model.weight.grad = None
    return {{"seed": float(seed)}}
'''
PARTS = """
WIDTH = 2

def helper(scale):
    return inner(scale)

def inner(scale):
    return scale + 1

def unrelated():
    return 5
"""


class Recipe:
    """A package on disk that can be edited and imported again."""

    def __init__(self, folder, name):
        self.folder, self.name = folder / name, name
        self.folder.mkdir()
        (self.folder / "__init__.py").write_text("")
        (self.folder / "parts.py").write_text(PARTS)
        (self.folder / "recipe.py").write_text(RECIPE.format(package=name))

    def __call__(self, **options):
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.split(".")[0] == self.name]:
            del sys.modules[name]
        module = importlib.import_module(f"{self.name}.recipe")
        return zoo.cached("tiny", module.build, module.train, **options)

    def edit(self, file, old, new):
        text = (self.folder / file).read_text()
        assert old in text
        (self.folder / file).write_text(text.replace(old, new))

    @property
    def trainings(self):
        log = self.folder / "trainings.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGIT_BOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(tmp_path, monkeypatch, cache):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within the same second must be seen
    return Recipe(tmp_path, f"recipe_{tmp_path.name.replace('-', '_')}")


def same(one, two):
    return all(torch.equal(one.state_dict()[key], two.state_dict()[key]) for key in one.state_dict())


def test_trains_once_and_comes_back_the_same(recipe, cache):
    first, second = recipe(seed=3), recipe(seed=3)
    assert len(recipe.trainings) == 1
    assert same(first, second) and first.metrics == second.metrics == {"seed": 3.0}
    for model in (first, second):
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    module = sys.modules[f"{recipe.name}.recipe"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        by_hand = module.build()
        module.train(by_hand, 3)
    assert same(first, by_hand)
    (path,) = cache.glob("*.pt")
    assert path.name.startswith("tiny-") and path.stat().st_mode & 0o777 == 0o644
    assert {file.suffix for file in cache.iterdir()} == {".pt", ".lock"}  # nothing temporary is left


def test_seed_and_fingerprint_name_other_files(recipe, cache):
    models = [recipe(seed=0), recipe(seed=1), recipe(seed=0, fingerprint="x")]
    assert len(recipe.trainings) == len(list(cache.glob("*.pt"))) == 3
    assert not same(models[0], models[1]) and same(models[0], models[2])
    for seed in (-1, 1.0, True, None):
        with pytest.raises(ValueError, match="seed must be"):
            recipe(seed=seed)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("recipe.py", "helper(SCALE) *", "helper(SCALE) /"),  # training
        ("recipe.py", "Linear(3, WIDTH)", "Linear(3, WIDTH, bias=False)"),  # architecture
        ("recipe.py", "SCALE = 2.0", "SCALE = 3.0"),  # a constant
        ("parts.py", "WIDTH = 2", "WIDTH = 4"),  # an imported constant
        ("parts.py", "return scale + 1", "return scale + 2"),  # what an imported function calls
    ],
)
def test_a_change_of_the_code_trains_again(recipe, cache, file, old, new):
    recipe()
    recipe.edit(file, old, new)
    recipe()
    assert len(recipe.trainings) == len(list(cache.glob("*.pt"))) == 2


def test_other_changes_do_not(recipe, cache):
    first = recipe()
    recipe.edit("recipe.py", '"""Makes it."""', '"""Makes it anew."""  # well')
    recipe.edit("recipe.py", "return 1", "return 2")
    recipe.edit("recipe.py", "SCALE = 2.0", "\n\nSCALE   =   2.0  # a comment")
    recipe.edit("parts.py", "return 5", "return 6")
    assert same(recipe(), first)
    assert len(recipe.trainings) == len(list(cache.glob("*.pt"))) == 1


def test_hash_follows_modules_and_survives_cycles(recipe):
    recipe.edit(
        "recipe.py", f"from {recipe.name}.parts import WIDTH, helper", f"from {recipe.name} import parts"
    )
    recipe.edit("recipe.py", "WIDTH", "parts.WIDTH")
    recipe.edit("recipe.py", "helper(", "parts.helper(")
    recipe.edit("parts.py", "WIDTH = 2", f"from {recipe.name} import recipe\nWIDTH = 2")
    recipe.edit("parts.py", "return scale + 1", "return scale + (recipe is not None)")
    recipe()
    recipe.edit("parts.py", "return scale + (", "return scale + 2 * (")
    recipe()
    assert len(recipe.trainings) == 2


def test_a_recipe_needs_source():
    def build():
        return torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="top level of a module file"):
        zoo.code_hash(build)


class Explosion:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOSION"],)


def stored(content):
    """A file with a right checksum."""

    return content + hashlib.sha256(content).digest()


def saved(thing):

    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return stored(buffer.getvalue())


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "one bit": lambda content: content[:700] + bytes([content[700] ^ 1]) + content[701:],
    "not ours": lambda content: b"hello" * 100,
    "garbage with a checksum": lambda content: stored(b"hello" * 100),
    "a pickle that acts": lambda content: stored(pickle.dumps(Explosion())),
    "a torch file that acts": lambda content: saved({"state": {}, "metrics": {}, "more": Explosion()}),
    "no dictionary": lambda content: saved([1, 2]),
    "no metrics": lambda content: saved({"state": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}}),
    "other names": lambda content: saved({"state": {"weight": torch.zeros(2, 3)}, "metrics": {}}),
    "other shapes": lambda content: saved(
        {"state": {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, "metrics": {}}
    ),
    "other types": lambda content: saved(
        {"state": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2, dtype=torch.long)}, "metrics": {}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew_with_a_warning(recipe, cache, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("EXPLOSION", str(tmp_path / "executed"))
    first = recipe()
    (path,) = cache.glob("*.pt")
    content = path.read_bytes()
    damaged = DAMAGES[damage](content)
    path.write_bytes(damaged)
    with pytest.warns(UserWarning) as caught:
        second = recipe()
    (warning,) = caught
    message = str(warning.message)
    assert (
        str(path) in message
        and "made anew" in message
        and "delete the copy" in message
        and "\n" not in message
    )
    assert path.with_suffix(".damaged").read_bytes() == damaged  # nothing is lost
    assert same(first, second) and second.metrics == first.metrics
    assert len(recipe.trainings) == 2 and path.read_bytes() == content
    assert not (tmp_path / "executed").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe()
    assert len(recipe.trainings) == 2


def test_a_training_that_fails_leaves_no_file(recipe, cache):
    recipe.edit("recipe.py", "    x = torch", "    raise KeyboardInterrupt\n    x = torch")
    with pytest.raises(KeyboardInterrupt):
        recipe()
    assert not list(cache.glob("*.pt")) and not list(cache.glob("*.tmp"))


def test_the_callers_state_is_neither_read_nor_changed(recipe, cache):
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    plain = recipe()
    try:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        for again in range(2):  # trained, then loaded
            if not again:
                next(cache.glob("*.pt")).unlink()
            torch.manual_seed(again + 7)
            state = torch.get_rng_state()
            with torch.inference_mode(), torch.device("meta"):
                model = recipe()
            assert same(model, plain) and not model.weight.is_inference()
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == 2 and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    assert recipe.trainings == ["0 1 torch.float32"] * 2


def test_two_processes_train_once(recipe, cache, tmp_path):
    recipe.edit("recipe.py", "    x = torch", "    import time; time.sleep(0.8)\n    x = torch")
    code = f"""
import sys, time
sys.path.insert(0, {str(tmp_path)!r})
from lib.models import zoo
from {recipe.name} import recipe
print("ready", flush=True)
sys.stdin.readline()  # both start together
print(zoo.cached("tiny", recipe.build, recipe.train).weight.tolist())
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] and "[[" in outputs[0]
    assert len(recipe.trainings) == 1


# --- the real models, out of the cache that the chapters use


@pytest.mark.parametrize(
    "name, at_least", [("digits_mlp", 0.95), ("digits_cnn", 0.97), ("digits_clip", 0.97)]
)
def test_digits_models(name, at_least):
    model = getattr(zoo, name)()
    images, labels = digits((1200, 597), seed=0)[1]
    names = (encode_names(DIGIT_NAMES, model.tokenizer),) if name == "digits_clip" else ()
    logits = model(images, *names)
    measured = (logits.argmax(1) == labels).float().mean().item()
    assert measured == pytest.approx(model.metrics["test_accuracy"], abs=0.005)
    assert measured > at_least


def test_glyph_clip_names_held_out_letters():
    model = glyph_clip()
    (_, (images, labels)), letters = glyph_parts()
    assert images.shape == (60, 16, 4, 1, 14, 14) and len(letters) == 60
    logits = model(images[:, :, :1].flatten(0, 2), name_words(letters))
    measured = (logits.argmax(1) == labels[:, :, :1].flatten()).float().mean().item()
    assert measured == pytest.approx(model.metrics["test_accuracy"], abs=0.04) and measured > 0.8
    with pytest.raises(ValueError, match="letter"):
        name_words(["7"])


def test_char_gpt_beats_character_pairs_on_held_out_text():
    """The oracle is counting: the best that can be said from the preceding character alone."""
    model = zoo.char_gpt()
    tokens = model.tokenizer.encode(english_text())
    split = len(tokens) * 9 // 10
    train, held_out = tokens[:split], tokens[split:]
    size = len(model.tokenizer)
    counts = torch.bincount(train[:-1] * size + train[1:], minlength=size * size).view(size, size) + 0.1
    pairs = -(counts / counts.sum(1, keepdim=True)).log()[held_out[:-1], held_out[1:]].mean().item()
    assert 1.0 < model.metrics["held_out_nats"] < pairs - 0.5

    window = held_out[: 40 * 64 + 1]
    logits = model(window[:-1].view(40, 64))
    nats = -logits.log_softmax(-1).flatten(0, 1)[torch.arange(40 * 64), window[1:]].mean().item()
    assert nats == pytest.approx(model.metrics["held_out_nats"], abs=0.25)
    assert model.tokenizer.decode(model.tokenizer.encode("The “yield”")) == "The “yield”"
