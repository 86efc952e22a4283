"""The shipped experiments on language models, on their tiny preset."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedcl import _experiment_build as _build
from fedcl import _experiment_run as _run
from fedcl import _experiment_text as _text
from fedcl import experiment, losses
from tests.problems import bytes_up

LANGUAGES = ("nlp", "de", "fr", "it", "ja")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sentences of five alphabets, and addresses of eight years by four people."""
    root = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(0)
    for i, name in enumerate(LANGUAGES):
        at = root / f"{name}-corpus" / "package" / "builds"
        at.mkdir(parents=True)
        words = [
            "".join(rng.choice(list("abcdefgh"), 4)) + chr(105 + i) for _ in range(9)
        ]
        lines = [" ".join(rng.choice(words, 6)) for _ in range(300)]
        listed = lines if i == 0 else [[line, "hash"] for line in lines]
        (at / "doc-0.json").write_text(json.dumps(listed))
    for year in range(1961, 1969):
        text = " ".join(rng.choice(["we", "the", "people", "union"], 60))
        record = {"year": year, "name": f"speaker {year % 4}", "text": text}
        (root / f"{year}_a_b.json").write_text(json.dumps(record))
    return root


def settings(folder, *more):
    at = ("path", "general.path", "public.path")
    small = ("evaluation.limit=4", "model.depth=1", "stream.rounds_per_context=1")
    lag = ("stream.drift.lag=1", "evaluation.every=1")
    return [*(f'data.text.{a}="{folder}"' for a in at), *small, *lag, *more]


ARMS = (
    "arms={base={frozen=true,public=false},fedit={public=false},"
    "lorm={public=false,lorm=true},"
    'exact={server={method="fedex_lora"},'  # With the server's phase.
    'chain=[{method="replay",capacity=4,per_batch=1}]}}'
)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    given = experiment.load("lm-languages", settings(folder, ARMS), "tiny")
    told = []
    return experiment.run(given, out / "out", progress=told.append), told, given


def test_the_metrics_are_the_matrix(finished):
    result = finished[0]
    for arm, values in result.summary["arms"].items():
        at, nats = result.history[f"{arm}/at"], result.history[f"{arm}/nats"][0]
        L = nats[np.searchsorted(at, result.history["ends"])]
        assert L.shape == (5, 5)
        mean = lambda key, values=values: values[key]["mean"]
        assert mean("average") == pytest.approx(L[-1].mean(), rel=1e-6)
        assert mean("rise_first") == pytest.approx(L[-1, 0] - L[0, 0], abs=1e-6)
        assert mean("worst_gain") == pytest.approx((nats[0] - L[-1]).min(), abs=1e-6)
        passed = min((nats[0] - L[t])[: t + 1].min() for t in range(5))
        assert mean("passed") == pytest.approx(passed, abs=1e-6)
        general = result.history[f"{arm}/general"][0]
        assert mean("general_rise") == pytest.approx(general[-1] - general[0], abs=1e-6)
    assert (result.out / "report.html").is_file()
    assert "nats" in (result.out / "R.csv").read_text().splitlines()[0]


def test_how_far_the_mean_of_factors_is_off_is_shown(finished):
    """Only FedIT, the server of the file, tells it; the exact sum has none."""
    result = finished[0]
    told, heard = (result.history[f"fedit/{k}"] for k in ("lora_bias", "reported"))
    assert told.shape == heard.shape and (heard > 0).any() and (told >= 0).all()
    mean = told[0][heard[0] > 0].mean()
    arms = result.summary["arms"]
    assert arms["fedit"]["lora_bias"]["mean"] == pytest.approx(mean) and mean > 1e-3
    assert "lora_bias" not in arms["base"] and "lora_bias" not in arms["exact"]
    assert "mean of their products" in result.summary["meaning"]["lora_bias"]
    page = " ".join((result.out / "report.html").read_text().split())
    assert f"fedit {mean:.3f}" in page


def test_arms_start_at_the_base_and_all_but_it_learn(finished):
    history = finished[0].history
    base = history["base/nats"]
    assert (base == base[:, :1]).all()
    for arm in ("fedit", "lorm", "exact"):
        np.testing.assert_allclose(history[f"{arm}/nats"][:, 0], base[:, 0], rtol=1e-6)
        assert (history[f"{arm}/nats"][:, -1] < base[:, -1]).all(), arm


def test_what_is_sent_is_counted(finished):
    """Adapters of queries and values; the accumulators of the exact sum; Grams of LoRM."""
    wide, rank = 16, finished[2].model.peft.rank
    sent = {
        arm: finished[0].history[f"{arm}/bytes"] for arm in ("fedit", "exact", "lorm")
    }
    phi, square = 4 * 2 * 2 * wide * rank, 4 * 2 * wide * wide
    base = sent["fedit"][2]
    assert sent["fedit"].tolist() == [phi + 4, phi, base]
    told = 4 * 2  # What was lost of each, a number that goes through the blocks.
    assert sent["exact"].tolist() == [phi + 4, phi + square + told, base]
    # In turn for A: G and G times its change; for B: the same inside A.
    grams = square + phi // 2 + 4 * 2 * rank * rank + phi // 2
    assert sent["lorm"].tolist() == [phi + 4 + grams, phi, base]


def test_prompts_and_seeds_on_text(folder):
    """A prompt of three vectors is all that is trained."""
    peft = 'peft={method="prompt",length=3}'
    model = f'model={{kind="decoder",width=16,depth=1,heads=2,hidden=32,{peft}}}'
    seeds = 'algorithm={method="fedkseed",rate=0.01,num_seeds=8}'
    mean = 'server={method="weighted_mean"}'
    arms = f"arms={{prompt={{public=false,{mean}}},seeds={{public=false,{seeds}}}}}"
    given = experiment.load("lm-languages", settings(folder, model, arms), "tiny")
    assert bytes_up(given) == {"prompt": 4 * 3 * 16 + 4, "seeds": 4 * 8 + 4}


FLORA = 'public=false, server={method="flora"%s}'


def test_flora_runs_from_a_file(folder):
    """It is FedEx-LoRA as long as it does not start again."""
    exact = 'public=false, server={method="fedex_lora"}'
    never = FLORA % ", every=99"
    arms = f"arms={{often={{{FLORA % ''}}}, never={{{never}}}, exact={{{exact}}}}}"
    result = experiment.run(
        experiment.load("lm-languages", settings(folder, arms), "tiny")
    )
    nats = {arm: result.history[f"{arm}/nats"] for arm in ("often", "never", "exact")}
    np.testing.assert_allclose(nats["never"], nats["exact"], rtol=1e-5)
    assert not np.allclose(nats["often"][:, -1], nats["exact"][:, -1], atol=1e-5)
    assert (nats["often"][:, -1] < nats["often"][:, 0]).all()


def test_flora_draws_from_the_seed(folder):
    def key(*more):
        arms = f"arms={{often={{{FLORA % ''}}}}}"
        e = experiment.load("lm-languages", settings(folder, arms, *more), "tiny")
        assert "key" not in e.arms["often"].server
        state = _build.server(e, e.arms["often"]).init({"w": jnp.zeros(1)})
        return np.asarray(jax.random.key_data(jax.tree.leaves(state)[0])).tolist()

    assert key() == key() != key("seeds=[7]")
    with pytest.raises(
        experiment.ConfigError, match="flora: key is drawn from `seeds`"
    ):
        experiment.load("lm-languages", [f"arms={{a={{{FLORA % ', key=3'}}}}}"])


def test_the_base_has_the_loss_of_its_rows_one_by_one(finished, folder):
    """Against the test rows of the tables, in NumPy from the logits."""
    result, _, given = finished
    keys = jax.vmap(jax.random.key)(np.asarray(given.seeds, np.uint32))
    own = _text._base(given.model, jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys))
    rows = _text.table(given, given.data.text, own)
    params = jax.tree.map(lambda x: x[0], own.params)
    test = {k: np.asarray(v) for k, v in rows.test.items()}
    for k in (0, 4):
        batch = {n: v[k] for n, v in test.items()}
        logits = np.asarray(own.model.apply(params, losses.inputs(batch)), np.float64)
        z = logits - logits.max(-1, keepdims=True)
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        s, tokens = batch["segments"], batch["tokens"]
        use = (s[:, 1:] == s[:, :-1]) & (s[:, 1:] > 0) & (batch["mask"] > 0)[:, None]
        nats = -np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        found = result.history["base/nats"][0, 0, k]
        np.testing.assert_allclose(found, nats[use].mean(), rtol=1e-5)


def test_the_same_file_gives_the_same_numbers(finished, folder, tmp_path):
    """An arm alone, run again from the file that the run wrote."""
    result = finished[0]
    arms = "arms={fedit={public=false}}"
    again = experiment.run(experiment.load(result.out / "experiment.toml", [arms]))
    for name in ("nats", "general", "per_client", "loss"):
        column = result.history[f"fedit/{name}"]
        assert (again.history[f"fedit/{name}"] == column).all(), name


def test_speakers_are_drawn_among_those_present(folder):
    """Four speakers a year: of the two eras each is in both, or in one alone."""
    for year in range(1961, 1965):  # A second document, so that one can be held out.
        record = {"year": year, "name": f"speaker {year % 4}", "text": "we " * 40}
        (folder / f"{year}_c_d.json").write_text(json.dumps(record))
    edges = "data.text.contexts.edges=[1961,1963,1965]"
    clients = ("stream.clients=4", "stream.contexts=2", "federation.cohort=2")
    given = experiment.load("lm-eras", settings(folder, edges, *clients), "tiny")
    setup = _run.prepare(given, lambda event: None)
    sampler = _build.sampler(given, setup.stream)
    for t in range(setup.stream.num_rounds):
        here = [bool(setup.stream.present(n, t)) for n in range(4)]
        who = sampler.draw(jax.random.key(t), jnp.int32(t), 4)
        drawn = set(np.asarray(who.client)[np.asarray(who.train)].tolist())
        assert len(drawn) == min(sum(here), 2)
        assert all(here[n] for n in drawn)
    assert not all(setup.stream.present(n, 0) for n in range(4))


def test_presets_load():
    for name in ("lm-languages", "lm-eras"):
        full = experiment.load(name)
        presets = ("cpu", "small", "tiny")
        cpu, small, tiny = (experiment.load(name, preset=p) for p in presets)
        kinds = [e.model.kind for e in (full, cpu, small, tiny)]
        assert kinds == ["pretrained"] * 3 + ["decoder"]
        for e in (cpu, small, tiny):
            assert list(e.arms) == list(full.arms)
    with pytest.raises(experiment.ConfigError, match="small"):
        experiment.load("lm-eras", preset="smal")


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("data.source='digits'", ["data.text", 'source = "text"']),
        ("model={kind='mlp'}", ["model.kind", "pretrained"]),
        ("model.path='x'", ["path", "package", "not both"]),
        ("stream.contexts=4", ["stream.contexts", "makes 5"]),
        ("stream.kind='class_incremental'", ["domain_incremental"]),
        ("public.fraction=0.5", ["data.text.public"]),
        ("data.text.contexts.edges=[1, 2]", ["values, or edges"]),
    ],
)
def test_what_does_not_fit_is_said(override, fragments):
    with pytest.raises(experiment.ConfigError) as e:
        experiment.load("lm-languages", [override])
    assert all(f in str(e.value) for f in fragments), str(e.value)


def test_what_is_absent_is_said_with_how_to_get_it(tmp_path):
    base = experiment.load("lm-languages", ["model.package='no_such_package'"]).model
    with pytest.raises(ValueError, match="not installed. Install it: pip install"):
        _text.find(base)
    at = f'model={{kind="pretrained",path="{tmp_path}/x.gguf",hint="Ask Ann."}}'
    with pytest.raises(ValueError, match="nothing at .* Ask Ann"):
        _text.find(experiment.load("lm-languages", [at]).model)
    texts = experiment.load("lm-languages", ['data.text.path="/nowhere"']).data.text
    with pytest.raises(ValueError, match=r"nothing at .*/nowhere.* npm packages"):
        _text.corpus(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'["\xff"]', r"nlp-corpus0/.*doc-0.json is not UTF-8: byte 2 is 0xff"),
        (b'["a", ', r"doc-0.json is not JSON: Expecting value at line 1, column 7"),
        (b'["a", 3]', r"data.text.parts: .*doc-0.json\[1\] is 3; it must be a text"),
        (b'["a", [["b"]]]', r"doc-0.json\[1\] is \[\['b'\]\]; it must be a text"),
    ],
)
def test_sentences_that_cannot_be_read_are_named(tmp_path, content, message):
    given = experiment.load("lm-languages", settings(tmp_path), "tiny").data.text
    for i, pattern in enumerate(given.parts.values()):
        file = tmp_path / pattern.replace("*", "0")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b'["a"]' if i else content)
    with pytest.raises(ValueError, match=message):
        _text.corpus(given)


def test_the_rows_of_a_limit_are_real():
    mask = np.asarray([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32)
    rows = {"tokens": np.arange(8).reshape(2, 4, 1), "mask": mask}
    some = _text._some(rows, 2, seed=0)
    assert np.asarray(some["mask"]).tolist() == [[1, 1], [1, 0]]
    assert (np.asarray(some["tokens"])[1, 0] == 4).all()
    assert len(set(np.asarray(some["tokens"])[0].ravel().tolist())) == 2
