"""Trained models that several chapters use.

Each is trained once, in seconds of one core, and cached as a file whose name carries a hash of its configuration
and of the code that defines its architecture, its data and its training. A missing file is made
anew, and so is a damaged one, which is set aside. The cache is the directory in the environment variable
LOGIT_BOOK_CACHE, by default `.cache/zoo` under the repository.

Every function returns the model, in eval mode and without gradients to its parameters, with `model.metrics`,
figures measured on held-out data, and, where it reads text, `model.tokenizer`.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

from lib.data import (
    DIGIT_NAMES,
    CharTokenizer,
    code_text,
    digits,
    english_text,
    random_windows,
    token_windows,
)
from lib.models.cnn import CNN
from lib.models.gpt import GPT
from lib.models.mlp import mlp
from lib.models.two_tower import TwoTower, encode_names
from lib.train.fit import accuracy, fit

DIGIT_PARTS = (1200, 597)


def digits_mlp(seed: int = 0) -> nn.Module:
    """An `mlp((64, 64, 32, 10))` for the digits, trained on the first part of `digits((1200, 597), seed=seed)`.

    `metrics["test_accuracy"]` was measured on the second part. It takes images, (n, 1, 8, 8) or (n, 64).
    """
    return cached("digits_mlp", _build_digits_mlp, _train_digits, seed=seed)


def digits_cnn(seed: int = 0) -> nn.Module:
    """A `CNN()` for the digits, trained on the first part of `digits((1200, 597), seed=seed)`.

    `metrics["test_accuracy"]` was measured on the second part. It takes images, (n, 1, 8, 8).
    """
    return cached("digits_cnn", _build_digits_cnn, _train_digits, seed=seed)


def digits_clip(seed: int = 0) -> nn.Module:
    """A `TwoTower` of the digits and their English names, trained on the first part of `digits((1200, 597), seed=seed)`.

    `metrics["test_accuracy"]` is that of naming the images of the second part. `model.tokenizer` knows the characters of
    the ten names; `lib.models.two_tower.encode_names(names, model.tokenizer)` is what the name tower takes.
    """
    return cached("digits_clip", _build_digits_clip, _train_digits_clip, seed=seed)


def char_gpt(seed: int = 0) -> nn.Module:
    """A `GPT` over characters, trained on the first nine tenths of `english_text()`.

    `metrics["held_out_nats"]` is the cross-entropy on the last tenth, in nats per character. `model.tokenizer` knows all
    characters of the text; the context is 64 characters.
    """
    text = hashlib.sha256(english_text().encode()).hexdigest()  # the text belongs to the Python version
    return cached("char_gpt", _build_char_gpt, _train_char_gpt, seed=seed, fingerprint=text)


def code_gpt(seed: int = 0) -> nn.Module:
    """A `GPT` as `char_gpt`, with its tokenizer, trained on the first nine tenths of `code_text()`.

    Characters that the English text does not hold are left out of the code. `metrics["held_out_nats"]` is the cross-entropy
    on the last tenth.
    """
    texts = hashlib.sha256((english_text() + code_text()).encode()).hexdigest()
    return cached("code_gpt", _build_char_gpt, _train_code_gpt, seed=seed, fingerprint=texts)


def _build_digits_mlp() -> nn.Module:
    return mlp((64, 64, 32, 10))


def _build_digits_cnn() -> nn.Module:
    return CNN()


def _train_digits(model: nn.Module, seed: int) -> dict[str, float]:
    train, test = digits(DIGIT_PARTS, seed=seed)
    epochs, batch_size = 30, 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * -(-len(train[0]) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    fit(
        model,
        lambda model, images, labels: F.cross_entropy(model(images), labels),
        train,
        optimizer=optimizer,
        schedule=schedule,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        desc="training the digits network",
    )
    return {"test_accuracy": accuracy(model, *test)}


def _build_digits_clip() -> nn.Module:
    tokenizer = CharTokenizer(DIGIT_NAMES)
    model = TwoTower(len(tokenizer), max(map(len, DIGIT_NAMES)))
    model.tokenizer = tokenizer
    return model


def _train_digits_clip(model: nn.Module, seed: int) -> dict[str, float]:
    train, test = digits(DIGIT_PARTS, seed=seed)
    names = encode_names(DIGIT_NAMES, model.tokenizer)
    steps, batch_size = 600, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    fit(
        model,
        lambda model, images, labels: model.loss(images, names[labels]),
        train,
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        desc="training digits_clip",
    )
    with torch.no_grad():
        hits = model(test[0], names).argmax(-1) == test[1]
    return {"test_accuracy": hits.float().mean().item()}


def _build_char_gpt() -> nn.Module:
    tokenizer = CharTokenizer(english_text())
    model = GPT(len(tokenizer), 64, dim=64, depth=2, num_heads=4)
    model.tokenizer = tokenizer
    return model


def _train_char_gpt(model: nn.Module, seed: int) -> dict[str, float]:
    return _train_gpt(model, english_text(), seed)


def _train_code_gpt(model: nn.Module, seed: int) -> dict[str, float]:
    known = set(model.tokenizer.vocabulary)
    return _train_gpt(model, "".join(character for character in code_text() if character in known), seed)


def _train_gpt(model: nn.Module, text: str, seed: int) -> dict[str, float]:
    tokens = model.tokenizer.encode(text)
    split = len(tokens) * 9 // 10
    train, held_out = tokens[:split], tokens[split:]
    generator = torch.Generator().manual_seed(seed)
    steps, batch_size = 700, 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps, pct_start=0.1)
    fit(
        model,
        lambda model, tokens, targets: model(tokens, targets)[1],
        (random_windows(train, model.context, batch_size, generator) for _ in range(steps)),
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        clip_norm=1.0,
        desc="training a character GPT",
    )
    with torch.no_grad():
        tokens, targets = token_windows(held_out, model.context)
        losses = [model(x, y)[1] * len(x) for x, y in zip(tokens.split(128), targets.split(128), strict=True)]
    return {"held_out_nats": (sum(losses) / len(tokens)).item()}


# --- the cache


def cached(
    name: str,
    build: Callable[[], nn.Module],
    train: Callable[[nn.Module, int], dict[str, float]],
    *,
    seed: int = 0,
    fingerprint: str = "",
) -> nn.Module:
    """The model of a recipe out of the cache, trained first where the cache does not have it.

    Building and training start from `seed` in float32, on the CPU, in one thread, and leave the random state, the
    number of threads and the defaults of the caller alone. Parallel processes train once.

    Args:
        name: of the model; the file is called after it and the hash.
        build: makes the untrained model.
        train: called as `train(model, seed)`; trains it in place and returns its metrics.
        seed: of both.
        fingerprint: of data that is not defined by code.

    Returns:
        The model in eval mode, its parameters without gradients, with the attribute `metrics`.

    Raises:
        ValueError: a seed that is not a non-negative integer.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    config = json.dumps(
        {"seed": seed, "fingerprint": fingerprint, "code": code_hash(build, train)}, sort_keys=True
    )
    path = cache_dir() / f"{name}-{hashlib.sha256(config.encode()).hexdigest()[:16]}.pt"
    with _clean_state(seed):
        model = build()
        if _load(model, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                problem = _load(model, path)  # another process may have made it meanwhile
                if problem:
                    if path.exists():
                        aside = path.replace(path.with_suffix(".damaged"))
                        warnings.warn(
                            f"{path} is damaged ({problem}): it is kept as {aside.name} and made anew; "
                            "delete the copy when you do not need it",
                            stacklevel=3,
                        )
                    torch.default_generator.manual_seed(seed)
                    model = build()
                    model.metrics = train(model, seed)
                    _save(model, path)
    return model.eval().requires_grad_(False)


def cache_dir() -> Path:
    """Where trained models are kept: LOGIT_BOOK_CACHE, by default `.cache/zoo` under the repository."""
    return Path(os.environ.get("LOGIT_BOOK_CACHE") or Path(__file__).resolve().parents[2] / ".cache" / "zoo")


@contextlib.contextmanager
def _clean_state(seed: int) -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
    ):
        try:
            torch.set_num_threads(1)
            torch.set_default_dtype(torch.float32)
            # torch.manual_seed would reach the generators of the GPUs, which nobody puts back
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def _load(model: nn.Module, path: Path) -> str:
    """Fill `model` from `path`. Returns what is wrong with the file, or an empty string; then `model` is filled."""
    if not path.exists():
        return "it is missing"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            return "its checksum is wrong"
        if not zipfile.is_zipfile(io.BytesIO(content[:-32])):
            return "it is not an archive"  # torch.load would try older formats, with warnings of its own
        # weights_only never executes what it reads
        stored = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and operating system each have their own
        return f"it cannot be read: {type(error).__name__}"
    if not isinstance(stored, dict) or not all(
        isinstance(stored.get(key), dict) for key in ("state", "metrics")
    ):
        return "it does not hold a state and metrics"
    state, wanted = stored["state"], model.state_dict()
    if set(state) != set(wanted):
        return "its parameters have other names"
    for name, tensor in wanted.items():
        there = state[name]
        if not isinstance(there, torch.Tensor) or (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            return f"its parameter {name} has another shape or type"
    model.load_state_dict(state)
    model.metrics = stored["metrics"]
    return ""


def _save(model: nn.Module, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"state": model.state_dict(), "metrics": model.metrics}, buffer)
    content = buffer.getvalue()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


# --- the hash of a recipe: its functions, and what they use of the package that they are in


def code_hash(*functions: Callable) -> str:
    """A hash of the code of `functions` and, definition by definition, of all they use within their own package.

    Comments, docstrings and layout do not count, nor does code of the package that they do not reach.

    Raises:
        ValueError: a function that is not defined at the top level of a module file.
    """
    todo = [(function.__module__, function.__qualname__) for function in functions]
    for module, name in todo:
        if not _find(module) or name not in _read_definitions(module)[0]:
            raise ValueError(f"{module}.{name} must be defined at the top level of a module file")
    package, definitions_of = todo[0][0].split(".")[0], functools.cache(_read_definitions)
    visited, code = set(), {}
    while todo:
        module, name = todo.pop()
        if (module, name) in visited:
            continue
        visited.add((module, name))
        definitions, imports = definitions_of(module)
        if name in imports:  # follow it to where it is defined
            source, original = imports[name]
            if source.split(".")[0] != package:
                continue
            if original is None or _find(f"{source}.{original}"):  # a whole module
                whole = source if original is None else f"{source}.{original}"
                todo += [(whole, each) for part in definitions_of(whole) for each in part]
            else:
                todo.append((source, original))
        elif name in definitions:
            node = definitions[name]
            code[module, name] = ast.unparse(node)
            todo += [(module, inner.id) for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    listing = "\n".join(f"{module}.{name}\n{source}" for (module, name), source in sorted(code.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def _find(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # the parent is no package; or `__main__`
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _read_definitions(module: str) -> tuple[dict[str, ast.AST], dict[str, tuple[str, str | None]]]:
    """What a module defines at its top level, without docstrings, and which name it imports from where."""
    tree = ast.parse(_find(module).read_text(encoding="utf-8"))
    definitions, imports = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name.split(".")[0]: (alias.name, None) for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                definitions |= {part.id: node for part in ast.walk(target) if isinstance(part, ast.Name)}
    return definitions, imports
