"""Benchmark harness: time and peak memory of each operation against named peers, in one run::

    python -m kernels.bench [operation …] [--device cpu|cuda]

On a GPU the Triton kernels run against PyTorch; without one the memory-lean CPU paths of `lib` do. Times are
medians of alternating runs of all peers in one process. Peak memory is what the allocator handed out beyond the
inputs on a GPU, and the growth of the resident set in a fresh process on a CPU. Ratios are against the first
peer. The results are printed and written to kernels/results/<device>.json.
"""

import argparse
import datetime
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F


def softmax_inputs(rows, columns, device, dtype):
    return {"x": torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)}


def softmax_peers(device):
    from lib.numerics import three_pass_softmax, two_pass_softmax

    return {
        "torch.softmax": lambda x: torch.softmax(x, -1),
        "three passes": lambda x: three_pass_softmax(x, -1),
        "two passes": lambda x: two_pass_softmax(x, -1),
    }


def cross_entropy_inputs(tokens, dim, vocabulary, device, dtype):
    return {
        "hidden": torch.randn(tokens, dim, device=device, dtype=dtype, requires_grad=True),
        "weight": (torch.randn(vocabulary, dim, device=device, dtype=dtype) / dim**0.5).requires_grad_(),
        "targets": torch.randint(vocabulary, (tokens,), device=device),
    }


def cross_entropy_peers(device):
    from lib.losses import linear_cross_entropy

    peers = {"F.cross_entropy": lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets)}
    if device == "cuda":
        peers["torch.compile"] = torch.compile(peers["F.cross_entropy"])
    for impl in ("chunked", "triton") if device == "cuda" else ("chunked",):
        peers[f"linear_cross_entropy, {impl}"] = lambda hidden, weight, targets, impl=impl: (
            linear_cross_entropy(hidden, weight, targets, impl=impl)
        )
    return peers


# operation: inputs, peers, sizes on each device
OPERATIONS = {
    "two_pass_softmax": (
        softmax_inputs,
        softmax_peers,
        {"cpu": [(64, 65536), (1, 1 << 22)], "cuda": [(4096, 32768), (1024, 262144), (16, 1 << 24)]},
    ),
    "cut_cross_entropy": (
        cross_entropy_inputs,
        cross_entropy_peers,
        {"cpu": [(2048, 256, 65536)], "cuda": [(2048, 256, 65536), (8192, 2304, 256000)]},
    ),
}


def call(peer, inputs):
    """Forward and backward."""
    for tensor in inputs.values():
        tensor.grad = None
    result = peer(**inputs)
    result.backward(torch.ones_like(result))


def milliseconds(peers, inputs, device, runs):
    """Median time of each peer, the peers taking turns."""
    times = {name: [] for name in peers}
    for run in range(runs + 1):
        for name, peer in peers.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call(peer, inputs)
                end.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                call(peer, inputs)
                elapsed = 1e3 * (time.perf_counter() - begin)
            if run:  # the first run warms up
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(field):
    """A field of /proc/self/status in bytes: VmRSS, the resident set now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def resident_growth(operation, size, dtype, name, queue):
    """In a fresh process: how far the resident set grows above the inputs, in bytes (Linux)."""
    make_inputs, make_peers, _ = OPERATIONS[operation]
    peers = make_peers("cpu")
    # a first small call pays for libraries and thread pools
    call(peers[name], make_inputs(*(min(extent, 64) for extent in size), "cpu", dtype))
    inputs = make_inputs(*size, "cpu", dtype)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call(peers[name], inputs)
    queue.put(resident("VmHWM") - before)


def peak_bytes(operation, size, dtype, name, device):
    """Peak memory beyond the inputs, gradients included."""
    if device == "cpu":
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=resident_growth, args=(operation, size, dtype, name, queue))
        process.start()
        result = queue.get()
        process.join()
        return result
    make_inputs, make_peers, _ = OPERATIONS[operation]
    inputs, peer = make_inputs(*size, device, dtype), make_peers(device)[name]
    call(peer, inputs)
    for tensor in inputs.values():
        tensor.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(peer, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(operation, device, runs):
    """Measure one operation at all its sizes; yields a record per peer."""
    make_inputs, make_peers, sizes = OPERATIONS[operation]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for size in sizes[device]:
        peers = make_peers(device)
        times = milliseconds(peers, make_inputs(*size, device, dtype), device, runs)
        peaks = {name: peak_bytes(operation, size, dtype, name, device) for name in peers}
        first = next(iter(peers))
        for name in peers:
            yield {
                "operation": operation,
                "size": list(size),
                "dtype": str(dtype).removeprefix("torch."),
                "peer": name,
                "milliseconds": round(times[name], 3),
                "peak_bytes": peaks[name],
                "time_ratio": round(times[name] / times[first], 3),
                "memory_ratio": round(peaks[name] / max(peaks[first], 1), 3),
            }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__.splitlines()[0].rstrip(":.")
    )
    parser.add_argument("operations", nargs="*", metavar="operation", help=", ".join(OPERATIONS))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.operations) - set(OPERATIONS):
        parser.error(f"unknown operation {sorted(unknown)[0]!r}; there are {', '.join(OPERATIONS)}")
    records = []
    for operation in options.operations or OPERATIONS:
        for record in measure(operation, options.device, options.runs):
            records.append(record)
            print(
                f"{record['operation']:18} {str(tuple(record['size'])):22} {record['peer']:32}"
                f"{record['milliseconds']:10.1f} ms {record['peak_bytes'] / 2**20:9.1f} MiB"
                f"   time x{record['time_ratio']:.2f}  memory x{record['memory_ratio']:.2f}",
                flush=True,
            )
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    results = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "results": records,
    }
    target = Path(__file__).parent / "results" / f"{name.lower().replace(' ', '-')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
