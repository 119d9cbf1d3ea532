"""The benchmark harness: every operation keeps its contract, and what is compared computes the same."""

import importlib
import importlib.util
import json
import sys

import pytest
import torch

from kernels.bench import _harness, operations


def small(size):
    return {key: min(value, 40) if isinstance(value, int) else value for key, value in size.items()}


@pytest.mark.parametrize("operation", operations())
def test_peers_compute_the_same(operation):
    module = importlib.import_module(f"kernels.bench.{operation}")
    assert module.SIZES["cuda"]
    for size in map(small, module.SIZES["cpu"]):
        torch.manual_seed(0)
        tensors = module.inputs("cpu", torch.float32, **size)
        peers = module.peers("cpu", **size)
        assert any(name.startswith("book") for name in peers) and not next(iter(peers)).startswith("book")
        results = {}
        for name, peer in peers.items():
            value = peer(**tensors)
            results[name] = [value.detach()]
            if _harness.differentiable(tensors):
                needed = [tensor for tensor in tensors.values() if tensor.requires_grad]
                upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
                results[name] += torch.autograd.grad(value, needed, upstream)
        baseline = next(iter(results.values()))
        for name, found in results.items():
            for mine, theirs in zip(found, baseline, strict=True):
                assert mine.shape == theirs.shape, name
                assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-7, name


@pytest.mark.parametrize("operation", operations())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_work_is_counted(operation, device):
    module = importlib.import_module(f"kernels.bench.{operation}")
    for size in module.SIZES[device]:
        work, double = (module.work(element_bytes, **size) for element_bytes in (2, 4))
        assert {"forward_bytes", "forward_flops"} <= set(work)
        assert all(value > 0 for value in work.values())
        assert work["forward_bytes"] < double["forward_bytes"] <= 2 * work["forward_bytes"]
        assert work["forward_flops"] == double["forward_flops"]


def test_harness_writes_ratios_and_keeps_what_was_not_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(
        _harness, "peak_bytes", lambda operation, size, dtype, name, peer, device: 3 * len(name)
    )
    old = {"operation": "cut_cross_entropy", "size": {"tokens": 1}, "peer": "torch", "date": "2020-02-02"}
    gone = old | {"operation": "no_such_operation"}
    (tmp_path / "cpu.json").write_text(json.dumps({"results": [gone, old]}))
    module = importlib.import_module("kernels.bench.two_pass_softmax")
    monkeypatch.setitem(module.SIZES, "cpu", [{"rows": 3, "columns": 50}])

    def fails(x):
        raise torch.OutOfMemoryError("out of memory\nand more")

    peers = module.peers
    monkeypatch.setattr(module, "peers", lambda device, **size: peers(device, **size) | {"broken": fails})
    _harness.main(["two_pass_softmax", "--device", "cpu", "--runs", "3"])
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert report["versions"]["torch"] == torch.__version__
    assert report["results"][0] == old and len(report["results"]) == 5
    first, *_, mine, broken = report["results"][1:]
    assert first["peer"] == "torch" and first["forward_time_ratio"] == first["memory_ratio"] == 1
    assert mine["peer"] == "book, torch" and mine["peak_bytes"] == 33 and mine["memory_ratio"] == 33 / 15
    assert mine["forward_backward_ms"] > 0 and mine["forward_bytes_fraction"] > 0
    assert broken["error"] == "OutOfMemoryError: out of memory" and "forward_ms" not in broken
    assert "broken" in capsys.readouterr().out


def test_what_fails_is_an_entry(monkeypatch, tmp_path):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(_harness, "peak_bytes", lambda *arguments: 1 / (arguments[3] != "no memory"))
    module = importlib.import_module("kernels.bench.two_pass_softmax")
    sizes = [{"rows": 2, "columns": 3}, {"rows": 3, "columns": 50}]
    monkeypatch.setitem(module.SIZES, "cpu", sizes)
    old = {"operation": "two_pass_softmax", "size": sizes[1], "peer": "old", "date": "2020-02-02"}
    (tmp_path / "cpu.json").write_text(json.dumps({"results": [old]}))
    turns, asked = iter(range(100)), []

    def asserts(x):
        raise AssertionError  # no message

    def tires(x):
        if next(turns) > 2:
            raise ValueError("third time")
        return 2 * x

    def good(x):
        asked.append((torch.is_grad_enabled(), x.requires_grad))
        return 2 * x

    peers = {"first": asserts, "tires": tires, "no memory": good, "good": good}
    monkeypatch.setattr(module, "peers", lambda device, **size: peers)
    _harness.main(["two_pass_softmax", "--device", "cpu", "--runs", "3", "--sizes", "smallest"])
    *found, kept = json.loads((tmp_path / "cpu.json").read_text())["results"]
    errors = [record.get("error") for record in found]
    assert errors == [
        "AssertionError: ",
        "ValueError: third time",
        "ZeroDivisionError: division by zero",
        None,
    ]
    assert found[3]["memory_ratio"] == 1 and found[3]["first_seconds"] >= 0
    assert kept == old  # its size was not measured
    assert set(asked) == {(False, False), (True, True)}

    def absent(device, **size):
        raise ImportError("no such package")

    monkeypatch.setattr(module, "peers", absent)
    _harness.main(["two_pass_softmax", "--device", "cpu"])
    results = json.loads((tmp_path / "cpu.json").read_text())["results"]
    assert [(r["size"], r["peer"]) for r in results] == [(size, "all") for size in sizes]
    assert results[0]["error"] == "ImportError: no such package"
    assert not list(tmp_path.glob("*.part"))


def test_results_are_written_before_a_gpu_dies(monkeypatch, tmp_path):
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(_harness, "release", lambda device: False)
    module = importlib.import_module("kernels.bench.two_pass_softmax")
    monkeypatch.setitem(module.SIZES, "cpu", [{"rows": 2, "columns": 3}] * 2)

    def illegal(x):
        raise RuntimeError("illegal memory access")

    peers = {"torch": torch.exp, "broken": illegal, "after": torch.exp}
    monkeypatch.setattr(module, "peers", lambda device, **size: peers)
    with pytest.raises(SystemExit):
        _harness.main(["two_pass_softmax", "--device", "cpu", "--runs", "3"])
    results = json.loads((tmp_path / "cpu.json").read_text())["results"]
    assert [(r["peer"], r["error"]) for r in results] == [("broken", "RuntimeError: illegal memory access")]


@pytest.mark.parametrize("operation", operations())
def test_other_packages_are_imported_when_they_are_called(operation, monkeypatch):
    """A package that is installed, but cannot be imported, must not keep the others from being measured."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for package in ("cut_cross_entropy", "liger_kernel", "fla", "torch.nn.attention.flex_attention"):
        for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    module = importlib.import_module(f"kernels.bench.{operation}")
    for size in module.SIZES["cuda"]:
        assert len(module.peers("cuda", **size)) >= 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_gaussian_attention():
    from torch.nn.attention.flex_attention import flex_attention

    module = importlib.import_module("kernels.bench.gaussian_attention")
    size = small(module.SIZES["cpu"][0])
    tensors = {name: x.detach() for name, x in module.inputs("cpu", torch.float32, **size).items()}
    peers = module.peers("cuda", **size)
    expected = peers["torch"](**tensors)
    found = peers["FlexAttention"](**tensors, attend=flex_attention)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_memory_is_measured_in_a_fresh_process():
    size = {"rows": 64, "columns": 65536}  # 16 MiB: input, result, its gradient and that of the input
    peak = _harness.peak_bytes("two_pass_softmax", size, torch.float32, "torch", None, "cpu")
    assert 40 * 2**20 < peak < 70 * 2**20


def test_unknown_operation_and_absent_gpu(capsys):
    with pytest.raises(SystemExit):
        _harness.main(["no_such_operation"])
    assert "unknown operation 'no_such_operation'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            _harness.main(["--device", "cuda"])
        assert "there is no CUDA device here" in capsys.readouterr().err
