"""Time and memory on a device. A CPU is timed too, so that a rehearsal runs all of the code."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

# Limits of one line of the table: repetitions, and the seconds they may take together.
REPETITIONS, SECONDS = 40, 0.4
# Cycles, about a millisecond, that a kernel idles while the host queues the timed work.
_IDLE_CYCLES = 2_000_000

Step = Callable[..., Any]
Prepare = Callable[[], tuple[Any, ...]]


class Clock:
    """Times work on a GPU by its events, without the host's time for launches."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
            self._evicting = torch.zeros(4 * cache, dtype=torch.uint8, device=device)

    def seconds(self, step: Step, prepare: Prepare) -> list[float]:
        """Return each repetition's time, on fresh arguments that are not in the L2 cache."""
        if not self.on_gpu:
            arguments, begin = prepare(), time.perf_counter()
            step(*arguments)
            return [time.perf_counter() - begin] * 2  # the value is not used
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 5 or (
            len(times) < REPETITIONS and time.perf_counter() - begin < SECONDS
        ):
            arguments = prepare()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._evicting.sum()  # reading leaves nothing to be written back during the timing
            torch.cuda._sleep(_IDLE_CYCLES)
            start.record()
            step(*arguments)
            stop.record()
            torch.cuda.synchronize(self.device)
            times.append(start.elapsed_time(stop) / 1e3)
        return times[2:]  # the first two are warm-up

    def peak_extra(self, step: Step, prepare: Prepare) -> int | None:
        """Return the peak of memory during a call above what remains allocated after it.

        So arguments, results and the gradients that the call leaves behind do not count.
        """
        if not self.on_gpu:
            return None
        arguments = prepare()
        self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        result = step(*arguments)
        torch.cuda.synchronize(self.device)
        extra = torch.cuda.max_memory_allocated(self.device)
        extra -= torch.cuda.memory_allocated(self.device)
        del result
        return extra

    def release(self) -> None:
        """Release a GPU's unused memory and wait for the GPU."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def captured(self, step: Step, arguments: tuple[Any, ...]) -> Step:
        """Return the step as a CUDA graph, which reads its arguments at their present addresses."""
        if not self.on_gpu:
            return step
        step(*arguments)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step(*arguments)

        def replay(*_: Any) -> Any:
            graph.replay()
            return result

        return replay
