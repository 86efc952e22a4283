"""A federation of processes on this machine, against the same run in one process.

One SuperLink and three SuperNodes serve the app beside this file; with --kill a node is
killed in the middle (SIGKILL) and started again; with --simulation Flower's simulation
runs the same app on three virtual nodes (the extra `flwr[simulation]`).

    python benchmarks/flower/localhost.py --kill

Prints the largest difference between the parameters and fails if it is above 1e-6.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

APP = Path(__file__).parent / "app"
BIN = Path(sys.executable).parent
TOLERANCE = 1e-6


def main() -> int:
    """Runs the federation, then the same in this process, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kill", action="store_true", help="kill and restart a node")
    parser.add_argument("--simulation", action="store_true", help="Ray, no nodes")
    parser.add_argument("--timeout", type=float, default=600.0, help="of a round, in s")
    parser.add_argument("--keep", type=Path, help="a folder for logs and states")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that all processes end.
    with contextlib.ExitStack() as stack:
        if args.keep is None:
            temporary = stack.enter_context(tempfile.TemporaryDirectory())
        folder = (args.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        kind = None if args.simulation else args.kill
        federate(folder, args.rounds, kind, args.timeout)
        seconds = time.perf_counter() - start
        gap = difference(folder / "params.npz", args.rounds)
    told = {"rounds": args.rounds, "killed": args.kill, "simulation": args.simulation}
    print(json.dumps({**told, "seconds": round(seconds, 1), "difference": gap}))
    return 0 if gap <= TOLERANCE else 1


def federate(folder: Path, rounds: int, kill: bool | None, timeout: float) -> None:
    """`flwr run` and what it needs; leaves params.npz in the folder.

    Args:
      folder: for logs, states and results.
      rounds: of the federation.
      kill: whether to kill a node; None: no nodes but a simulation.
      timeout: of a round, in seconds.
    """
    environment = _environment(folder)
    link, *ports = _free_ports(4)
    connection = f'address = "127.0.0.1:{link}"\ninsecure = true\n'
    config = f'[superlink]\ndefault = "here"\n[superlink.here]\n{connection}'
    (folder / "home").mkdir(exist_ok=True)
    (folder / "home" / "config.toml").write_text(config)
    at = ["--insecure", "--host", "127.0.0.1", "--port"]
    superlink = ["flower-superlink", "--disable-runtime-dependency-installation", *at]

    def node(i: int) -> contextlib.AbstractContextManager[subprocess.Popen]:
        told = f"partition-id={i} directory='{folder / f'node-{i}'}'"
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{link}", *at]
        command += [str(ports[i]), "--node-config", told]
        return _process(command, folder / f"node-{i}.log", environment)

    said = f"directory='{folder}' rounds={rounds} timeout={timeout}"
    run = ["flwr", "run", str(APP), "here", "--stream", "-c", said]
    if kill is None:
        superlink.insert(1, "--simulation")
        run += ["--federation-config", "num-supernodes=3"]
    with contextlib.ExitStack() as stack:
        start = lambda command, log: stack.enter_context(
            _process(command, folder / log, environment)
        )
        start([*superlink, str(link)], "superlink.log")
        _until(lambda: _listens(link), 120, "the SuperLink")
        if kill is not None:
            nodes = [stack.enter_context(node(i)) for i in range(3)]
        start(run, "run.log")
        if kill:
            visited = lambda: _visited(folder / "node-1") or _finished(folder)
            _until(visited, timeout, "a visit of client 1")
            _end(nodes[1], signal.SIGKILL)
            stack.enter_context(node(1))
        done = lambda: _finished(folder)
        _until(done, rounds * timeout, "the last round")


def difference(path: Path, rounds: int) -> float:
    """The largest difference between saved parameters and those of one process."""
    sys.path.insert(0, str(APP))
    import jax
    import numpy as np
    from digits.task import federation

    import fedcl
    from fedcl import tree

    f = federation()
    n = f.stream.num_clients
    state = f.algorithm.init(f.params, f.stream.example(), num_clients=n)
    state, _ = fedcl.run(
        f.algorithm, state, f.stream, key=f.key, rounds=rounds, schedule="scan"
    )
    leaves = jax.tree_util.tree_flatten_with_path(state.server.params)[0]
    with np.load(path, allow_pickle=False) as saved:
        gaps = [np.max(np.abs(saved[tree.path_string(p)] - x)) for p, x in leaves]
    return float(max(gaps))


def _environment(folder: Path) -> dict[str, str]:
    own = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "home"),
        "DIGITS_STATES": str(folder / "states"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Flower starts a process per message: each finds what the first compiled.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **own}


@contextlib.contextmanager
def _process(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen]:
    """A process with children, all of which end with it."""
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process, signal.SIGTERM)


def _end(process: subprocess.Popen, how: signal.Signals) -> None:
    for kind in (how, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
            if kind is signal.SIGKILL:
                return


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _visited(directory: Path) -> bool:
    return any(directory.glob("*/client-*.npz"))


def _finished(folder: Path) -> bool:
    """Whether the result is there; an error of the server ends the wait."""
    log = (folder / "run.log").read_text(errors="replace")
    if "raised an exception" in log or "Traceback" in log:
        raise RuntimeError(f"The server failed:\n{log[-3000:]}")
    return (folder / "loss.csv").exists()


def _until(happened, seconds: float, what: str) -> None:
    stop = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > stop:
            raise TimeoutError(f"Waited {seconds:g} s for {what}.")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
