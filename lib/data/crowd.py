"""Votes of crowds: simulated workers of several kinds, and the annotations of two public crowds."""

import csv
import gzip
from pathlib import Path

import torch

_KINDS = ("confusion", "glad", "spam", "mixed")


def simulated_crowd(
    targets: torch.Tensor,
    num_classes: int = 10,
    *,
    workers: int = 30,
    per_item: tuple[int, int] = (3, 5),
    kind: str = "mixed",
    difficulty: torch.Tensor | None = None,
    pairs: tuple[tuple[int, int], ...] = ((3, 8), (4, 9)),
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Votes of workers who err in known ways.

    Each item is shown to different workers, between the two numbers of `per_item`. In the order of `kind`, a worker

    - "confusion": is right with a probability of 0.6 to 0.95, else errs evenly; where the truth is one of `pairs`, it is
      taken for its partner with a probability of its own between 0 and 0.8 instead (the model of Dawid and Skene);
    - "glad": is right with probability sigmoid(ability exp(1.5 - 3 difficulty)), ability from 0.3 to 2, else errs
      evenly;
    - "spam": copies the truth with a probability of its own, every second worker at most 0.3 and the others at least 0.7,
      else votes from a distribution of its own (the model of MACE);
    - "mixed": is, in turn, a "glad" worker of ability 1.2 to 2, a "confusion" worker, or a spammer who never copies.

    Args:
        targets: the true classes, (n,), in [0, num_classes).
        num_classes: K, at least 3 and above every class in `pairs`.
        workers: how many.
        per_item: the least and the largest number of votes of an item, from 1 to `workers`.
        kind: "confusion", "glad", "spam" or "mixed".
        difficulty: of each item in [0, 1], (n,); 0 when None.
        pairs: classes taken for one another.
        seed: of everything; the global random state is not touched.

    Returns:
        tasks, workers and labels, int64, (votes,): item i is task i; workers are numbered without gaps.

    Raises:
        ValueError: targets, sizes, kind, pairs or difficulty out of range.
    """
    n, (least, most) = len(targets), per_item
    if targets.dim() != 1 or not n or bool(((targets < 0) | (targets >= num_classes)).any()):
        raise ValueError(f"targets must be (n,) with n above 0 and values in [0, {num_classes})")
    if num_classes < 3 or any(not 0 <= c < num_classes for pair in pairs for c in pair):
        raise ValueError(
            f"num_classes must be at least 3 and above every class in {pairs}, got {num_classes}"
        )
    if not 1 <= least <= most <= workers:
        raise ValueError(f"per_item must be two rising numbers from 1 to {workers}, got {per_item}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}")
    difficulty = torch.zeros(n) if difficulty is None else difficulty
    if difficulty.shape != (n,) or not bool(((difficulty >= 0) & (difficulty <= 1)).all()):
        raise ValueError(f"difficulty must be ({n},) with values in [0, 1]")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    eye = torch.eye(num_classes, dtype=torch.float64)
    wrong = (1 - eye) / (num_classes - 1)
    # one distribution of votes for each worker and item, (workers, n, K)
    accuracy = uniform(0.6, 0.95, workers, 1, 1)
    confusion = accuracy * eye + (1 - accuracy) * wrong
    swap = uniform(0, 0.8, workers, 1)
    for a, b in (*pairs, *(pair[::-1] for pair in pairs)):
        confusion[:, a] = swap * eye[b] + (1 - swap) * eye[a]
    confused = confusion[:, targets]
    ability = uniform(1.2, 2, workers, 1) if kind == "mixed" else uniform(0.3, 2, workers, 1)
    right = torch.sigmoid(ability * torch.exp(1.5 - 3 * difficulty.double()))[..., None]
    able = right * eye[targets] + (1 - right) * wrong[targets]
    second = torch.arange(workers)[:, None, None] % 2 == 1
    copies = torch.where(second, uniform(0, 0.3, workers, 1, 1), uniform(0.7, 1, workers, 1, 1))
    copies = torch.zeros_like(copies) if kind == "mixed" else copies
    strategy = uniform(1e-3, 1, workers, 1, num_classes).log().neg()
    strategy = strategy**2  # a few favourite labels
    spamming = copies * eye[targets] + (1 - copies) * strategy / strategy.sum(2, keepdim=True)
    kinds = {"confusion": confused, "glad": able, "spam": spamming}
    turn = torch.arange(workers)[:, None, None] % 3
    chances = (
        torch.where(turn == 0, able, torch.where(turn == 1, confused, spamming))
        if kind == "mixed"
        else kinds[kind]
    )
    order = torch.rand(n, workers, generator=generator).argsort(1)
    asked = torch.randint(least, most + 1, (n, 1), generator=generator)
    tasks, place = (torch.arange(most) < asked).nonzero(as_tuple=True)
    who = order[tasks, place]
    labels = torch.multinomial(chances[who, tasks], 1, generator=generator)[:, 0]
    return tasks, torch.unique(who, return_inverse=True)[1], labels


def rte_crowd(path: str | Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The crowd's answers to the RTE questions (Snow et al., 2008), `rte.standardized.tsv`.

    Returns:
        tasks, workers and labels of the votes, (votes,), and the expert's labels, (tasks,); 0 and 1, int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing.
    """
    rows = _rows(path, "\t", ("!amt_worker_ids", "orig_id", "response", "gold"))
    tasks, workers = _number(row["orig_id"] for row in rows), _number(row["!amt_worker_ids"] for row in rows)
    labels, gold = (torch.tensor([int(row[name]) for row in rows]) for name in ("response", "gold"))
    experts = torch.zeros(int(tasks.max()) + 1, dtype=torch.long)
    experts[tasks] = gold
    return tasks, workers, labels, experts


def cifar10h_crowd(path: str | Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The crowd's labels of CIFAR-10's test images (Peterson et al., 2019), `cifar10h-raw.csv`.

    Returns:
        tasks, workers and labels of the votes, (votes,), int64; tasks are places in CIFAR-10's test file. Attention checks
        are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing.
    """
    rows = _rows(path, ",", ("annotator_id", "cifar10_test_test_idx", "chosen_label"))
    rows = [r for r in rows if r["chosen_label"] != "" and float(r["cifar10_test_test_idx"]) >= 0]
    tasks = torch.tensor([int(float(row["cifar10_test_test_idx"])) for row in rows])
    labels = torch.tensor([int(float(row["chosen_label"])) for row in rows])
    return tasks, _number(row["annotator_id"] for row in rows), labels


def _rows(path, delimiter, columns):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; download the data set and give its path")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        rows = list(reader)
    missing = set(columns) - set(reader.fieldnames or ())
    if missing or not rows:
        raise ValueError(f"{path}: needs rows with the columns {columns}, {sorted(missing)} are missing")
    return rows


def _number(names):
    places: dict[str, int] = {}
    return torch.tensor([places.setdefault(name, len(places)) for name in names])
