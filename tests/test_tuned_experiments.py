"""Experiment files that tune something other than a whole model by federated averaging."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedcl import experiment
from tests.problems import bytes_up

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.toml"
VIT = "model={kind='vit', width=8, depth=1, patch=4, train='%s', prompt=3, adapter=2}"
SMALL = (
    "seeds=[0]",
    "public={}",
    "stream.rounds_per_context=1",
    "stream.drift={kind='abrupt'}",
)
HEAD = 4 * (8 * 10 + 10)


DAT = "dat={chain=[{method='feddat'}], personal='own_adapter'}"
PROMPTS = (
    "pfpt={server={method='pfpt', where='prompts_only', variance=0.1}}, "
    "own={personal='*head/*'}"
)
BLIND = (
    "seeds={algorithm={method='fedkseed', rate=0.01, num_seeds=8}}, "
    "search={algorithm={method='fedbpt', dimension=3, population=4}}"
)
FILES: dict[str, tuple[str, ...]] = {
    "dat": (DAT, VIT % "dual_adapters"),
    "prompts": (PROMPTS, VIT % "prompt"),
    "blind": (BLIND,),
}


def file(name):
    arms, *model = FILES[name]
    return experiment.load(TINY, [*SMALL, *model, f"arms={{{arms}}}"])


def test_feddat_keeps_a_second_adapter_on_each_client():
    """Two shared adapters, behind attention and MLP, and the head are all that is sent."""
    assert bytes_up(file("dat")) == {"dat": 4 * 2 * (2 * 8 * 2 + 2 + 8) + HEAD + 4}


def test_prompts_are_matched_and_parts_stay_personal():
    assert bytes_up(file("prompts")) == {
        "pfpt": 4 * 3 * 8 + HEAD + 4,
        "own": 4 * 3 * 8 + 4,
    }


def test_algorithms_without_gradients():
    pytest.importorskip("evosax")
    assert bytes_up(file("blind")) == {"seeds": 4 * 8 + 4, "search": 4 * (3 + 2) + 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_files_run(name):
    given = file(name)
    result = experiment.run(given)
    for arm in given.arms:
        assert np.isfinite(result.history[f"{arm}/loss"]).all()
        assert 0 <= result.summary["arms"][arm]["average"]["mean"] <= 1
    if name == "dat":
        kept = result.summary["arms"]["dat"]["bytes_kept"]["mean"]
        assert kept >= 4 * 2 * (2 * 8 * 2 + 2 + 8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{chain=[{method='feddat'}]}", 'personal = "own_adapter"'),
        ("{personal='own_adaptr'}", 'mean "own_adapter"'),
        ("{server={method='pfpt', where='prompt'}}", 'mean "prompts_only"'),
        ("{server={method='pfpt'}}", "pfpt needs where"),
        ("{algorithm={method='fedkseed'}}", "fedkseed needs rate"),
        ("{algorithm={method='fedavg'}}", "fedbpt, fedkseed"),
        (
            "{algorithm={method='fedbpt'}, chain=[{method='fedprox', mu=0.1}]}",
            "takes the place of federated averaging",
        ),
    ],
)
def test_what_does_not_fit_is_said(setting, message):
    with pytest.raises(experiment.ConfigError, match=message):
        experiment.load(TINY, [f"arms={{a={setting}}}"])


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_only_transformers_take_prompts(kind):
    with pytest.raises(experiment.ConfigError, match="only transformers have it"):
        experiment.load(TINY, [f"model={{kind='{kind}', train='prompt'}}"])


def test_the_page_is_true():
    """Its files load, and its example in Python runs."""
    page = (ROOT / "docs" / "foundation.md").read_text()
    found = re.findall(r"```(toml|python)\n(.*?)```", page, flags=re.DOTALL)
    text, images = (
        tomllib.loads(block) for kind, block in found[1:3] if kind == "toml"
    )
    shipped = (ROOT / "fedcl" / "experiments" / "lm-languages.toml").read_text()
    own = {k: v for k, v in tomllib.loads(shipped).items() if k != "presets"}
    given = experiment.load(own | text)
    assert experiment.resolved(given)["arms"]["seeds"]["algorithm"]["num_seeds"] == 1024
    given = experiment.load(tomllib.loads(TINY.read_text()) | images)
    assert experiment.resolved(given)["model"]["train"] == "dual_adapters"
    exec(next(block for kind, block in found if kind == "python"), {})
