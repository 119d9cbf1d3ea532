"""Benchmark harness: time and peak memory of each operation against named peers, in one run::

    python -m kernels.bench [operation …] [--device cpu|cuda] [--sizes smallest|all]

On a GPU the Triton kernels run against PyTorch, torch.compile and other packages; without one the memory-lean CPU
paths of `lib` do, against plain PyTorch. Forward and forward with backward are timed apart: medians of alternating
runs of all peers in one process. Peak memory is what the allocator handed out beyond the inputs on a GPU, and the
growth of the resident set in a fresh process on a CPU. Ratios are against the first peer that ran. Bandwidth and
operations per second are fractions of those of a copy and of a product of matrices, measured in the same run.

The forward pass runs on inputs that ask for no gradient. First calls, which compile and tune, are timed apart, as
"first_seconds". Before every timed call on a GPU a buffer larger than its L2 cache is overwritten, so that inputs come
from memory; what a call computes and reads again may still be served by the cache. Where kernels are short, the time is
that of launching them.

A peer that fails, as for lack of memory, is recorded with its error. Results are printed, and written to
kernels/results/<device>.json after every size. Operations that were not asked for keep what an earlier run of the same
device wrote, and so do sizes that this run has not measured. A GPU that no longer answers ends the run.
"""

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

from kernels.bench import operations

PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "flash-linear-attention")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def load(operation):
    return importlib.import_module(f"kernels.bench.{operation}")


def all_peers(operation, device, size):
    """The peers of an operation, with the compiled baseline on a GPU."""
    peers = load(operation).peers(device, **size)
    if device == "cuda":
        first = next(iter(peers))
        peers = {first: peers[first], "torch.compile": torch.compile(peers[first], dynamic=False), **peers}
    return peers


def forward(peer, tensors):
    """Without gradients: a package may compute them here where an input asks for one."""
    with torch.no_grad():
        peer(**{name: tensor.detach() for name, tensor in tensors.items()})


def forward_backward(peer, tensors):
    clear_gradients(tensors)
    result = peer(**tensors)
    result.backward(torch.ones_like(result))


def differentiable(tensors):
    return any(tensor.requires_grad for tensor in tensors.values())


def clear_gradients(tensors):
    for tensor in tensors.values():
        tensor.grad = None


@cache
def flush_buffer():
    """Five times the L2 cache of an H100."""
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def elapsed(call, device):
    """Milliseconds of one call."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush_buffer().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def failure(error):
    """What is recorded of an error. All of it goes to the standard error stream."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def milliseconds(calls, device, runs, seconds):
    """Median time of each call, the calls taking turns, `seconds` of it at most after three runs; and the failures."""
    times, errors = {name: [] for name in calls}, {}
    for turn in range(runs + 1):
        for name in list(times):
            try:
                times[name].append(elapsed(calls[name], device))
            except Exception as error:  # any, of any package
                errors[name] = failure(error)
                del times[name]
        if turn == 0:  # not counted
            begin = time.perf_counter()
        elif turn >= 3 and time.perf_counter() - begin > seconds:
            break
    return {name: statistics.median(values[1:]) for name, values in times.items()}, errors


def release(device):
    """Free what a peer left behind. False if the GPU no longer answers, as after an illegal access."""
    gc.collect()
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def resident(field):
    """A field of /proc/self/status in bytes: VmRSS, the resident set now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def resident_growth(operation, size, dtype, name, sender):
    """In a fresh process: how far the resident set grows above the inputs in a second call, in bytes (Linux)."""
    peer = all_peers(operation, "cpu", size)[name]
    tensors = load(operation).inputs("cpu", dtype, **size)
    call = partial(forward_backward if differentiable(tensors) else forward, peer, tensors)
    call()  # pays for libraries and thread pools
    clear_gradients(tensors)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    sender.send(resident("VmHWM") - before)


@contextmanager
def returned_memory():
    """Processes that start in here give freed memory back at once (glibc), so that holes in the heap do not count."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    earlier = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in earlier.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def peak_bytes(operation, size, dtype, name, peer, device):
    """Peak memory beyond the inputs, gradients included."""
    if device == "cpu":
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=resident_growth, args=(operation, size, dtype, name, sender))
        with returned_memory():
            process.start()
        sender.close()
        result = receiver.recv()
        process.join()
        return result
    tensors = load(operation).inputs(device, dtype, **size)
    call = forward_backward if differentiable(tensors) else forward
    call(peer, tensors)
    clear_gradients(tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(peer, tensors)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def limits(device, dtype):
    """Bytes a second of a copy, and operations a second of a product of matrices."""
    extent, count = (8192, 1 << 28) if device == "cuda" else (1024, 1 << 24)
    source = torch.empty(count, dtype=dtype, device=device)
    target, matrix = torch.empty_like(source), torch.randn(extent, extent, device=device, dtype=dtype)
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: matrix @ matrix}
    times, _ = milliseconds(calls, device, 20, 5)
    return {
        "bytes_per_second": 2e3 * source.nbytes / times["copy"],
        "flops_per_second": 2e3 * extent**3 / times["matmul"],
    }


def measure(operation, size, device, dtype, runs, seconds, limit):
    """A record for every peer at one size."""
    module = load(operation)
    if device == "cuda":
        torch.compiler.reset()  # a function is compiled for so many sizes only
    tensors = module.inputs(device, dtype, **size)
    passes = {"forward": forward}
    if differentiable(tensors):
        passes["forward_backward"] = forward_backward
    peers, records = {}, {}
    for name, peer in all_peers(operation, device, size).items():
        records[name] = {"operation": operation, "size": size, "dtype": str(dtype)[6:], "peer": name}
        begin = time.perf_counter()
        try:
            for call in passes.values():
                call(peer, tensors)
            if device == "cuda":
                torch.cuda.synchronize()
            peers[name] = peer
            records[name]["first_seconds"] = round(time.perf_counter() - begin, 3)
        except Exception as error:  # any, of any package
            records[name]["error"] = failure(error)
        clear_gradients(tensors)
        if "error" in records[name] and not release(device):
            return [record for record in records.values() if "error" in record]
    work = module.work(torch.finfo(dtype).bits // 8, **size)
    for title, call in passes.items():
        calls = {name: partial(call, peer, tensors) for name, peer in peers.items()}
        times, errors = milliseconds(calls, device, runs, seconds)
        for name, error in errors.items():
            records[name]["error"] = error
            del peers[name]
        for name, value in times.items():
            records[name][f"{title}_ms"] = round(value, 4)
            records[name][f"{title}_time_ratio"] = round(value / times[next(iter(times))], 4)
            if name.startswith("book"):
                parts = ("forward", "backward") if title == "forward_backward" else ("forward",)
                for unit in ("bytes", "flops"):
                    amount = sum(work.get(f"{part}_{unit}", 0) for part in parts)
                    share = amount / (value / 1e3) / limit[f"{unit}_per_second"]
                    records[name][f"{title}_{unit}_fraction"] = round(share, 4)
    del tensors, calls
    release(device)
    peaks = {}
    for name, peer in peers.items():
        try:
            peaks[name] = peak_bytes(operation, size, dtype, name, peer, device)
        except Exception as error:  # any, of any package
            records[name]["error"] = failure(error)
    for name, value in peaks.items():
        records[name]["peak_bytes"] = value
        records[name]["memory_ratio"] = round(value / max(peaks[next(iter(peaks))], 1), 4)
    return list(records.values())


def line(record):
    size = " ".join(f"{key} {value}" for key, value in record["size"].items())
    start = f"{record['operation']:22} {size:44} {record['peer']:24}"
    if "error" in record:
        return f"{start} {record['error']}"
    both = (
        f"{record['forward_backward_ms']:10.2f} ms x{record['forward_backward_time_ratio']:<6.2f}"
        if "forward_backward_ms" in record
        else " " * 21
    )
    return (
        f"{start}{record['forward_ms']:10.2f} ms x{record['forward_time_ratio']:<6.2f}{both}"
        f"{record['peak_bytes'] / 2**20:9.1f} MiB x{record['memory_ratio']:.3f}"
    )


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        if row.startswith("model name"):
            return row.split(":")[1].strip()
    return platform.processor() or "CPU"


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def place(record):
    """Where a record belongs: its operation, and the place of its size among those of the operation."""
    sizes = [size for sizes in load(record["operation"]).SIZES.values() for size in sizes]
    return record["operation"], sizes.index(record["size"]) if record["size"] in sizes else len(sizes)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__.splitlines()[0].rstrip(":.")
    )
    known = operations()
    parser.add_argument("operations", nargs="*", metavar="operation", help=", ".join(known))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--sizes", choices=("smallest", "all"), default="all")
    parser.add_argument("--runs", type=int, default=50, help="runs of every peer at most")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each size and pass, once there are three runs"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.operations) - set(known):
        parser.error(f"unknown operation {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu measures the CPU paths of lib")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    name = machine(options.device)
    target = RESULTS / f"{name.lower().replace(' ', '-') if options.device == 'cuda' else 'cpu'}.json"
    earlier = json.loads(target.read_text()) if target.exists() else {}
    chosen = options.operations or known
    kept = [
        record
        for record in earlier.get("results", [])
        if record["operation"] in known
        and (
            record["operation"] not in chosen
            or record["size"] in load(record["operation"]).SIZES[options.device]
        )
    ]
    limit = limits(options.device, dtype)
    report = {
        "device": name,
        "kind": options.device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "limits": {key: float(f"{value:.3g}") for key, value in limit.items()},
    }
    target.parent.mkdir(exist_ok=True)
    for operation in chosen:
        sizes = load(operation).SIZES[options.device]
        for size in sizes[:1] if options.sizes == "smallest" else sizes:
            torch.manual_seed(0)
            try:
                found = measure(operation, size, options.device, dtype, options.runs, options.seconds, limit)
            except Exception as error:  # where the inputs do not fit, or the peers cannot be listed
                record = {"operation": operation, "size": size, "dtype": str(dtype)[6:], "peer": "all"}
                found = [record | {"error": failure(error)}]
            date = datetime.date.today().isoformat()
            found = [record | {"date": date} for record in found]
            for record in found:
                print(line(record), flush=True)
            kept = [r for r in kept if (r["operation"], r["size"]) != (operation, size)] + found
            report["results"] = sorted(kept, key=place)
            part = target.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(target)  # a run that is cut off leaves a whole file
            if not release(options.device):
                sys.exit(f"the GPU no longer answers; written so far: {target}")
    print(f"written: {target}")
