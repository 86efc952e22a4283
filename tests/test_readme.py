"""The README is true: its examples run in order, and CI runs its test command."""

import re
from pathlib import Path

import jax.numpy as jnp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_examples_run_in_order():
    space = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), space)
    kernel = space["state"].server.params["head"]["kernel"]
    assert jnp.isfinite(kernel).all()
    assert space["history"].rounds["loss"].shape == (53, 8)


def test_ci_runs_the_test_command_word_for_word():
    run, test = (block.strip() for block in blocks("bash"))
    assert run.endswith("fedcl run quickstart --out runs/quickstart")
    assert test in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
