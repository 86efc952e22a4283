"""The command line: `fedcl run`, `fedcl list`, `fedcl report`, `fedcl show-stream`.

What is heavy is imported inside the commands, so that help is quick.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from fedcl.experiment import Event

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
Experiment = Annotated[
    str, typer.Argument(help="A shipped experiment (see fedcl list), or FILE.toml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Changes one setting, as a.b=3."),
]
Preset = Annotated[
    str | None,
    typer.Option(help="A smaller version that the experiment has, such as tiny."),
]
Small = Annotated[
    bool, typer.Option("--small", help="The same as --preset small, for a laptop.")
]
Debug = Annotated[bool, typer.Option(help="Shows Python's traceback of an error.")]

app = typer.Typer(
    name="fedcl",
    help="Federated continual learning, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point."""
    app()


@app.command()
def run(
    experiment: Experiment,
    out: Annotated[
        Path | None, typer.Option(help="Where results go; runs/NAME by default.")
    ] = None,
    set_: Overrides = None,
    preset: Preset = None,
    small: Small = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continues a run that was stopped.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(help="Spreads the clients over so many devices, or CPU cores."),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option("--distributed", help="Over all devices of all processes."),
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0, with --distributed.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    process: Annotated[int | None, typer.Option(help="This one, from 0.")] = None,
    memory: Annotated[
        str,
        typer.Option(
            metavar="refuse|report|ignore",
            help="What follows if an arm will not fit; ignore does not ask.",
        ),
    ] = "refuse",
    cache: Annotated[
        bool, typer.Option(help="Keeps compiled programs for the next run.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Runs an experiment and writes its numbers, pictures and report."""
    with _clear_errors(debug, f"fedcl run {experiment}", out):
        from fedcl import _hosts
        from fedcl import experiment as x

        given = x.load(experiment, set_ or (), preset or ("small" if small else None))
        folder = out or Path("runs") / given.name
        _compile_quickly(devices or 1)
        kept = _keep_programs(cache)
        mesh = _joined(devices, distributed, coordinator, processes, process)
        with _display() as tell:
            if _hosts.first():
                tell(x.Event(kept))
            options: dict[str, Any] = {"mesh": mesh, "memory": memory}
            result = x.run(given, folder, resume=resume, progress=tell, **options)
        if _hosts.several() and not _hosts.first():
            return  # Process 0 speaks.
        for summary in result.summary.get("points", {"": result.summary}).values():
            _table(summary)
        if result.unwritten:
            _fail(FAILED, f"{result.unwritten}. The numbers above are complete.")
        page = "grid.md" if given.grid else "report.html"
        _print(f"Results in {folder}; open {folder / page}")


@app.command("list")
def list_() -> None:
    """Lists experiments, and every name that a file of one takes."""
    from rich.table import Table

    from fedcl import _experiment_names as _names

    for title, found in _names.groups().items():
        table = Table("name", "what it is", title=title, title_justify="left")
        for name, text in found.items():
            table.add_row(name, text.replace("[", "\\["))
        _print(table)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Of a run.")]) -> None:
    """Writes the report of a finished run again, from its history."""
    with _clear_errors(False, f"fedcl report {folder}", folder):
        from fedcl import report as r

        _print(f"Wrote {r.rebuild(folder)}")


@app.command()
def show_stream(
    experiment: Experiment,
    out: Annotated[Path | None, typer.Option(help="The picture's file.")] = None,
    set_: Overrides = None,
) -> None:
    """Draws who is in which context when."""
    with _clear_errors(False, f"fedcl show-stream {experiment}", out):
        from fedcl import experiment as x
        from fedcl import report as r

        given = x.load(experiment, set_ or ())
        path = out or Path(f"{given.name}-stream.png")
        _print(f"Wrote {r.show_stream(given, path)}")


def _joined(
    devices: int | None,
    distributed: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> Any:
    """The mesh over these devices, or over all of all processes; or None."""
    if distributed and devices is not None:
        raise ValueError("--distributed takes all devices: leave --devices out.")
    if not distributed:
        if (coordinator, processes, process) != (None, None, None):
            raise ValueError(
                "--coordinator, --processes and --process say where the processes of "
                "one run are: give --distributed with them."
            )
        if devices is None:
            return None
    from fedcl import tpu

    if distributed:
        tpu.start(coordinator, processes, process)
    return tpu.mesh(devices)


def _compile_quickly(devices: int) -> None:
    """On a CPU, lets XLA optimise less: half the compile time, the same speed.

    Measured on the quickstart. It must be said before JAX first computes, as must be how
    many devices a CPU is; a user's own choice stands. Later versions than 0.10 no longer
    know the flag of the emitters.
    """
    given = os.environ.get("XLA_FLAGS", "")
    wanted = ["xla_backend_optimization_level=1"]
    if devices > 1:
        wanted.append(f"xla_force_host_platform_device_count={devices}")
    if version("jaxlib").startswith("0.10."):
        wanted.append("xla_cpu_use_fusion_emitters=false")
    plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    if any(map(find_spec, plugins)) and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    new = [f"--{flag}" for flag in wanted if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *new]).strip()


def _keep_programs(wanted: bool) -> str:
    """Lets JAX keep compiled programs in files; where, in a sentence.

    A place that the user gave JAX stands.
    """
    import jax

    from fedcl import _kept

    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return "compiled programs are not kept"
    given = jax.config.values["jax_compilation_cache_dir"]
    place = given or _kept.programs()
    if place is None:
        return f"compiled programs are not kept: {_kept.folder()} cannot be written"
    if not given:
        jax.config.update("jax_compilation_cache_dir", str(place))
        # Small ones too: a second run then compiles nothing.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return f"compiled programs are kept in {place} (--no-cache: they are not)"


@contextmanager
def _clear_errors(debug: bool, command: str, out: Path | None) -> Iterator[None]:
    """Turns errors into one clear block on stderr and an exit code."""
    try:
        yield
    except KeyboardInterrupt as e:
        where = "" if out is None else f" --out {out}"
        how = f"\nContinue with: {command}{where} --resume"
        _fail(INTERRUPTED, (str(e) or "Interrupted.") + how)
    except ImportError as e:
        extra = _extra_of(e.name or "")
        if debug or extra is None:
            raise
        _fail(BAD_INPUT, f"{e}. Install it: pip install 'fedcl-jax[{extra}]'")
    except Exception as e:
        if debug or not isinstance(e, _expected()):
            raise
        _fail(BAD_INPUT, str(e) if not isinstance(e, KeyError) else str(e.args[0]))


def _extra_of(module: str) -> str | None:
    """The extra of fedcl that brings a module, if there is one."""
    for line in requires("fedcl-jax") or ():
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"](\w+)", line)
        if package and extra and package[0].replace("-", "_") == module.split(".")[0]:
            return extra[1]
    return None


def _expected() -> tuple[type[Exception], ...]:
    from fedcl.checkpoint import CheckpointError
    from fedcl.rounds import FaultError

    return (CheckpointError, FaultError, ValueError, KeyError, OSError, MemoryError)


def _fail(code: int, text: str) -> NoReturn:
    print(f"error: {_speaker()}{text}", file=sys.stderr)
    raise typer.Exit(code)


def _speaker() -> str:
    """Which process and host this is, if there are several."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return ""
    here, count = jax.process_index(), jax.process_count()
    return f"process {here} of {count}, on {socket.gethostname()}: "


def _print(what: Any) -> None:
    from rich.console import Console

    # Piped output keeps its lines whole.
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120))
    Console(width=width).print(what)


@contextmanager
def _display() -> Iterator[Any]:
    """A live bar per arm on a terminal, a line per arm elsewhere."""
    from rich import progress as p
    from rich.console import Console

    columns = (
        p.TextColumn("{task.description:<10}"),
        p.BarColumn(),
        p.MofNCompleteColumn(),
        p.TextColumn("rounds"),
        p.TimeElapsedColumn(),
        p.TextColumn("{task.fields[accuracy]}"),
    )
    console = Console(stderr=True)
    with p.Progress(*columns, console=console, refresh_per_second=4) as bars:
        tasks: dict[str, Any] = {}

        def tell(event: "Event") -> None:
            if event.text:
                bars.console.print(event.text, highlight=False)
            if not event.arm:
                return
            if event.arm not in tasks:
                tasks[event.arm] = bars.add_task(
                    event.arm, total=event.rounds, accuracy="compiling"
                )
            if event.done:
                nats = event.metric == "nats"
                told = (
                    f"{event.accuracy:.3f}" if nats else f"{100 * event.accuracy:.1f} %"
                )
                text = f"{'nats/token' if nats else 'accuracy'} so far {told}"
                bars.update(tasks[event.arm], completed=event.done, accuracy=text)

        yield tell


def _table(summary: dict[str, Any]) -> None:
    from rich.table import Table

    seeds = len(summary["seeds"])
    table = Table(title=f"{summary['name']}: mean ± std over {seeds} seed(s)")
    table.add_column("arm")
    shown = {
        "average %": lambda a: _percent(a["average"]),
        "forgetting": lambda a: _percent(a["forgetting"]),
        "worst client %": lambda a: _percent(a["worst_client"]),
        "MB up": lambda a: f"{a['bytes_up']['mean'] / 1e6:.1f}",
        "MB down": lambda a: f"{a['bytes_down']['mean'] / 1e6:.1f}",
        "seconds": lambda a: f"{a['seconds']['mean']:.1f}",
    }
    if summary.get("metric") == "nats":
        from fedcl._experiment_nats import SHOWN as shown
    for name in shown:
        table.add_column(name, justify="right")
    for arm, values in summary["arms"].items():
        table.add_row(arm, *(show(values) for show in shown.values()))
    _print(table)


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


if __name__ == "__main__":
    main()
