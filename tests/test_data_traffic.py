"""Generated honeypot sessions: the window features by brute force, and the reader of the public format."""

import gzip

import numpy as np
import pytest

from lib.data import honeypot_traffic, kyoto_sessions
from lib.data.traffic import DETECTORS, FIELDS, KINDS, _sessions, _windows


def test_same_seed_same_sessions_and_order_in_time():
    one, two, other = (honeypot_traffic(300, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.features, two.features) and not np.array_equal(one.features, other.features)
    assert one.features.shape == (300, 21) and np.isfinite(one.features).all()
    assert (np.diff(one.features[:, FIELDS.index("start_time")]) >= 0).all()  # 600 s: no midnight between
    assert np.array_equal(one.labels, one.kinds > 0) and set(one.kinds) <= set(range(len(KINDS)))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 1)])
def test_share_of_attacks(share, expected):
    assert (honeypot_traffic(200, attack_share=share).labels == expected).all()


def mean(flags):
    return sum(flags) / len(flags) if flags else 0.0


def test_windows_by_brute_force():
    rng = np.random.default_rng(3)
    sessions = _sessions(400, 0.6, rng)
    order = np.argsort(sessions["time"], kind="stable")
    sessions = {name: column[order] for name, column in sessions.items()}
    found = _windows(sessions)
    keys = ("time", "source", "destination", "service", "flag", "source_port")
    rows = list(zip(*(sessions[key] for key in keys), strict=True))
    for now, (time, source, destination, service, _, port) in enumerate(rows):
        recent = [row for row in rows[:now] if row[0] >= time - 2]
        pair = [row for row in recent if row[1] == source and row[2] == destination]
        host = [row for row in rows[:now] if row[2] == destination][-100:]
        guest, served = [r for r in host if r[1] == source], [r for r in host if r[3] == service]
        alike = [row for row in recent if row[3] == service]
        expected = {
            "count": len(pair),
            "same_srv_rate": mean([row[3] == service for row in pair]),
            "serror_rate": mean([row[4] == 1 for row in pair]),
            "srv_serror_rate": mean([row[4] == 1 for row in alike]),
            "dst_host_count": len(guest),
            "dst_host_srv_count": len(served),
            "dst_host_same_src_port_rate": mean([row[5] == port for row in guest]),
            "dst_host_serror_rate": mean([row[4] == 1 for row in guest]),
            "dst_host_srv_serror_rate": mean([row[4] == 1 for row in served]),
        }
        assert {name: found[name][now] for name in expected} == pytest.approx(expected)
    assert found["count"].max() > 5 and found["dst_host_count"].max() > 10  # campaigns leave their trace


def test_detectors_nearly_contain_the_label():
    traffic = honeypot_traffic(2000, 0)
    alarm = traffic.features[:, [FIELDS.index(name) for name in DETECTORS]].any(1)
    assert 0.7 < (alarm == traffic.labels).mean() < 0.95


KYOTO = [
    "0.5 http 100 2000 1 1.0 0.0 0.0 3 4 0.1 0.0 0.0 SF 0 0 0 1 a:b 0xd431 c:d 0x0050 00:01:02 tcp",
    "0.0 other 0 0 0 0.0 0.0 0.0 0 0 0.0 0.0 0.0 S0 alert(1) 0 2x -1 a:b 54321 c:d 445 10:00:00 udp",
]


@pytest.mark.parametrize("compressed", [False, True])
def test_public_format(tmp_path, compressed):
    text = "".join("\t".join(line.split()) + "\n" for line in KYOTO)
    path = tmp_path / ("20130101.txt.gz" if compressed else "20130101.txt")
    with (gzip.open if compressed else open)(path, "wt") as file:
        file.write(text)
    traffic = kyoto_sessions(path)
    row = dict(zip(FIELDS, traffic.features[0], strict=True))
    assert traffic.labels.tolist() == [0, 1] and traffic.features.shape == (2, 21)
    assert row["source_port"] == 0xD431 and row["destination_port"] == 80 and row["start_time"] == 62
    row = dict(zip(FIELDS, traffic.features[1], strict=True))
    assert [row[name] for name in DETECTORS] == [1, 0, 1]
    assert (row["service"], row["flag"], row["protocol"], row["source_port"]) == (1, 1, 1, 54321)
    assert len(kyoto_sessions(path, limit=1).labels) == 1


def test_bad_files_and_numbers(tmp_path):
    path = tmp_path / "bad.txt"
    for text, words in (
        ("1\t2\n", "bad.txt, line 1: expected 24 fields, got 2"),
        ("", "no sessions"),
        (
            "\t".join(KYOTO[0].replace("100", "many").split()),
            "line 1: could not convert string to float: 'many'",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            kyoto_sessions(path)
    with pytest.raises(FileNotFoundError):
        kyoto_sessions(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        honeypot_traffic(0)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 2"):
        honeypot_traffic(5, attack_share=2)
