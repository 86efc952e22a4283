"""The command line: what it prints, its exit codes, and nothing lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcl import cli

TINY = Path(__file__).parent / "tiny.toml"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """`fedcl run` sets flags for its process; other tests' children must not see them."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def call(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words])


def test_help_names_every_command():
    out = call("--help").output
    assert all(name in out for name in ("run", "list", "report", "show-stream"))


def test_list_has_one_line_for_each():
    result = call("list")
    assert result.exit_code == 0
    for line in ("quickstart", "ewc", "replay", "fedadam", "class_incremental", "vit"):
        assert line in result.output
    assert "Appends remembered rows" in result.output


def test_every_name_that_a_file_takes_is_listed():
    from fedcl import _experiment_methods as _methods
    from fedcl import _experiment_names as _names

    words = set(re.findall(r"[\w-]+", call("list").output))
    for known in (
        *(_methods.methods, _methods.algorithms, _methods.servers, _methods.makers),
        *(_methods.switches, _methods.detectors, _methods.predicates),
    ):
        assert words >= set(known()), set(known()) - words
    found = _names.choices()
    assert {"data.source", "model.kind", "stream.drift.kind"} <= set(found)
    assert {"pretrained", "decoder", "vit"} <= set(found["model.kind"])
    for path, given in found.items():
        assert words >= set(given), (path, set(given) - words)
    assert words >= {"packed", "tokenised", "eras", "distil", "lora_only", "fedkseed"}


def test_run_writes_and_prints_everything(tmp_path):
    out = tmp_path / "run"
    result = call("run", TINY, "--out", out)
    assert result.exit_code == 0, result.output
    assert "forgetting" in result.output and "replay" in result.output
    found = {p.name for p in out.iterdir()}
    assert found >= {
        "summary.json",
        "R.csv",
        "history.npz",
        "experiment.toml",
        "report.html",
        "matrix.png",
        "stream.png",
        "checkpoints",
    }
    # The same directory again is refused, and left as it is.
    before = (out / "summary.json").read_bytes()
    again = call("run", TINY, "--out", out)
    assert again.exit_code == 2 and "--resume" in again.stderr
    assert (out / "summary.json").read_bytes() == before
    # The report is rebuilt from the history alone.
    (out / "report.html").unlink()
    rebuilt = call("report", out)
    assert rebuilt.exit_code == 0 and (out / "report.html").stat().st_size > 50_000


def test_two_devices_give_the_result_of_one(tmp_path):
    shards = ("--set", "federation.shards=2", "--set", "federation.cohort=2")
    one = call("run", TINY, "--out", tmp_path / "one", *shards)
    two = call("run", TINY, "--out", tmp_path / "two", *shards, "--devices", 2)
    assert one.exit_code == two.exit_code == 0, two.output
    a, b = ((tmp_path / name / "R.csv").read_text() for name in ("one", "two"))
    assert a == b


def test_a_cpu_is_as_many_devices_as_are_asked_for(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    cli._compile_quickly(3)
    assert "--xla_force_host_platform_device_count=3" in os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=5")
    cli._compile_quickly(3)
    assert "device_count=3" not in os.environ["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["run", TINY, "--devices", 2], ["federation.shards", "multiple of 2"]),
        (["run", TINY, "--devices", 99], ["99 devices", "there are 8"]),
        (["run", TINY, "--devices", 2, "--distributed"], ["leave --devices out"]),
        (["run", "quickstrat"], ['did you mean "quickstart"']),
        (["run", "no/such.toml"], ["no/such.toml", "cannot be read"]),
        (["run", TINY, "--set", "federation.cohrt=3"], ['mean "cohort"']),
        (["run", TINY, "--set", "federation"], ["key=value"]),
        (["report", "/nowhere"], ["no finished run"]),
        (["show-stream", TINY, "--set", "stream.clients=0"], ["stream.clients"]),
    ],
)
def test_bad_input_is_one_clear_block(words, fragments):
    result = call(*words)
    assert result.exit_code == 2
    assert all(f in result.stderr for f in fragments), result.stderr
    assert "Traceback" not in result.output
    assert any(line.startswith("error: ") for line in result.stderr.splitlines())


def test_a_package_of_an_extra_is_named_with_the_extra(monkeypatch):
    def load(*given):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf.constants")

    monkeypatch.setattr("fedcl.experiment.load", load)
    result = call("run", TINY)
    assert result.exit_code == 2
    assert "pip install 'fedcl-jax[fm]'" in result.output
    assert cli._extra_of("no_such_module") is None


def test_a_directory_that_cannot_be_written_is_told_before_computing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    result = call("run", TINY, "--out", blocked / "run")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr and "--out" in result.stderr


def test_results_are_printed_even_if_they_cannot_be_written(tmp_path, monkeypatch):
    from fedcl import _experiment_results as _results

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_results.np, "savez_compressed", full)
    result = call("run", TINY, "--out", tmp_path / "run", "--set", "checkpoint.every=0")
    assert result.exit_code == 1
    assert "No space left" in result.stderr and "fedavg" in result.stdout


def test_show_stream_draws(tmp_path):
    path = tmp_path / "stream.png"
    result = call("show-stream", TINY, "--out", path)
    assert result.exit_code == 0 and path.read_bytes().startswith(b"\x89PNG")


def start(out):
    """A run of thousands of rounds in a process of its own, some of them saved."""
    words = [sys.executable, "-m", "fedcl.cli", "run", str(TINY), "--out", str(out)]
    words += ["--set", "stream.rounds_per_context=2000", "--set", "checkpoint.every=1"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    history = out / "checkpoints" / "fedavg" / "history"
    while process.poll() is None and len(list(history.glob("*.npz"))) < 3:
        time.sleep(0.05)
    return process


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    process = start(tmp_path / "stopped")
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 130, text
    assert f"--out {tmp_path / 'stopped'} --resume" in text
    assert "Traceback" not in text
    steps = tmp_path / "stopped" / "checkpoints" / "fedavg" / "steps"
    assert any(p.name.isdigit() for p in steps.iterdir())


def test_summary_is_json_with_every_key(tmp_path):
    out = tmp_path / "run"
    assert call("run", TINY, "--out", out).exit_code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]) == {"fedavg", "replay", "joint"}
    keys = (
        "average forgetting bwt anytime worst_client bytes_up bytes_down rounds seconds"
    )
    for values in summary["arms"].values():
        assert all(set(values[k]) == {"mean", "std", "each"} for k in keys.split())
        assert 0 <= values["average"]["mean"] <= 1
