"""Sessions at a honeypot, generated: the fields of the Kyoto 2006+ data with a structure in time behind them."""

import csv
import gzip
from collections import defaultdict, deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

# the 24 fields of the Kyoto data without the two addresses and the label, in their order
FIELDS = (
    "duration", "service", "source_bytes", "destination_bytes", "count", "same_srv_rate", "serror_rate",
    "srv_serror_rate", "dst_host_count", "dst_host_srv_count", "dst_host_same_src_port_rate", "dst_host_serror_rate",
    "dst_host_srv_serror_rate", "flag", "ids_detection", "malware_detection", "ashula_detection", "source_port",
    "destination_port", "start_time", "protocol",
)  # fmt: skip
DETECTORS = ("ids_detection", "malware_detection", "ashula_detection")
KINDS = ("normal", "scan", "brute force", "flood", "exploit")
_PORTS = np.array([80, 443, 25, 53, 22, 445])  # of the services, by index
_DATAGRAM = 3  # the service that runs over UDP
_FINISHED, _UNANSWERED, _REJECTED = 0, 1, 2  # flags: SF, S0, REJ


class Traffic(NamedTuple):
    """Generated sessions in order of time.

    Attributes:
        features: (n, 21), float64; columns as in `fields`, categories as numbers.
        labels: (n,), 1 for an attack and 0 for normal traffic.
        kinds: (n,), indices into `KINDS`; the labels themselves where the data do not tell.
        fields: names of the columns.
    """

    features: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    fields: tuple[str, ...]


def honeypot_traffic(n: int, seed: int = 0, *, attack_share: float = 0.5) -> Traffic:
    """Draw sessions, normal ones singly and attacks in campaigns, and compute the window features from them.

    Normal clients come at random times and mostly finish their sessions. Scans touch many hosts and services and are
    left unanswered or rejected; brute force opens the same service again and again; floods leave half-open sessions; an
    exploit is one session that looks almost normal. The counts over the last two seconds and over the last hundred
    sessions of the same destination are computed from the sessions themselves, by the definitions of the Kyoto data.
    The detectors' columns are drawn from the kind of attack, and so nearly contain the label.

    Args:
        n: number of sessions, at least 1.
        seed: of the private generator.
        attack_share: expected share of attacks, in [0, 1].

    Raises:
        ValueError: `n` below 1 or a share outside [0, 1].
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= attack_share <= 1:
        raise ValueError(f"attack_share must be in [0, 1], got {attack_share}")
    rng = np.random.default_rng(seed)
    sessions = _sessions(n, attack_share, rng)
    order = np.argsort(sessions["time"], kind="stable")
    sessions = {name: column[order] for name, column in sessions.items()}
    columns = sessions | _windows(sessions) | _detectors(sessions["kind"], rng)
    columns["start_time"] = sessions["time"] % 86_400
    columns["protocol"] = (sessions["service"] == _DATAGRAM).astype(float)
    features = np.stack([np.asarray(columns[name], dtype=float) for name in FIELDS], axis=1)
    return Traffic(features, (sessions["kind"] > 0).astype(np.int64), sessions["kind"], FIELDS)


def kyoto_sessions(path: str | Path, limit: int | None = None) -> Traffic:
    """Read one file of the Kyoto 2006+ data: 24 fields a line, separated by tabs, in the order of the publishers.

    The addresses are dropped, categories become numbers in the order of their first appearance, a detector's text
    becomes 1 (and "0" stays 0), times of day become seconds. A label of 1 is normal traffic, others are attacks.

    Args:
        path: of a text file, or one compressed with gzip (`.gz`).
        limit: read at most so many sessions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line without 24 fields, a field that is no number where one belongs, or a file without sessions;
            the message names the line.
    """
    path = Path(path)
    codes = {name: {} for name in ("service", "flag", "protocol")}
    features, labels = [], []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if limit is not None and len(labels) >= limit:
                break
            if len(row) != 24:
                raise ValueError(f"{path.name}, line {number}: expected 24 fields, got {len(row)}")
            kept = row[:17] + [row[19], *row[21:]]
            try:
                features.append([_number(name, text, codes) for name, text in zip(FIELDS, kept, strict=True)])
                labels.append(int(int(row[17]) != 1))
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from None
    if not labels:
        raise ValueError(f"{path.name} has no sessions")
    labels = np.array(labels, dtype=np.int64)
    return Traffic(np.array(features), labels, labels, FIELDS)


def _number(name, text, codes):
    if name in codes:
        return float(codes[name].setdefault(text, len(codes[name])))
    if name in DETECTORS:
        return float(text != "0")
    if name == "start_time":
        hours, minutes, seconds = text.split(":")
        return 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds)
    return float(int(text, 16)) if text.startswith("0x") else float(text)


def _sessions(n, attack_share, rng):
    span = 2.0 * n  # seconds: one session in two seconds on average
    blocks, left = [], rng.binomial(n, attack_share)
    blocks.append(_normal(n - left, span, rng))
    while left:
        kind = int(rng.integers(1, len(KINDS)))
        size = min(left, 1 if kind == 4 else int(rng.integers(10, 40)))
        blocks.append(_campaign(kind, size, span, rng))
        left -= size
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _normal(n, span, rng):
    service = rng.choice(len(_PORTS), n, p=[0.35, 0.3, 0.1, 0.15, 0.06, 0.04])
    finished = rng.random(n) < 0.93
    return _block(
        kind=np.zeros(n, dtype=np.int64), time=rng.uniform(0, span, n), service=service,
        source=rng.integers(0, 60, n), destination=rng.integers(0, 12, n),
        flag=np.where(finished, _FINISHED, rng.choice([_UNANSWERED, _REJECTED], n)),
        duration=finished * rng.lognormal(0.5, 1.2, n), source_bytes=finished * rng.lognormal(6.0, 1.0, n),
        destination_bytes=finished * rng.lognormal(7.5, 1.3, n), source_port=rng.integers(1024, 65536, n),
    )  # fmt: skip


def _campaign(kind, size, span, rng):
    """One attacker's sessions, a few of them in a second."""
    flags = {1: [0.05, 0.6, 0.35], 2: [0.9, 0.05, 0.05], 3: [0.02, 0.95, 0.03], 4: [0.95, 0.03, 0.02]}[kind]
    flag = rng.choice(3, size, p=flags)
    finished = flag == _FINISHED
    service = {1: rng.integers(0, len(_PORTS), size), 4: rng.choice([0, 1, 5], size)}.get(
        kind, np.full(size, 4 if kind == 2 else 0)
    )
    host, port = rng.integers(0, 12), rng.integers(1024, 65536)
    gap = {1: 0.2, 2: 0.8, 3: 0.05, 4: 1.0}[kind]
    scale = {1: (-3.0, 3.0, 2.0), 2: (0.8, 6.3, 6.5), 3: (-3.0, 3.0, 2.0), 4: (0.9, 6.8, 7.0)}[kind]
    columns = {
        name: finished * rng.lognormal(centre, 0.8, size)
        for name, centre in zip(("duration", "source_bytes", "destination_bytes"), scale, strict=True)
    }
    return _block(
        kind=np.full(size, kind), time=rng.uniform(0, span) + np.cumsum(rng.exponential(gap, size)),
        service=service, source=np.full(size, 1000 + rng.integers(0, 10**6)), flag=flag,
        destination=rng.integers(0, 12, size) if kind == 1 else np.full(size, host),
        source_port=np.full(size, port) if kind == 3 else rng.integers(1024, 65536, size), **columns,
    )  # fmt: skip


def _block(**columns):
    return columns | {"destination_port": _PORTS[columns["service"]]}


def _windows(sessions):
    """Counts over the last two seconds, and over the last hundred sessions of the same destination."""
    names = FIELDS[4:13]
    found = {name: np.zeros(len(sessions["time"])) for name in names}
    keys = ("time", "source", "destination", "service", "flag", "source_port")
    time, source, destination, service, flag, port = (sessions[key] for key in keys)
    error = flag == _UNANSWERED
    first = np.searchsorted(time, time - 2.0)
    last_hundred = defaultdict(lambda: deque(maxlen=100))
    for now in range(len(time)):
        recent = slice(first[now], now)
        pair = (source[recent] == source[now]) & (destination[recent] == destination[now])
        same = service[recent] == service[now]
        host = np.fromiter(last_hundred[destination[now]], dtype=np.int64)
        guest, served = host[source[host] == source[now]], host[service[host] == service[now]]
        values = (
            pair.sum(), _share(same[pair]), _share(error[recent][pair]), _share(error[recent][same]), len(guest),
            len(served), _share(port[guest] == port[now]), _share(error[guest]), _share(error[served]),
        )  # fmt: skip
        for name, value in zip(names, values, strict=True):
            found[name][now] = value
        last_hundred[destination[now]].append(now)
    return found


def _share(flags):
    return flags.mean() if len(flags) else 0.0


def _detectors(kind, rng):
    """Alarm rates by kind: a false alarm is rare, and most attacks raise one of the three."""
    rates = {
        "ids_detection": [0.01, 0.6, 0.5, 0.7, 0.4],
        "malware_detection": [0.005, 0.02, 0.05, 0.02, 0.6],
        "ashula_detection": [0.005, 0.1, 0.1, 0.05, 0.6],
    }
    return {
        name: (rng.random(len(kind)) < np.array(rate)[kind]).astype(float) for name, rate in rates.items()
    }
