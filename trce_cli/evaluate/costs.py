"""What an evaluation takes: seconds, images a second, and peak memory, phase by phase."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.system.machine import peak_memory_bytes

if TYPE_CHECKING:
    import torch


@contextmanager
def phase(costs: list[dict[str, Any]], name: str, device: "torch.device") -> Iterator[dict[str, Any]]:
    """Take the time and the peak memory of the block; the block may fill in `images`."""
    import torch

    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cost: dict[str, Any] = {"phase": name}
    costs.append(cost)
    start = time.monotonic()
    yield cost
    cost["seconds"] = seconds = time.monotonic() - start
    if images := cost.get("images"):
        cost["images_per_second"] = images / seconds
    cost["peak_memory_bytes"] = peak_memory_bytes()
    if device.type == "cuda":
        cost["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)


def gather_costs(team: Any, costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The costs of all processes by phase: the longest time, all images, the highest peak of one process."""
    if team.num_processes == 1:
        return costs
    from accelerate.utils import gather_object

    return merge_costs(gather_object(costs))


def merge_costs(costs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The costs of several processes or shards by phase, in the same way."""
    merged: dict[str, dict[str, Any]] = {}
    for cost in costs:
        total = merged.setdefault(cost["phase"], {"phase": cost["phase"]})
        if "images" in cost:
            total["images"] = total.get("images", 0) + cost["images"]
        for key in cost.keys() & {"seconds", "peak_memory_bytes", "peak_device_memory_bytes"}:
            total[key] = max(total.get(key, 0), cost[key])
    for total in merged.values():
        if (images := total.get("images")) and total["seconds"]:
            total["images_per_second"] = images / total["seconds"]
    return list(merged.values())
