"""The machine's memory, as far as the system tells: what is free, within the limits of containers, and what was taken.

Linux says so itself, with the limits of SLURM and Docker (cgroups). Elsewhere psutil is asked if it is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MEMINFO = Path("/proc/meminfo")
MEMBERSHIP = Path("/proc/self/cgroup")  # the control groups of this process
CGROUPS = Path("/sys/fs/cgroup")
UNKNOWN = 8 * 10**9  # bytes that are taken to be free where nothing says how many are
# Files of a control group, by version: its limit, what is taken; and what its memory.stat calls files only cached.
FIELDS = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free() -> int:
    """Bytes of memory that this process may still take: what the machine has left, or a container's limit if less."""
    return min(_of_the_machine(), *_of_control_groups())


def _of_the_machine() -> int:
    with suppress(OSError, KeyError, ValueError):  # Linux, with the cache that it would give back
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    with suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().available)
    with suppress(AttributeError, OSError, ValueError):  # all there is, as macOS says
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return UNKNOWN


def _of_control_groups() -> Iterator[int]:
    """What every control group of this process, and every group around it, leaves below its limit; at least 0."""
    yield sys.maxsize
    with suppress(OSError, ValueError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root, names = (CGROUPS / "memory", FIELDS[1]) if controllers else (CGROUPS, FIELDS[2])
                innermost = root / path.lstrip("/")
                # In a container the path may be the one outside of it: then the root is the container's own group.
                for folder in (innermost, *innermost.parents):
                    if folder.is_relative_to(root):
                        yield from _below_limit(folder, *names)


def _below_limit(folder: Path, limit: str, taken: str, cached: str) -> Iterator[int]:
    """Nothing where there is no limit."""
    with suppress(OSError, ValueError):  # ValueError: the limit is "max"
        left = int((folder / limit).read_text()) - int((folder / taken).read_text())
        with suppress(OSError, KeyError, ValueError):
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left += int(statistics[cached])
        yield max(0, left)


def peak() -> int:
    """Most bytes of memory that this process has held at a time; 0 where the system does not tell."""
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with suppress(ImportError):
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))  # as Windows calls it
    return 0
