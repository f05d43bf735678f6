"""Time, memory and bandwidth of a device. A CPU has all of it too, so that a rehearsal runs it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import peak_extra_mib

# Of one line of the table: repetitions, and the seconds that they may take together.
REPETITIONS, SECONDS = 50, 0.6
# A kernel that idles so many cycles, about a millisecond, while the host queues what is timed.
_IDLE_CYCLES = 2_000_000
_COPIED_BYTES = 2**30

Step = Callable[..., Any]
Prepare = Callable[[], tuple[Any, ...]]


class Clock:
    """Times work on a GPU by its own events; what the host needs for launches is not in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 0) or 2**26
        self._evicting = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, step: Step, prepare: Prepare) -> list[float]:
        """Every repetition's time, on fresh arguments and with none of them in the L2 cache."""
        warm = self._once(step, prepare())
        for _ in range(2 if warm < SECONDS / 3 else 0):
            warm = self._once(step, prepare())
        begin, times = time.perf_counter(), []
        while len(times) < 3 or (
            len(times) < REPETITIONS and time.perf_counter() - begin < SECONDS
        ):
            times.append(self._once(step, prepare()))
        return times

    def _once(self, step: Step, arguments: tuple[Any, ...]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        self._evicting.fill_(1)
        torch.cuda._sleep(_IDLE_CYCLES)
        start.record()
        step(*arguments)
        stop.record()
        self.synchronize()
        return start.elapsed_time(stop) / 1e3

    def peak_extra(self, step: Step, prepare: Prepare) -> int | None:
        """The most that was allocated during a call beyond what is still there after it.

        So arguments, results and the gradients that the call leaves behind do not count.
        """
        arguments = prepare()
        self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        result = step(*arguments)
        self.synchronize()
        extra = torch.cuda.max_memory_allocated(self.device)
        extra -= torch.cuda.memory_allocated(self.device)
        del result
        return extra

    def free_memory(self) -> int:
        self.release()
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        """Gives what no tensor holds back to the device."""
        gc.collect()
        torch.cuda.empty_cache()

    def captured(self, step: Step, arguments: tuple[Any, ...]) -> Step:
        """The step as a CUDA graph, which takes its arguments from where they lie now."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            step(*arguments)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step(*arguments)

        def replay(*_: Any) -> Any:
            graph.replay()
            return result

        return replay

    def copy(self) -> tuple[Step, Prepare, int]:
        """A device-to-device copy as something to time, with the bytes it reads and writes."""
        return _copy(self.device, _COPIED_BYTES)


class HostClock(Clock):
    """The same interface on a CPU, for a rehearsal: its numbers mean nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        pass

    def seconds(self, step: Step, prepare: Prepare) -> list[float]:
        return [self._once(step, prepare()) for _ in range(2)]

    def _once(self, step: Step, arguments: tuple[Any, ...]) -> float:
        start = time.perf_counter()
        step(*arguments)
        return time.perf_counter() - start

    def peak_extra(self, step: Step, prepare: Prepare) -> int | None:
        peak = peak_extra_mib(step, *prepare())
        return None if peak is None else int(peak * 2**20)

    def free_memory(self) -> int:
        return 2**30

    def release(self) -> None:
        pass

    def captured(self, step: Step, arguments: tuple[Any, ...]) -> Step:
        return step

    def copy(self) -> tuple[Step, Prepare, int]:
        return _copy(self.device, 2**20)


def _copy(device: torch.device, size: int) -> tuple[Step, Prepare, int]:
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return lambda *_: target.copy_(source), lambda: (), 2 * source.nbytes


def clock_of(device: torch.device) -> Clock:
    return Clock(device) if device.type == "cuda" else HostClock(device)
