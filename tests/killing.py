"""Runs of condense.py that end before their time, many of them: importing PyTorch takes seconds, a tiny run less.

    with Server() as server:
        child = server.start([*TINY, "--results_dir", "results"], at=40, then="kill")
        ended = child.wait()                    # status as in subprocess, standard output and error

The server is a process that has imported everything and computed nothing; each run is a fork of it that ends as the
program does. What happens to a run's files comes from tests/sabotage.py.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import importlib
import io
import json
import os
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from torch.distributed import TCPStore

from tests import sabotage
from tests.outcome import Outcome, metrics, outcome
from tests.tally import Fault
from utils.files import atomic
from utils.runs.folder import valid_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = shlex.split(
    "--device cpu --ipc 2 -f 2 --niter 3 --inner_loop 2 --interval 2 --batch_real 8 --n_data 16 --width 8 --epochs 1 "
    "--repeat 1 --eval_every 2 --snapshot_every 2"
)
CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")
REASONS = {  # by the name of an errno
    "ENOSPC": "No space left on device",
    "EDQUOT": "Disk quota exceeded",
    "EFBIG": "File too large",
    "EROFS": "Read-only file system",
    "EIO": "Input/output error",
    "EACCES": "Permission denied",
}
CHECKPOINT_WRITE = "write", ".checkpoint.pt.part"
FOLDER = Path("digits", "convnet2_f2_ipc2")  # of such a run, below the results folder


def tiny(results: Path | str, *flags: str) -> list[str]:
    """The command line of a run of half a second."""
    return [*TINY, "--results_dir", str(results), *flags]


Case = TypeVar("Case")
PIPE_BYTES = 2**20  # what a run can print before anybody reads it


@dataclass(frozen=True)
class Plan:
    """A run, and everything that is not as in `python3 condense.py *argv`."""

    argv: list[str]
    stdout: str = "read"  # or `closed`, `broken` (a pipe that nobody reads), or the path of anything that can be opened
    stderr: str = "read"
    cwd: str = str(ROOT)
    terminal: str = ""  # path of the one that the run has to itself, in place of the above
    ignored: tuple[int, ...] = ()  # signals, as under nohup
    checkpoint_seconds: float = 0.0  # between checkpoints: by default there is one after every step
    wild_clock: bool = False  # time.time is years off, now here, now there
    file_bytes: int | None = None  # no file becomes larger
    plain_user: bool = False  # root's right to write anywhere is dropped
    root: str = ""  # the folder whose operations count for `at` and `record`
    at: int | None = None  # the number of the operation at which `then` happens
    then: str = "kill"  # before it, `halfway` through it if it writes; signals such as `SIGINT SIGINT`, which the run
    # sends to itself; or an errno's name, with which it fails, and everything after it
    record: str = ""  # a file that is to list the operations
    program: str = "condense:main"  # module and function, which is given argv
    environment: dict[str, str] = field(default_factory=dict)  # added to the server's
    computing: int | None = None  # the number of the computation at which `then` happens, in place of an operation;
    # `full` says that the memory is, then and later


@dataclass(frozen=True)
class Ended:
    """status: of exit, or minus the number of the signal that killed it."""

    status: int
    out: str
    err: str


class Child:
    """A run under way."""

    def __init__(self, server: Server, pid: int) -> None:
        self.server, self.pid = server, pid
        self.store: TCPStore | None = None

    def send(self, number: int) -> None:
        """A signal; none if it is over. Its number is not given to another process before `wait`."""
        os.kill(self.pid, number)

    @property
    def paused(self) -> bool:
        """Whether SIGSTOP has stopped it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].startswith("T")

    def until_paused(self, seconds: float = 60.0) -> None:
        """Wait until SIGSTOP has stopped it."""
        deadline = time.monotonic() + seconds
        while not self.paused and time.monotonic() < deadline:
            time.sleep(0.01)

    def wait(self, seconds: float = 60.0) -> Ended:
        """Its end. A run that takes longer is killed, and TimeoutError raised."""
        handle = os.pidfd_open(self.pid)
        late = not select.select([handle], [], [], seconds)[0]
        os.close(handle)
        if late:
            self.send(signal.SIGKILL)
        answer = self.server.ask({"reap": self.pid})
        if late:
            raise TimeoutError(f"still running after {seconds} s: {answer['out']}\n{answer['err']}")
        return Ended(answer["status"], answer["out"], answer["err"])


class Server:
    """The other process, while the block runs."""

    def __init__(self, *before: str) -> None:
        """before: a command that starts the one that follows it, such as unshare."""
        self._process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.killing"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._turn = threading.Lock()
        self.pid = int(self.ask({"hello": True})["pid"])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.communicate()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._turn:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the server has ended"
        found = json.loads(answer)
        assert isinstance(found, dict)
        return found

    def start(self, argv: Sequence[str], **plan: Any) -> Child:
        """plan: fields of Plan."""
        return Child(self, self.ask(asdict(Plan(list(argv), **plan)))["pid"])

    def run(self, argv: Sequence[str], **plan: Any) -> Ended:
        return self.start(argv, **plan).wait()


def start_group(
    server: Server, count: int, argv: Sequence[str], *, of: Mapping[int, dict[str, Any]] | None = None, **plan: Any
) -> list[Child]:
    """As many ranks as torchrun would start on one machine, without it: nobody ends those that are left.

    of: fields of single ranks' Plan.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where ranks look for each other
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",  # where no name is resolved
    }
    children = []
    for rank in range(count):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(server.start(argv, environment=environment, **{**plan, **(of or {}).get(rank, {})}))
        children[-1].store = store  # as long as one of them is of interest
    return children


def run_group(server: Server, count: int, argv: Sequence[str], **plan: Any) -> list[Ended]:
    return [child.wait() for child in start_group(server, count, argv, **plan)]


def program(results: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """The real command, with the output buffered as usual."""
    argv = [sys.executable, str(ROOT / "condense.py"), *tiny(results, *flags)]
    usual = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**usual, **environment}
    )


def finished(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


def two_at_a_time(check: Callable[[Case], None], cases: Sequence[Case]) -> None:
    """Call it for every case. Raises what the first one raises that fails."""
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(check, cases):
            pass


# --- What a run does to its files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """at: its number, as in Plan. what: see tests/sabotage.py. file: its name, without the folder."""

    at: int
    what: str
    file: str


def recorded(server: Server, results: Path, argv: Sequence[str], **plan: Any) -> list[Operation]:
    """The operations below the results folder of a run, which has to end well."""
    record = results.with_name(f"{results.name}_operations")
    ended = server.run(argv, root=str(results), record=str(record), **plan)
    assert (ended.status, ended.err) == (0, ""), ended
    lines = (line.split(" ", 1) for line in record.read_text().splitlines())
    return [Operation(at, what, Path(name).name) for at, (what, name) in enumerate(lines)]


def one_of_each_kind(operations: Sequence[Operation]) -> list[Operation]:
    """Of those that do the same to the same file, the one in the middle."""
    kinds: dict[tuple[str, str], list[Operation]] = {}
    for operation in operations:
        kinds.setdefault((operation.what, operation.file), []).append(operation)
    return [same[len(same) // 2] for same in kinds.values()]


# --- What a run leaves ------------------------------------------------------------------------------------------------


def goes_on(server: Server, results: Path, undisturbed: Outcome, fault: Fault, *flags: str) -> None:
    """The same command ends as it does when nothing happens, and nothing is left that does not belong there."""
    must_be(undisturbed, server.run(tiny(results, *flags)), results / FOLDER, fault)
    shutil.rmtree(results)


def must_be(undisturbed: Outcome, ended: Ended, folder: Path, fault: Fault) -> None:
    """A run that has ended well, with its expected result and files that are whole."""
    there = outcome(folder) if ended.status == 0 else None
    if there != undisturbed:
        print(ended, there, undisturbed, sep="\n")
    fault.kept(there == undisturbed)
    assert ended.err == ""
    left = {path.name for path in (*folder.glob(".*"), *folder.parent.parent.glob(".*"))}
    assert left <= ({".lock"} if "this run is finished" in ended.out else set())  # nobody's, and in nobody's way
    atomic.read_json(folder / "options.json")
    sessions = [event["session"] for event in metrics(folder) if "session" in event]
    assert sessions == sorted(set(sessions))


def must_say(ended: Ended, reason: str, results: Path) -> None:
    """One line that names a file, and checkpoints that are whole as far as there are any."""
    assert ended.status == 1, ended
    assert re.fullmatch(rf"condense\.py: error: [^\n]*{REASONS[reason]}[^\n]*\n", ended.err), ended
    assert str(results) in ended.err, ended
    for name in CHECKPOINTS:
        if (file := results / FOLDER / name).exists():
            valid_checkpoint(file)
    assert reason in ("EROFS", "EIO") or not list((results / FOLDER).glob(".*.part"))  # where it can be removed


def the(operations: list[Operation], what: str, file: str) -> Operation:
    """One operation of this kind."""
    return next(o for o in one_of_each_kind(operations) if (o.what, o.file) == (what, file))


# --- The server's side ------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until standard input ends; a child runs its plan and does not return."""
    import sklearn.datasets  # noqa: F401
    import torchvision.datasets  # noqa: F401

    import condense  # noqa: F401
    import train  # noqa: F401
    from utils.system import process

    with suppress(ImportError):
        import torch.utils.tensorboard  # noqa: F401

    readers: dict[int, dict[str, int]] = {}  # by the number of the child
    for line in sys.stdin:
        request = json.loads(line)
        if "hello" in request:
            answer: dict[str, Any] = {"pid": os.getpid()}
        elif "reap" in request:
            answer = reap(request["reap"], readers.pop(request["reap"]))
        else:
            plan = Plan(**request)
            streams = {"out": output(plan.stdout), "err": output(plan.stderr)}
            if (pid := os.fork()) == 0:
                arrange(plan, [writer for _, writer in streams.values()])
                end_of(partial(process.run_main, named(plan.program)))
            for _, writer in streams.values():
                if writer is not None:
                    os.close(writer)
            readers[pid] = {name: reader for name, (reader, _) in streams.items() if reader is not None}
            answer = {"pid": pid}
        os.write(1, (json.dumps(answer) + "\n").encode())
    for pid in readers:  # of a test that failed before it waited for them
        os.kill(pid, signal.SIGKILL)


def named(program: str) -> Callable[[Sequence[str]], int]:
    module, _, function = program.partition(":")
    found: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return found


def output(where: str) -> tuple[int | None, int | None]:
    """Where a child's output is read, and where it goes."""
    if where == "closed":
        return None, None
    if where not in ("read", "broken"):
        return None, os.open(where, os.O_WRONLY | os.O_CREAT, 0o644)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(reader, False)
    if where == "broken":
        os.close(reader)
        return None, writer
    return reader, writer


def reap(pid: int, readers: dict[str, int]) -> dict[str, Any]:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = {name: all_of(reader).decode(errors="backslashreplace") for name, reader in readers.items()}
    return {"status": status, "out": "", "err": "", **texts}


def all_of(reader: int) -> bytes:
    with open(reader, "rb") as pipe:
        return pipe.read() or b""


# --- The child's side -------------------------------------------------------------------------------------------------


def arrange(plan: Plan, writers: list[int | None]) -> None:
    """Make a fork of the server what the plan says."""
    os.chdir(plan.cwd)
    if plan.terminal:
        os.setsid()
        terminal = os.open(plan.terminal, os.O_RDWR)  # a new session's first one is its own
        streams: list[int | None] = [terminal, terminal, terminal]
    else:
        streams = [os.open(os.devnull, os.O_RDONLY), *writers]
    kept = [None if stream is None else fcntl.fcntl(stream, fcntl.F_DUPFD, 64) for stream in streams]
    for number, stream in enumerate(kept):
        os.close(number)
        if stream is not None:
            os.dup2(stream, number)
    os.closerange(3, 128)
    sys.stdout = standard_stream(1, line_buffering=bool(plan.terminal))
    sys.stderr = standard_stream(2, line_buffering=True)
    sys.argv = [f"{plan.program.partition(':')[0]}.py", *plan.argv]
    os.environ.update(plan.environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    for number in plan.ignored:
        signal.signal(number, signal.SIG_IGN)
    if plan.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.file_bytes, plan.file_bytes))
    if plan.plain_user:
        drop_override()
    if plan.wild_clock:
        sabotage.derange_clock()
    if plan.computing is not None:
        sabotage.interrupt(plan.computing, plan.then)
    elif plan.root:
        sabotage.watch(plan.root, at=plan.at, then=plan.then, record=plan.record)
    from utils.runs import folder as run
    from utils.system import distributed

    distributed.LAST_WORDS = 0.2  # nobody ends the others
    run.CHECKPOINT_SECONDS = plan.checkpoint_seconds


def drop_override() -> None:
    """Take root's CAP_DAC_OVERRIDE, which lets it write where permissions forbid it, from this process."""
    libc, version_3, override = ctypes.CDLL(None, use_errno=True), 0x20080522, 1 << 1
    header, sets = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable
    if libc.capget(header, sets) == 0:
        sets[0] &= ~override
        libc.capset(header, sets)


def standard_stream(number: int, *, line_buffering: bool) -> Any:
    """As Python makes sys.stdout and sys.stderr at its start."""
    try:
        return io.TextIOWrapper(open(number, "wb"), encoding="utf-8", line_buffering=line_buffering)
    except OSError:
        return None


def end_of(program: Callable[[], NoReturn]) -> NoReturn:
    """Run it, and leave as the interpreter does, but without freeing its modules: in a fork, that takes a second."""
    status = 1
    try:
        program()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        try:
            if output is not None:
                output.flush()
        except OSError:
            status = 120
    os._exit(status)


if __name__ == "__main__":
    serve()
