"""The stages on forty made rows, one after another as a user would run them, and what each
refuses."""

import json
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import attention_mask
from scale.console import console
from scale.data.chat_tokenizer import load_tokenizer
from scale.data.dataset import Limits, limits_text, make_dataset
from scale.data.length_bias import (
    largest,
    longer_side,
    longer_wins,
    picking_longer,
    subsample,
)
from scale.data.rows import provenance, read, write
from scale.data.tokenizer import Tokenizer
from scale.data.village import village
from scale.errors import InputError
from scale.files import fingerprint, read_json, write_json
from scale.io import model_folder
from scale.model import inference
from scale.model.attention import masked
from scale.model.config import ModelConfig
from scale.model.inference import rewards, sequence_logps
from scale.parallel.mesh import RuntimeConfig
from scale.stages import corpus, reward
from scale.stages.align import Align
from scale.stages.bias import Bias
from scale.stages.bounds import out_of_bounds
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate, per_prompt, summary
from scale.stages.pairs import Pairs, preferred, to_label
from scale.stages.reward import Reward, RewardBatches
from scale.stages.sample import Sample
from scale.stages.score import Score, relabelled
from scale.stages.sft import Sft
from scale.stages.stage import alone, describe, discard_unstarted, execute, needs
from scale.train.batches import BatchPlan
from scale.train.loop import TrainingConfig
from scale.train.metrics import logged

LIMITS = Limits(24, 12)
FEW = TrainingConfig(3, 4, 1e-2, 1)
MODEL = ModelConfig(vocab_size=300, num_layers=1, d_model=16, num_heads=2, head_dim=8, d_ff=16)
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module", autouse=True)
def silent():
    console.quiet = True
    yield
    console.quiet = False


def made_rows(n=40):
    """Preferences of 2 words over 4 and of 4 over 2, in turn."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta"]

    def text(k):
        return " ".join(rng.choice(words, k))

    return [
        {
            "prompt": f"{text(2)} {i}",
            "chosen": text(2 + i % 2 * 2),
            "rejected": text(4 - i % 2 * 2),
        }
        for i in range(n)
    ]


def jsonl(path: Path, rows) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def dataset_of(folder, rows, fields, limits=LIMITS):
    """The rows, tokenized for a model."""
    return make_dataset(folder.tokenizer, rows, fields, limits)


class Chain:
    """Stages that several tests look at, run once."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, made_rows()
        self.data = jsonl(folder / "rows.jsonl", self.rows)
        self.sft = Sft(
            out=folder / "sft",
            data=self.data,
            validation=self.data,
            model=MODEL,
            limits=LIMITS,
            training=TrainingConfig(120, 8, 3e-2, 5),
        )  # long enough to speak its words, and to stop
        self.reward = Reward(
            out=folder / "rewards",
            data=self.data,
            init=folder / "sft",
            num_reward_models=2,
            training=FEW,
            limits=LIMITS,
            validation=self.data,
        )
        self.score = Score(
            out=folder / "scored",
            data=self.data,
            rewards=folder / "rewards",
            reference=folder / "sft",
            limits=LIMITS,
        )
        stages = {"sft": self.sft, "rewards": self.reward, "score": self.score}
        self.findings = {name: execute(stage) for name, stage in stages.items()}
        self.scored = folder / "scored/rows.parquet"

    def align(self, method, **options) -> Align:
        options = {
            "out": self.folder / method,
            "data": self.scored,
            "policy": self.folder / "sft",
            "training": FEW,
            "limits": LIMITS,
        } | options
        return Align(method=method, **options)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_sft_learns_and_reports(chain):
    findings = chain.findings["sft"]
    per_block = 16 + 16 * 2 * 8 + 16 * 2 * 8 + 16 * 2 * 16 + 2 * 8 * 16 + 16 * 16
    assert findings["rows"] == 40 and findings["parameters"] == 300 * 16 + per_block + 16
    policy = model_folder.load_policy(chain.folder / "sft")
    rows = [row | {"completion": row["chosen"]} for row in chain.rows]
    logps = sequence_logps(policy.model, dataset_of(policy, rows, ["completion"]))
    num_tokens = sum(len(policy.tokenizer.text_ids(row["chosen"])) + 1 for row in chain.rows)
    loss = findings["validation loss (nats a token)"]
    assert loss == pytest.approx(-logps.sum() / num_tokens, rel=1e-5)
    assert loss < np.log(300) / 2


def test_reward_models_differ_and_accuracies_are_theirs(chain):
    models = model_folder.load_rewards(chain.folder / "rewards")
    assert models.model.head.shape == (2, 16) and not np.array_equal(*models.model.head)
    values = rewards(models.model, dataset_of(models, chain.rows, SIDES))
    assert values.shape == (40, 2, 2)
    expected = [round(float(np.mean(values[:, 0, k] > values[:, 1, k])), 4) for k in range(2)]
    assert chain.findings["rewards"]["held-out accuracy"] == expected
    assert chain.findings["rewards"]["pairs of each reward model"] == 40
    assert chain.findings["score"]["accuracy of each reward model"] == expected
    assert chain.findings["score"]["reward models"] == 2


def test_scores_are_the_models_own_and_so_are_the_references(chain):
    rows = read(chain.scored)
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in chain.rows]
    models = model_folder.load_rewards(chain.folder / "rewards")
    values = rewards(models.model, dataset_of(models, rows, SIDES))
    scores = [[r["score_chosen"], r["score_rejected"]] for r in rows]
    np.testing.assert_allclose(scores, values, rtol=1e-6)
    policy = model_folder.load_policy(chain.folder / "sft")
    responses = dataset_of(policy, rows, [*SIDES, "ref_sample"], Limits(24, 24))
    logps = sequence_logps(policy.model, responses)
    columns = [[r[f"ref_{s}_logps"] for s in ("chosen", "rejected", "sample")] for r in rows]
    np.testing.assert_allclose(columns, logps, rtol=1e-5)  # the samples' are those of drawing them
    origin = {
        "--limits": limits_text(LIMITS),
        "data": fingerprint(chain.data),
        "rewards": models.hashes["model"],
    }
    assert provenance(chain.scored) == policy.hashes | origin


def files_of(folder):
    """When each file was written, and its bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_a_complete_stage_is_not_run_again(chain, monkeypatch):
    before = files_of(chain.folder)
    stages = ((chain.sft, "sft"), (chain.reward, "rewards"), (chain.score, "score"))
    for stage, name in stages:
        monkeypatch.setattr(type(stage), "run", lambda self: pytest.fail("ran again"))
        recorded = read_json(stage.out / "stage.json")["findings"]
        assert execute(stage) == chain.findings[name] == recorded
    after = files_of(chain.folder)
    assert {path: after[path] for path in before} == before
    assert not (chain.folder / "sft/checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"seed \(0, not 1\)"),
        ({"limits": Limits(24, 11)}, r"limits.response \(12, not 11\)"),
        ({"relabel": True}, r"relabel \(False, not True\)"),
        (
            {"runtime": RuntimeConfig(dtype="bfloat16")},
            r"runtime.dtype \(float32, not bfloat16\)",
        ),
    ],
)
def test_other_options_in_the_same_folder_are_refused(chain, change, named):
    message = rf"scored: was begun with other {named}; name another --out"
    with pytest.raises(InputError, match=message):
        execute(replace(chain.score, **change))


def test_other_inputs_or_another_stage_in_the_same_folder_are_refused(chain, tmp_path):
    other = jsonl(tmp_path / "other.jsonl", chain.rows[1:])
    with pytest.raises(InputError, match="other contents of the inputs"):
        execute(replace(chain.score, data=other))
    with pytest.raises(InputError, match="holds a Score stage, not Bias"):
        execute(Bias(out=chain.score.out, data=chain.data, tokenizer=chain.folder / "sft"))
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file or folder"):
        execute(replace(chain.score, data=tmp_path / "nowhere.jsonl"))


def test_a_moved_input_is_the_same_input(chain, tmp_path):
    moved = jsonl(tmp_path / "moved.jsonl", chain.rows)
    assert execute(replace(chain.score, data=moved)) == chain.findings["score"]


def log_of(path: Path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["e-dpo", "p-dpo", "dpo"])
def test_align(chain, method):
    """At the first step the policy is the reference: margins 0, KL 0, so each loss is known."""
    stage = chain.align(method, validation=chain.scored, beta=0.25)
    findings = execute(stage)
    assert findings["pairs"] == 40 and findings["shapes of a step"] == 1
    assert 0 < findings["positions that hold a token"] <= 1
    log = log_of(stage.out)
    assert [r["step"] for r in log] == [0, 1, 2, 3]
    assert log[0]["validation/kl"] == pytest.approx(0, abs=1e-5)
    assert log[1]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    if method == "e-dpo":
        assert sorted(log[1]["ensemble/weights"]) == [0, 1]
        rows = read(chain.scored)
        margins = np.array([np.subtract(r["score_chosen"], r["score_rejected"]) for r in rows])
        # The first batch is some 4 of the 40 rows: the largest loss it can have is that of the 4
        # largest margins.
        largest_loss = np.sort(margins**2, axis=0)[-4:].mean(0).min()
        assert 0 < log[1]["loss"] <= largest_loss + 1e-6
    else:
        assert log[1]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    if method == "dpo":
        assert "kl" not in log[1]
    else:
        assert log[1]["kl"] == pytest.approx(0, abs=1e-5)
    trained = model_folder.load_policy(stage.out)
    start = model_folder.load_policy(chain.folder / "sft")
    assert not np.array_equal(trained.model.embedding, start.model.embedding)
    assert trained.hashes["tokenizer"] == start.hashes["tokenizer"]


def test_gamma_none_is_the_tables_and_0_leaves_the_kl_out(chain, tmp_path):
    """Adam's first update has its gradient's sign, so gammas are compared after three."""
    models = {}
    for gamma in (None, (1e-4, 1e-2), (0.0, 0.0)):
        execute(chain.align("p-dpo", out=tmp_path / str(gamma), gamma=gamma))
        policy = model_folder.load_policy(tmp_path / str(gamma))
        models[gamma] = np.asarray(policy.model.embedding)
    np.testing.assert_array_equal(models[None], models[1e-4, 1e-2])
    assert not np.array_equal(models[None], models[0.0, 0.0])


@pytest.mark.parametrize(
    ("steps", "snapshots", "expected"),
    [(4, 1, [1]), (12, 1, [3]), (9, 2, [1, 4]), (3, 0, []), (8, 2, None), (2, 3, None)],
)
def test_snapshots(chain, tmp_path, steps, snapshots, expected):
    """As many as asked for, at 1, 4, 9, ... times a step; asking for more than fit is an error that
    says so."""
    training = replace(FEW, steps=steps)
    stage = chain.align("dpo", out=tmp_path / "a", snapshots=snapshots, training=training)
    if expected is None:
        with pytest.raises(InputError, match="snapshots"):
            execute(stage)
        return
    execute(stage)
    folders = (tmp_path / "a").glob("step-*")
    kept = sorted(int(path.name.removeprefix("step-")) for path in folders)
    assert kept == expected
    for step in kept:
        model_folder.load_policy(tmp_path / f"a/step-{step}")


def test_a_long_alignment_keeps_checkpoints_without_being_asked_for_snapshots(
    chain, tmp_path, monkeypatch
):
    """Stopped at step 110 of 120, it need not begin again."""
    drawn = []

    def take_or_stop(batches, step):
        drawn.append(step)
        return batch(batches, step) if len(drawn) < 110 else pytest.fail("stopped")

    batch = BatchPlan.batch
    monkeypatch.setattr(BatchPlan, "batch", take_or_stop)
    with pytest.raises(pytest.fail.Exception, match="stopped"):
        execute(chain.align("dpo", out=tmp_path / "a", training=replace(FEW, steps=120)))
    assert (tmp_path / "a/checkpoints").exists()


def refused(stage, match):
    with pytest.raises(InputError, match=match):
        execute(stage)


def rewritten(tmp_path, rows, hashes=None) -> Path:
    path = tmp_path / "rows.parquet"
    write(path, rows, hashes or {})
    return path


def without(rows, *names):
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


def test_columns_of_another_reference_tokenizer_or_limits_are_refused(chain, tmp_path):
    policy = model_folder.load_policy(chain.folder / "sft")
    other = eqx.tree_at(lambda m: m.norm, policy.model, policy.model.norm * 1.001)
    model_folder.save(replace(policy, path=tmp_path / "other", model=other))
    stage = chain.align("dpo", out=tmp_path / "a", policy=tmp_path / "other")
    refused(stage, "columns were computed with model .*; this run has")
    rows, hashes = read(chain.scored), provenance(chain.scored)
    path = rewritten(tmp_path, rows, hashes | {"tokenizer": "0" * 16})
    stage = chain.align("dpo", out=tmp_path / "b", data=path)
    refused(stage, "computed with tokenizer 0{16}; this run has")
    stage = chain.align("dpo", out=tmp_path / "c", limits=Limits(24, 11))
    refused(stage, "--limits prompt 24, response 12; this run has prompt 24, response 11")
    stage = chain.align("dpo", out=tmp_path / "d", validation=path)
    refused(stage, "computed with tokenizer")


@pytest.mark.parametrize(
    ("method", "missing", "named"),
    [
        ("dpo", ["ref_chosen_logps"], "ref_chosen_logps"),
        ("dpo", ["ref_rejected_logps"], "ref_rejected_logps"),
        ("e-dpo", ["score_chosen", "score_rejected"], "score_chosen"),
        ("e-dpo", ["ref_sample_logps"], "ref_sample_logps"),
        ("p-dpo", ["ref_sample"], "ref_sample"),
    ],
)
def test_a_missing_column_is_named(chain, tmp_path, method, missing, named):
    path = rewritten(tmp_path, without(read(chain.scored), *missing))
    refused(chain.align(method, out=tmp_path / "a", data=path), named)


def test_a_column_missing_from_a_later_row_is_named(chain, tmp_path):
    rows = read(chain.scored)
    rows[7] = without([rows[7]], "ref_rejected_logps")[0]
    stage = chain.align("dpo", out=tmp_path / "a", data=rewritten(tmp_path, rows))
    refused(stage, "ref_rejected_logps")


def test_methods_refuse_what_they_cannot_use(chain, tmp_path):
    refused(chain.align("d-dpo", out=tmp_path / "a"), "distils one reward.*, not 2")
    refused(chain.align("dpo", out=tmp_path / "b", gamma=(0.1, 0.1)), "no KL term")


@pytest.mark.parametrize("method", ["dpo", "e-dpo"])
def test_score_for_a_method_computes_what_it_reads(chain, tmp_path, method):
    """DPO reads no sample of pi_ref, and aligns as with one."""
    rewards = {"rewards": chain.folder / "rewards"} if method == "e-dpo" else {}
    options = {"data": chain.data, "reference": chain.folder / "sft", "limits": LIMITS} | rewards
    execute(Score(out=tmp_path / "scored", method=method, **options))
    columns = read(tmp_path / "scored/rows.parquet")[0].keys()
    sampled = {"ref_sample", "ref_sample_ids", "ref_sample_complete", "ref_sample_logps"}
    assert {*columns} & sampled == (sampled if method == "e-dpo" else set())
    assert ("score_chosen" in columns) == (method == "e-dpo")
    losses = []
    for name, data in (("a", chain.scored), ("b", tmp_path / "scored/rows.parquet")):
        execute(chain.align(method, out=tmp_path / name, data=data))
        losses.append(log_of(tmp_path / name)[-1]["loss"])
    assert losses[0] == losses[1]
    wrong = {} if rewards else {"rewards": chain.folder / "rewards"}
    options = {k: v for k, v in options.items() if k != "rewards"} | wrong
    refused(Score(out=tmp_path / "c", method=method, **options), f"--for {method}: it reads")


def test_another_models_samples_are_drawn_again(chain, tmp_path):
    """Rows that were scored with one model, scored with another: nothing of the first is left."""
    young = tmp_path / "young"
    execute(replace(chain.sft, out=young, training=replace(FEW, steps=1), validation=None))
    options = {"reference": young, "limits": LIMITS}
    execute(Score(out=tmp_path / "fresh", data=chain.data, **options))
    execute(Score(out=tmp_path / "again", data=chain.scored, **options))
    fresh, again = (read(tmp_path / name / "rows.parquet") for name in ("fresh", "again"))
    names = [name for name in fresh[0] if name.startswith("ref_")]
    assert len(names) == 6
    assert [[row[n] for n in names] for row in fresh] == [[row[n] for n in names] for row in again]
    execute(Score(out=tmp_path / "dpo", data=chain.scored, method="dpo", **options))
    assert "ref_sample_logps" not in read(tmp_path / "dpo/rows.parquet")[0]


@pytest.mark.parametrize("ids", [[5, 6], "abc", [10**8]])
def test_only_the_ids_of_samples_are_read_and_within_the_vocabulary(chain, tmp_path, ids):
    reference = chain.folder / "sft"
    options = {"reference": reference, "limits": LIMITS, "method": "dpo"}
    data = jsonl(tmp_path / "rows.jsonl", [row | {"chosen_ids": ids} for row in chain.rows])
    for name, path in (("a", data), ("b", chain.data)):
        execute(Score(out=tmp_path / name, data=path, **options))
    a, b = (read(tmp_path / name / "rows.parquet") for name in ("a", "b"))
    assert [r["ref_chosen_logps"] for r in a] == [r["ref_chosen_logps"] for r in b]
    rows = [row | {"ref_sample_ids": ids} for row in read(chain.scored)]
    if ids != [5, 6]:
        path = jsonl(tmp_path / "sampled.jsonl", rows)
        named = r"sampled\.jsonl:1: field 'ref_sample_ids'"
        refused(chain.align("e-dpo", out=tmp_path / "c", data=path), named)


def test_an_error_on_resume_leaves_what_an_earlier_call_did(chain, tmp_path):
    stage = replace(chain.score, out=tmp_path / "a", data=chain.data)
    (tmp_path / "a/tokens").mkdir(parents=True)
    write_json(tmp_path / "a/stage.json", describe(stage))
    limits = replace(LIMITS, prompt=10**6)
    write_json(tmp_path / "a/stage.json", describe(replace(stage, limits=limits)))
    refused(replace(stage, limits=limits), "--limits")
    assert (tmp_path / "a/tokens").exists()


def test_standardized_rewards_have_margins_of_unit_deviation(chain, tmp_path):
    options = {"data": chain.data, "rewards": chain.folder / "rewards", "limits": LIMITS}
    for name, standardize in (("plain", False), ("unit", True)):
        execute(Score(out=tmp_path / name, standardize=standardize, **options))
    plain, unit = (
        np.array([[row["score_chosen"], row["score_rejected"]] for row in read(path)])
        for path in (tmp_path / "plain/rows.parquet", tmp_path / "unit/rows.parquet")
    )
    margins = plain[:, 0] - plain[:, 1]
    deviation = np.sqrt(((margins - margins.mean(0)) ** 2).mean(0))
    np.testing.assert_allclose(unit, plain / deviation, rtol=1e-12)


def test_score_goes_on_where_it_was(chain, tmp_path, monkeypatch):
    """Stopped after a part of its samples, and of its log-probabilities: what is written is not
    computed again, and the rows are those of a run that was never stopped."""
    monkeypatch.setattr(inference, "ROWS", 2)
    monkeypatch.setattr(inference, "BLOCK", 8)
    computed, most = [], [3]

    def stopping(folder, names, make):
        def count():
            if len(computed) == most[0]:
                raise KeyboardInterrupt
            computed.append(folder)
            return make()

        return cached(folder, names, count)

    cached = inference.cached
    monkeypatch.setattr(inference, "cached", stopping)
    options = {"data": chain.data, "reference": chain.folder / "sft", "limits": LIMITS}
    for most[0] in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            execute(Score(out=tmp_path / "cut", **options))
    most[0] = 99
    execute(Score(out=tmp_path / "cut", **options))
    assert len(computed) == len(set(computed)) == 5 + 5  # 40 rows: 8 prompts, 8 rows each
    assert not (tmp_path / "cut/tokens").exists()
    execute(Score(out=tmp_path / "whole", **options))
    assert read(tmp_path / "cut/rows.parquet") == read(tmp_path / "whole/rows.parquet")


def test_what_was_sampled_is_what_is_scored(chain, tmp_path):
    """A young policy samples bytes that are no text: their text reads as other tokens."""
    young, training = tmp_path / "young", replace(FEW, learning_rate=1e-30)
    execute(replace(chain.sft, out=young, training=training, validation=None))
    execute(Score(out=tmp_path / "a", data=chain.data, reference=young, limits=LIMITS))
    rows, policy = read(tmp_path / "a/rows.parquet"), model_folder.load_policy(young)
    read_again = policy.tokenizer.responses_ids(
        [row["ref_sample"] for row in rows], [row["ref_sample_complete"] for row in rows]
    )
    sampled = [row["ref_sample_ids"] for row in rows]
    assert sum(a != b for a, b in zip(sampled, read_again, strict=True)) > 20
    for row, response in zip(rows[:5], sampled, strict=False):
        prompt = policy.tokenizer.prompt_ids(row["prompt"])
        tokens = jnp.asarray([[*prompt, *response]])
        attend = masked(attention_mask(jnp.zeros(tokens.shape, jnp.int32)))
        hidden = policy.model.hidden(tokens, jnp.arange(tokens.shape[1])[None], attend)[0][0]
        logps = jax.nn.log_softmax(hidden @ policy.model.unembedding.T)[len(prompt) - 1 : -1]
        by_hand = sum(float(logps[i, token]) for i, token in enumerate(response))
        assert row["ref_sample_logps"] == pytest.approx(by_hand, abs=1e-3)


def test_score_needs_something_to_do(chain, tmp_path):
    refused(Score(out=tmp_path / "a", data=chain.data, limits=LIMITS), "--rewards")
    reference = chain.folder / "sft"
    options = {"data": chain.data, "reference": reference, "limits": LIMITS}
    refused(Score(out=tmp_path / "b", relabel=True, **options), "--relabel needs")


def test_columns_that_cannot_be_written_are_refused_before_they_are_scored(chain, tmp_path):
    rows = [row | {"note": value} for row, value in zip(chain.rows, [1, "x"] * 20, strict=True)]
    data = jsonl(tmp_path / "mixed.jsonl", rows)
    stage = replace(chain.score, out=tmp_path / "a", data=data, rewards=tmp_path)
    refused(stage, r"mixed\.jsonl: field 'note': no Parquet type holds all its values")


# ---- relabelling


def test_relabelled_exchanges_all_that_belongs_to_the_responses():
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": [1.0],
        "score_rejected": [2.0],
        "ref_sample": "s",
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
        "ref_sample_logps": -3.0,
        "chosen_model": "m",
        "rejected_model": "n",
        "completion": "a",
    }
    assert relabelled(row, np.float64(0.0)) == row == relabelled(row, np.float64(2.0))
    assert relabelled(row, np.float64(-0.1)) == {
        "prompt": "p",
        "chosen": "b",
        "rejected": "a",
        "score_chosen": [2.0],
        "score_rejected": [1.0],
        "ref_sample": "s",
        "ref_chosen_logps": -2.0,
        "ref_rejected_logps": -1.0,
        "ref_sample_logps": -3.0,
        "chosen_model": "n",
        "rejected_model": "m",
        "completion": "b",
    }


def test_the_relabel_stage_follows_its_first_reward_model(chain, tmp_path):
    rewards = chain.folder / "rewards"
    options = {"data": chain.scored, "rewards": rewards, "limits": LIMITS}
    findings = execute(Score(out=tmp_path / "a", relabel=True, **options))
    before, after = read(chain.scored), read(tmp_path / "a/rows.parquet")
    margins = [row["score_chosen"][0] - row["score_rejected"][0] for row in before]
    assert min(margins) < 0 < max(margins)
    for row, new, margin in zip(before, after, margins, strict=True):
        first, second = SIDES if margin >= 0 else SIDES[::-1]
        for pattern in ("{}", "score_{}", "ref_{}_logps"):
            assert new[pattern.format("chosen")] == row[pattern.format(first)]
            assert new[pattern.format("rejected")] == row[pattern.format(second)]
        assert new["score_chosen"][0] >= new["score_rejected"][0]
    assert findings["share of labels kept"] == np.mean(np.array(margins) >= 0)
    assert findings["share of pairs without a tie"] == 1
    oracle = model_folder.load_rewards(rewards).hashes["model"]
    origin = provenance(chain.scored) | {"data": fingerprint(chain.scored), "labelled by": oracle}
    assert provenance(tmp_path / "a/rows.parquet") == origin


# ---- the true reward of a village's summaries

PAGES = {
    "Nora": "It was cold. Nora lost a key in Oslo. Dan broke Pia's lamp. In Paris she met Tom.",
    "Ben": "Ben sold a cow to Ann. The sky was grey. He took the bus to Lima.",
}
BOTH, ONE, FALSE = "Nora lost a key and met Tom.", "Nora met Tom.", "Nora broke a lamp."


def judged(name, chosen, rejected, **more):
    return {"prompt": PAGES[name], "chosen": chosen, "rejected": rejected} | more


def test_the_relabel_stage_follows_the_true_reward_and_drops_ties(tmp_path):
    """Rewards by hand. Nora's: 2 and 1, so the label is kept; -1 and 1, so it is not; 1 and
    2 x 1 - 0.5 - 0.5 = 1, a tie. Ben's: 1 and 2, not kept; 1 and 1, a tie."""
    pairs = [
        judged("Nora", BOTH, ONE, note_chosen="a", note_rejected="b"),
        judged("Nora", FALSE, ONE, note_chosen="c", note_rejected="d"),
        judged("Nora", ONE, "Nora lost a key, met Tom and met Tom as usual."),
        judged("Ben", "Ben sold a cow.", "Ben went to Lima and sold a cow."),
        judged("Ben", "Ben sold a cow.", "Ben went to Lima."),
    ]
    data = jsonl(tmp_path / "rows.jsonl", pairs)
    stage = Score(out=tmp_path / "a", data=data, rewards=Path("village"), relabel=True)
    assert execute(stage) == {
        "rows": 3,
        "share of pairs without a tie": 3 / 5,
        "share of labels kept": 1 / 3,
    }
    rows = [{k: v for k, v in r.items() if v is not None} for r in read(stage.out / "rows.parquet")]
    assert rows == [
        judged("Nora", BOTH, ONE, note_chosen="a", note_rejected="b"),
        judged("Nora", ONE, FALSE, note_chosen="d", note_rejected="c"),
        judged("Ben", "Ben went to Lima and sold a cow.", "Ben sold a cow."),
    ]
    assert "labelled by" in provenance(stage.out / "rows.parquet")


def test_the_true_reward_is_a_score_of_one_model(tmp_path):
    """Ties stay where labels do. Margins 2 - 1 and 1 - 1: of two pairs one is right, and the
    standard deviation of 1 and 0 is 0.5."""
    pairs = [judged("Nora", BOTH, ONE), judged("Nora", ONE, "Nora lost a key.")]
    data = jsonl(tmp_path / "rows.jsonl", pairs)
    assert execute(Score(out=tmp_path / "a", data=data, rewards=Path("village"))) == {
        "rows": 2,
        "reward models": 1,
        "accuracy of each reward model": [0.5],
        "standard deviation of margins": [0.5],
    }
    rows = read(tmp_path / "a/rows.parquet")
    scores = [(row["score_chosen"], row["score_rejected"]) for row in rows]
    assert scores == [([2.0], [1.0]), ([1.0], [1.0])]


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("Nora lost a key in Oslo. Nora sang.", "not a sentence of a diary: 'Nora sang'"),
        ([{"role": "user", "content": PAGES["Ben"]}], "a conversation, not a page of a diary"),
    ],
)
def test_a_prompt_that_is_no_page_is_named_by_file_row_and_field(chain, tmp_path, prompt, fault):
    """By `score`, and by `evaluate` before it samples anything. A file has one form of prompts."""
    first = PAGES["Nora"] if isinstance(prompt, str) else prompt
    rows = [{"prompt": p, "chosen": ONE, "rejected": FALSE} for p in (first, prompt)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    number = 2 if isinstance(prompt, str) else 1
    message = rf"rows\.jsonl: row {number}: field 'prompt': {fault}"
    refused(Score(out=tmp_path / "a", data=data, rewards=Path("village")), message)
    policy = chain.folder / "sft"
    options = {"data": data, "policies": (policy,), "reference": policy, "limits": LIMITS}
    refused(Evaluate(out=tmp_path / "b", rewards=Path("village"), **options), message)


def test_pairs_that_are_all_ties_are_refused(tmp_path):
    data = jsonl(tmp_path / "rows.jsonl", [judged("Nora", ONE, "Nora lost a key.")] * 2)
    stage = Score(out=tmp_path / "a", data=data, rewards=Path("village"), relabel=True)
    refused(stage, r"rows\.jsonl: --relabel: all 2 pairs are ties")


# ---- length bias


class Letters(Tokenizer):
    def __init__(self):
        """No backend: a token a letter."""

    def texts_ids(self, texts):
        return [list(map(ord, text)) for text in texts]


def lengths(chosen, rejected):
    """A row of so many tokens, the end of sequence included."""
    return {"chosen": "a" * (chosen - 1), "rejected": "b" * (rejected - 1)}


@pytest.mark.parametrize(
    ("chosen", "rejected", "side"),
    [
        (11, 10, 1),
        (10, 11, -1),
        (10, 10, 0),
        (21, 20, 0),
        (22, 20, 1),
        (20, 21, 0),
        (109, 100, 0),
        (2, 1, 1),
        (1, 2, -1),
    ],
)
def test_longer_is_at_least_ten_percent_more_tokens(chosen, rejected, side):
    assert longer_side(Letters(), [lengths(chosen, rejected)]).tolist() == [side]


def test_exactly_ten_percent_more_is_longer():
    """In floating point 1.1 x 50 is above 55."""
    cases = [(r * 11 // 10, r) for r in range(10, 201, 10)]
    sides = [longer_side(Letters(), [lengths(*case)]).tolist() for case in cases]
    assert sides == [[1]] * 20


def test_longer_wins_ignores_pairs_without_a_longer_side():
    assert longer_wins(np.array([1, 1, 0, -1, 0, 1])) == 0.75 and longer_wins(np.zeros(3)) == 0
    assert picking_longer(np.array([1, 1, 0, -1, 0, 1])) == pytest.approx(4 / 6)
    assert picking_longer(np.zeros(3)) == 0.5


def most(wins, losses, rho: Fraction):
    """In exact arithmetic."""
    return min(int(n / share) for n, share in ((wins, rho), (losses, 1 - rho)) if share)


@pytest.mark.parametrize("rho", ["0", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "1"])
def test_largest_is_the_exact_one(rho):
    wrong = []
    for wins in range(1, 25):
        for losses in range(1, 25):
            sides = np.array([1] * wins + [-1] * losses + [0] * 3)
            expected = most(wins, losses, Fraction(rho))
            if expected and largest(sides, float(rho)) != expected:
                wrong.append((wins, losses, largest(sides, float(rho)), expected))
    assert wrong == []


def test_largest_by_hand_and_where_nothing_can_be_drawn():
    assert largest(np.array([1] * 6 + [-1] * 30), 0.2) == 30  # 6 won and 24 lost
    assert largest(np.array([1] * 6 + [-1] * 30), 0.8) == 7  # 7.5: 6 won, 1 lost
    with pytest.raises(InputError, match=r"length bias 0\.5: the longer side wins 0, loses 2"):
        largest(np.array([-1, -1, 0]), 0.5)


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.45, 0.5, 0.7, 1.0])
def test_a_subsample_has_the_share_it_was_asked_for(rho):
    rng = np.random.default_rng(0)
    for wins, losses in [(10, 10), (3, 20), (20, 3), (1, 1), (17, 11)]:
        sides = rng.permutation([1] * wins + [-1] * losses + [0] * 5)
        if most(wins, losses, Fraction(str(rho))) < 1:
            continue
        for size in range(1, largest(sides, rho) + 1):
            drawn = subsample(sides, rho, size, np.random.default_rng(size))
            assert len(set(drawn)) == len(drawn) == size and 0 not in sides[drawn]
            assert abs((sides[drawn] > 0).sum() - rho * size) <= 0.5


def test_bias_stage(chain, tmp_path):
    """20 of the 40 rows prefer the longer side; at rho 0.2 that leaves 20 / 0.8 = 25 pairs, 5 of
    them won by it."""
    options = {"data": chain.scored, "tokenizer": chain.folder / "sft", "rho": 0.2}
    findings = execute(Bias(out=tmp_path / "a", **options))
    assert findings == {
        "pairs": 25,
        "share of pairs whose longer side wins": 0.2,
        "that share of --data": 0.5,
    }
    rows, every_row = read(tmp_path / "a/rows.parquet"), read(chain.scored)
    sides = longer_side(load_tokenizer(chain.folder / "sft"), rows)
    assert (sides > 0).sum() == 5 and (sides < 0).sum() == 20
    assert len({r["prompt"] for r in rows}) == 25
    assert all(row in every_row for row in rows)
    assert provenance(tmp_path / "a/rows.parquet") == provenance(chain.scored)
    assert execute(Bias(out=tmp_path / "b", size=10, **options))["pairs"] == 10


def test_bias_says_what_share_its_data_has(chain, tmp_path):
    """Odd rows of the 40 prefer the longer side: 20 of 40; without the first 16 even rows, 20 of
    24."""
    rows = [row for i, row in enumerate(chain.rows) if i % 2 or i >= 32]
    options = {"data": jsonl(tmp_path / "rows.jsonl", rows), "tokenizer": chain.folder / "sft"}
    findings = execute(Bias(out=tmp_path / "a", rho=0.8, **options))
    assert findings["that share of --data"] == 20 / 24
    assert findings["share of pairs whose longer side wins"] == 0.8  # 16 of 20
    assert findings["pairs"] == 20


def test_reward_models_are_trained_on_equal_biased_subsets(chain, tmp_path):
    """With 20 won and 20 lost, rho 0.2 and 0.8 allow 25 pairs and 0.5 allows 40: every D_b has
    25."""
    options = {"num_reward_models": 1, "length_biases": (0.2, 0.5, 0.8)}
    stage = replace(chain.reward, out=tmp_path / "a", **options)
    policy = model_folder.load_policy(chain.folder / "sft")
    subsets = stage.subsets(policy, chain.rows)
    sides = longer_side(policy.tokenizer, chain.rows)
    assert [len(s) for s in subsets] == [25, 25, 25]
    assert [int((sides[s] > 0).sum()) for s in subsets] == [5, 12, 20]  # 12.5 rounds to even
    findings = execute(replace(stage, length_biases=(0.2, 0.8)))
    assert findings["pairs of each reward model"] == 25
    assert model_folder.load_rewards(tmp_path / "a").model.head.shape == (2, 16)


def test_reward_models_one_after_another_are_those_side_by_side(chain, tmp_path, monkeypatch):
    """Where the states of all are too large. A run goes on with the model that it stopped at."""
    side_by_side = model_folder.load_rewards(chain.folder / "rewards").model
    monkeypatch.setattr(reward, "SIDE_BY_SIDE", 0)
    stage = replace(chain.reward, out=tmp_path / "a")
    begun, batch = [], RewardBatches.batch

    def stopping(self, members, step):
        begun.append((*members, step))
        if begun[-1] == (1, 1) and begun.count((1, 1)) == 1:
            pytest.fail("stopped")
        return batch(self, members, step)

    monkeypatch.setattr(RewardBatches, "batch", stopping)
    with pytest.raises(pytest.fail.Exception, match="stopped"):
        execute(stage)
    assert execute(stage) == chain.findings["rewards"]
    assert begun.count((0, 0)) == 1 and begun.count((1, 0)) == 2
    models = model_folder.load_rewards(tmp_path / "a").model
    for ours, theirs in zip(jax.tree.leaves(models), jax.tree.leaves(side_by_side), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "a/members").exists()


def test_reward_models_one_after_another_stay_in_float32(chain, tmp_path, monkeypatch):
    """Whatever the dtype of activations."""
    monkeypatch.setattr(reward, "SIDE_BY_SIDE", 0)
    execute(replace(chain.reward, out=tmp_path / "a", runtime=RuntimeConfig(dtype="bfloat16")))
    models = model_folder.load_rewards(tmp_path / "a").model
    assert {leaf.dtype for leaf in jax.tree.leaves(models)} == {jnp.dtype("float32")}


def test_reward_models_of_batches_in_parts_are_those_of_whole_batches(chain, tmp_path):
    trained = []
    for parts in (1, 2):
        stage = replace(chain.reward, out=tmp_path / str(parts))
        execute(replace(stage, training=replace(FEW, accumulation=parts)))
        trained.append(model_folder.load_rewards(stage.out).model)
    for one, two in zip(*map(jax.tree.leaves, trained), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)
    odd = replace(chain.reward, out=tmp_path / "odd", training=replace(FEW, accumulation=3))
    refused(odd, "--training.accumulation 3: does not divide a batch of 4")


def test_each_of_several_reward_models_has_a_bootstrap_sample_of_the_rows(chain):
    """Of n rows a sample of n with replacement has about 1 - 1/e; a single model has them all."""
    rows, policy = [{}] * 10_000, model_folder.load_policy(chain.folder / "sft")
    [one] = replace(chain.reward, num_reward_models=1).subsets(policy, rows)
    assert one.tolist() == list(range(10_000))
    samples = replace(chain.reward, num_reward_models=3).subsets(policy, rows)
    assert [len(sample) for sample in samples] == [10_000] * 3
    for sample in samples:
        assert len(set(sample)) / 10_000 == pytest.approx(1 - np.exp(-1), abs=0.02)
    assert len({tuple(sample) for sample in samples}) == 3


def test_a_reward_stage_without_held_out_rows_says_so_before_training(chain, tmp_path):
    """Of one prompt a tenth may be none."""
    data = jsonl(tmp_path / "rows.jsonl", chain.rows[1:2])
    init = chain.folder / "sft"
    stage = Reward(out=tmp_path / "a", data=data, init=init, training=FEW, limits=LIMITS)
    message = r"rows\.jsonl: too few prompts to hold any out; name --validation"
    with pytest.raises(InputError, match=message):
        execute(stage)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no row", r"held\.jsonl:1: malformed JSON"),
        (
            json.dumps(made_rows(1)[0] | {"prompt": "alpha " * 60}),
            r"held\.jsonl: all 1 rows are long",
        ),
    ],
)
@pytest.mark.parametrize("name", ["sft", "reward"])
def test_faulty_held_out_rows_are_refused_before_training(chain, tmp_path, name, text, named):
    (tmp_path / "held.jsonl").write_text(text)
    refused(
        replace(getattr(chain, name), out=tmp_path / "a", validation=tmp_path / "held.jsonl"), named
    )
    assert not (tmp_path / "a").exists()


# ---- what needs what


def test_a_chain_needs_those_that_write_what_it_reads():
    """By hand: samples read the policy and a part of the corpus; a reward model reads two other
    folders and a file of its own chain; nobody writes the corpus's rows or the true reward."""
    sft = Sft(out=Path("r/sft"), data=Path("r/corpus/train.parquet"))
    sample = Sample(out=Path("r/samples"), policy=sft.out, data=Path("r/corpus/test.parquet"))
    scores = Score(out=Path("r/labels"), data=Path("r/other.parquet"), rewards=Path("village"))
    bias = Bias(out=Path("r/d/data"), data=Path("r/labels/rows.parquet"), tokenizer=sft.out)
    reward = Reward(out=Path("r/d/rewards"), data=Path("r/d/data/rows.parquet"), init=sft.out)
    evaluation = Evaluate(
        out=Path("r/test"), data=Path("r/corpus/test.parquet"), rewards=Path("r/d/rewards"),
        policies=(Path("r/sft"), Path("r/samples/deep/er")), reference=Path("elsewhere"),
    )  # fmt: skip
    corpus_stage = Corpus(out=Path("r/corpus"), data=Path("rows.jsonl"))
    chains = [[evaluation], [bias, reward], [scores], [sample], [sft], [corpus_stage]]
    assert needs(chains) == [{5, 1, 4, 3}, {2, 4}, set(), {4, 5}, {5}, set()]
    assert needs([[sft, sample, corpus_stage]]) == [set()] and needs([]) == []


def test_a_folder_is_not_written_by_one_whose_name_begins_alike():
    reader = Sft(out=Path("r/b"), data=Path("r/corpus-2/train.parquet"))
    assert needs([[Corpus(out=Path("r/corpus"))], [reader]]) == [set(), set()]


# ---- samples and pairs


def test_sample_stage(chain, tmp_path):
    policy = chain.folder / "sft"
    stage = Sample(out=tmp_path / "a", policy=policy, data=chain.data, n=2, limits=LIMITS)
    findings = execute(stage)
    rows = read(tmp_path / "a/rows.parquet", need=("prompt",))
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in chain.rows]
    assert findings["prompts"] == 40 == len(rows)
    assert all(len(r["samples"]) == len(r["complete"]) == 2 for r in rows)
    share = np.mean([r["complete"] for r in rows])
    assert findings["share of samples that end by themselves"] == pytest.approx(share)
    assert share > 0
    assert any(len(set(r["samples"])) > 1 for r in rows)
    execute(replace(stage, out=tmp_path / "b"))
    files = [(tmp_path / name / "rows.parquet").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    execute(replace(stage, out=tmp_path / "few", prompts=3))
    few = read(tmp_path / "few/rows.parquet", need=("prompt",))
    assert [row["prompt"] for row in few] == [row["prompt"] for row in chain.rows[:3]]


def sampled(*samples, complete=None, completion="human"):
    return {
        "prompt": "p",
        "completion": completion,
        "samples": list(samples),
        "complete": complete or [True] * len(samples),
    }


def test_pairs_of_four_samples_by_hand():
    def extra(text):
        return {"ref_sample": text, "ref_sample_complete": True}

    assert to_label(sampled("a", "b", "c", "d")) == [
        {"prompt": "p", "chosen": "a", "rejected": "b"} | extra("c"),
        {"prompt": "p", "chosen": "c", "rejected": "d"} | extra("a"),
        {"prompt": "p", "chosen": "human", "rejected": "a"} | extra("b"),
    ]


@pytest.mark.parametrize("n", [3, 4, 5, 6])
@pytest.mark.parametrize("cut", [(), (0,), (1,), (2, 0)])
def test_pairs_hold_finished_samples_and_a_reference_sample_from_outside(n, cut):
    """All texts differ, so a sample is known by its text; one cut short may be the reference's,
    with
    its flag."""
    complete = [i not in cut for i in range(n)]
    rows = to_label(sampled(*(f"s{i}" for i in range(n)), complete=complete))
    for row in rows:
        assert row["ref_sample"] not in (row["chosen"], row["rejected"])
        assert row["ref_sample_complete"] == complete[int(row["ref_sample"][1:])]
        assert not {row["chosen"], row["rejected"]} & {f"s{i}" for i in cut}
    intact = sum(complete[i] and complete[i + 1] for i in range(0, n - 1, 2))
    assert len(rows) == intact + complete[0]


def test_equal_and_blank_texts_make_no_pairs():
    assert to_label(sampled("a", " a ", "b", "  ", completion="a\n")) == []
    assert preferred(sampled("a", completion="a"), [sampled(completion=" a")]) == []


def test_human_preferences_by_hand():
    others = [sampled("x", completion="elsewhere"), sampled("y", completion="far away")]
    assert preferred(sampled("a", "b", "c", complete=[True, True, False]), others) == [
        {"prompt": "p", "chosen": "human", "rejected": rejected}
        for rejected in ("a", "b", "elsewhere", "far away")
    ]
    assert preferred(sampled("a", complete=[False]), others[:1]) == [
        {"prompt": "p", "chosen": "human", "rejected": "elsewhere"}
    ]


def test_pairs_stage(tmp_path):
    rows = [sampled("a", "b", "c", completion=f"human {i}") | {"prompt": f"p{i}"} for i in range(5)]
    findings = execute(Pairs(out=tmp_path / "a", data=jsonl(tmp_path / "rows.jsonl", rows)))
    labelled, human = (read(tmp_path / f"a/{name}.parquet") for name in ("rows", "human"))
    assert findings == {"pairs to label": 10, "human preferences": len(human)}
    assert len(labelled) == 10
    assert all(r["chosen"] == f"human {r['prompt'][1:]}" for r in human)
    for sample in "abc":
        assert sum(r["rejected"] == sample for r in human) == 5
    elsewhere = [r for r in human if r["rejected"] not in "abc"]
    assert len(human) == 15 + len(elsewhere)
    assert all(r["rejected"] != r["chosen"] for r in elsewhere)
    # Each of three permutations of the five completions gives a prompt one of them, its own now and
    # then.
    assert 5 <= len(elsewhere) <= 15
    counts = [sum(r["rejected"] == f"human {i}" for r in elsewhere) for i in range(5)]
    assert max(counts) <= 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"samples": None}, "row 2: field 'samples': must be a list of texts; `sample` adds it"),
        ({"samples": "ab"}, "row 2: field 'samples'"),
        ({"samples": []}, "row 2: field 'samples'"),
        ({"samples": [1, 2]}, "row 2: field 'samples'"),
        ({"complete": None}, "row 2: field 'complete': must be a list of 2 booleans; `sample`"),
        ({"complete": [True]}, "row 2: field 'complete'"),
        ({"complete": [1, 1]}, "row 2: field 'complete'"),
    ],
)
def test_pairs_of_rows_without_their_samples_are_refused(tmp_path, change, named):
    rows = [sampled("a", "b"), sampled("a", "b") | change]
    refused(Pairs(out=tmp_path / "a", data=jsonl(tmp_path / "rows.jsonl", rows)), named)


def test_corpus_stage(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(200)]
    data = jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "P0 ", "completion": "again"}])
    findings, need = execute(Corpus(out=tmp_path / "a", data=data)), ("prompt", "completion")
    parts = {name: read(tmp_path / f"a/{name}.parquet", need=need) for name in findings}
    assert {name: len(part) for name, part in parts.items()} == findings
    assert sum(findings.values()) == 201
    prompts = [{r["prompt"].strip().lower() for r in part} for part in parts.values()]
    assert sum(map(len, prompts)) == 200  # no prompt in two parts
    assert 160 < findings["train"] < 198  # 180 expected, standard deviation 4.2


def test_corpus_reports_duplicates_and_bad_rows(tmp_path):
    """A pair that stands there three times, and one that is labelled both ways."""
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(60)]
    rows += [rows[0], rows[0], {"prompt": "p1", "chosen": "b", "rejected": "a"}, {"prompt": "p"}]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    findings = execute(Corpus(out=tmp_path / "a", data=data, bad_rows="skip"))
    assert findings["duplicate pairs"] == 2 and findings["pairs labelled both ways"] == 1
    [line] = (tmp_path / "a/bad_rows.txt").read_text().splitlines()
    assert line.startswith(f"{data}:64: field ")
    refused(Corpus(out=tmp_path / "b", data=data), "rows.jsonl:64: field")
    few = execute(Corpus(out=tmp_path / "c", data=data, rows=50, bad_rows="skip"))
    assert sum(few.values()) == 50


def test_a_run_of_epochs_has_as_many_steps_as_its_rows_need(chain, tmp_path):
    """40 rows, batches of 4: 1.5 epochs are 15 steps; and 0.01 epochs are one."""
    training = replace(FEW, epochs=1.5)
    findings = execute(chain.align("dpo", out=tmp_path / "a", training=training))
    assert findings["pairs seen"] == 60
    assert max(record["step"] for record in logged(tmp_path / "a/metrics.jsonl")) == 15
    reward = replace(chain.reward, out=tmp_path / "b", training=replace(FEW, epochs=0.01))
    assert execute(reward)["pairs seen by each"] == 4


def test_a_policy_that_runs_away_is_told_while_it_runs_and_at_its_end(chain, tmp_path):
    training = TrainingConfig(40, 8, 0.3, 1)
    stage = chain.align(
        "dpo", out=tmp_path / "a", training=training, validation=chain.scored, every=10
    )
    console.quiet = False
    with console.capture() as captured:
        findings = execute(stage)
    console.quiet = True
    text = captured.get()
    assert "fell" in "".join(findings["warnings"]), findings["warnings"]
    for sentence in findings["warnings"]:
        kind = sentence.split(" is ")[0].split(" are ")[0].split(" fell ")[0]
        assert text.count(f"warning: {kind}") == 2
    first = text.index("warning")
    assert first < text.index("steps in")  # the line at the end of training
    usual = execute(chain.align("dpo", out=tmp_path / "b", validation=chain.scored))
    assert "warnings" not in usual


def test_margins_and_kl_beyond_beta_are_told(chain, tmp_path):
    """beta 10 allows a KL of half a nat, which a run as short as this one leaves behind."""
    training = TrainingConfig(40, 8, 3e-2, 1)
    findings = execute(chain.align(
        "dpo", out=tmp_path / "a", beta=10.0, training=training, validation=chain.scored
    ))  # fmt: skip
    last = log_of(tmp_path / "a")[-1]
    margins, kl = findings["warnings"][:2]
    assert f"implicit rewards are {last['validation/rewards/margins']:.1f} nats" in margins
    assert last["validation/rewards/margins"] > 5 and last["validation/kl"] > 0.5
    assert f"KL(pi_ref || pi) is {last['validation/kl']:.3g} nats, beyond the 0.5 that" in kl


def test_reward_models_that_cannot_beat_the_longer_response_are_told(chain, tmp_path):
    """Where the longer response always wins, no model can be better than picking it."""
    rows = [{"prompt": f"p {i}", "chosen": "alpha beta gamma", "rejected": "x"} for i in range(20)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    findings = execute(replace(chain.reward, out=tmp_path / "a", data=data, validation=data))
    assert "no better than picking the longer response (1.00;" in findings["warnings"][0]


def test_a_policy_that_repeats_itself_is_told(chain, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": "alpha " * 12} for row in chain.rows]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    stuck = Sft(
        out=tmp_path / "stuck", data=data, init=chain.folder / "sft", limits=Limits(24, 40),
        training=TrainingConfig(150, 8, 3e-2, 5),
    )  # fmt: skip
    execute(stuck)
    evaluation = Evaluate(
        out=tmp_path / "evaluation", data=chain.data, policies=(tmp_path / "stuck",),
        reference=chain.folder / "sft", rewards=chain.folder / "rewards", limits=Limits(24, 40),
    )  # fmt: skip
    repeats, resembles = execute(evaluation)["warnings"]
    assert "the samples of stuck repeat themselves" in repeats
    assert "the samples of stuck resemble each other" in resembles


def test_a_corpus_without_data_is_a_village_of_its_seed(tmp_path):
    """All 9000 rows of `village(seed=3)`, whose prompts differ, each in one part."""
    findings, need = execute(Corpus(out=tmp_path / "a", seed=3)), ("prompt", "completion")
    parts = [read(tmp_path / f"a/{name}.parquet", need=need) for name in findings]
    rows = {(row["prompt"], row["completion"]) for part in parts for row in part}
    assert rows == {(row["prompt"], row["completion"]) for row in village(seed=3)}
    assert sum(findings.values()) == 9000 == len(rows)
    assert findings["train"] == pytest.approx(0.9 * 9000, abs=115)  # standard deviation 28


def test_a_corpus_may_be_of_docstrings_and_data_comes_first(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(200)]
    monkeypatch.setattr(corpus, "docstrings", lambda: rows)
    monkeypatch.setattr(corpus, "village", lambda *_: pytest.fail("not asked for"))
    assert sum(execute(Corpus(out=tmp_path / "a", source="docstrings")).values()) == 200
    data = jsonl(tmp_path / "rows.jsonl", rows[:100])
    assert sum(execute(Corpus(out=tmp_path / "b", data=data)).values()) == 100


# ---- evaluation


def test_evaluate(chain, tmp_path):
    """The reference against itself has KL 0, and the numbers that `summary` gives are those of the
    rows."""
    stage = Evaluate(
        out=tmp_path / "a",
        data=chain.data,
        policies=(chain.folder / "sft", chain.folder / "sft"),
        reference=chain.folder / "sft",
        rewards=chain.folder / "rewards",
        limits=LIMITS,
    )
    first, second = execute(stage)["policies"]
    rows = read(tmp_path / "a/rows.parquet", need=("prompt",))
    assert [r["policy"] for r in rows] == [0] * 40 + [1] * 40
    assert first == second  # common random numbers
    own = [r for r in rows if r["policy"] == 0]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["win"] + first["tie"] + first["loss"] == pytest.approx(1)
    advantage = np.mean([r["reward"] - r["reference_reward"] for r in own])
    assert first["advantage"] == pytest.approx(advantage) and advantage != 0
    assert first["low"] <= advantage <= first["high"]
    assert first["win"] == pytest.approx(np.mean([r["win"] for r in own]))
    assert all(len(r["samples"]) == len(r["reference_samples"]) == stage.n == 2 for r in rows)
    judge = model_folder.load_rewards(chain.folder / "rewards")
    for start in ("", "reference_"):  # a sample that was cut has no end of sequence
        whole = [r for r in own if not r[f"{start}cut"]]
        assert len(whole) > 30
        texts = [dict(zip("ab", r[f"{start}samples"], strict=True)) | {"prompt": r["prompt"]}
                 for r in whole]  # fmt: skip
        values = rewards(judge.model, dataset_of(judge, texts, ["a", "b"]))
        expected = [r[f"{start}reward"] for r in whole]
        np.testing.assert_allclose(expected, values.mean((1, 2)), atol=1e-4)
    assert [r["samples"] for r in own] != [r["reference_samples"] for r in own]  # another seed
    assert [r["reference_samples"] for r in own] == [r["reference_samples"] for r in rows[40:]]


def test_a_policy_whose_own_tokens_are_too_many_is_refused(chain, tmp_path):
    """Its tokenizer knows bytes alone, so that its prompts are longer than pi_ref's."""
    model = replace(MODEL, vocab_size=261)
    other = Sft(out=tmp_path / "other", data=chain.data, model=model, limits=Limits(99, 99),
                training=FEW)  # fmt: skip
    execute(other)
    tokenizer = model_folder.tokenizer_of(chain.folder / "sft")
    longest = max(len(tokenizer.prompt_ids(row["prompt"])) for row in chain.rows)
    data = jsonl(tmp_path / "rows.jsonl", [chain.rows[0] | {"prompt": "p"}, *chain.rows])
    stage = Evaluate(
        out=tmp_path / "a", data=data, policies=(other.out,), limits=Limits(longest, 12),
        reference=chain.folder / "sft", rewards=chain.folder / "rewards",
    )  # fmt: skip
    refused(stage, r"other: 40 of 41 prompts are over --limits.prompt in its tokens, but not in")


def test_rows_of_one_prompt_count_as_one():
    """Ten copies of a row tell no more than one."""
    rows = [
        {"prompt": f"p{i}", "reward": float(i), "reference_reward": 1.0, "kl": 0.0, "tokens": 1.0}
        for i in range(8)
    ]
    assert summary(rows * 10) == pytest.approx(summary(rows))


def test_per_prompt_and_summary_by_hand():
    def outcomes(rewards, texts, tokens):
        return {
            "rewards": np.array(rewards),
            "kl": np.array([[1.0, 3.0], [0.0, 1.0]]),
            "tokens": np.array(tokens),
            "cut": np.array([[False, True], [False, False]]),
            "sampled": [{"prompt": "p"}, {"prompt": "q"}],
            "texts": texts,
        }

    ours = outcomes([[1.0, 2.0], [3.0, 3.0]], [["s", "t"], ["u", "v"]], [[2, 4], [5, 6]])
    theirs = outcomes([[0.0, 2.0], [4.0, 2.0]], [["S", "T"], ["U", "V"]], [[1, 1], [2, 3]])
    rows = per_prompt(7, ours, theirs)
    assert rows == [
        {
            "policy": 7,
            "prompt": "p",
            "samples": ["s", "t"],
            "reference_samples": ["S", "T"],
            "reward": 1.5,
            "reference_reward": 1.0,
            "win": 0.5,
            "tie": 0.5,
            "loss": 0.0,
            "kl": 2.0,
            "tokens": 3.0,
            "reference_tokens": 1.0,
            "cut": 0.5,
            "reference_cut": 0.5,
        },
        {
            "policy": 7,
            "prompt": "q",
            "samples": ["u", "v"],
            "reference_samples": ["U", "V"],
            "reward": 3.0,
            "reference_reward": 3.0,
            "win": 0.5,
            "tie": 0.0,
            "loss": 0.5,
            "kl": 0.5,
            "tokens": 5.5,
            "reference_tokens": 2.5,
            "cut": 0.0,
            "reference_cut": 0.0,
        },
    ]
    means = summary(rows)
    assert {k: v for k, v in means.items() if k not in ("low", "high")} == {
        "advantage": 0.25,
        "win": 0.5,
        "tie": 0.25,
        "loss": 0.25,
        "kl": 1.25,
        "tokens": 4.25,
    }
    assert (means["low"], means["high"]) == (0.0, 0.5)  # the mean of two draws of {0, 1/2}


def test_samples_that_read_as_more_tokens_than_were_sampled(chain, tmp_path):
    """A young policy samples bytes that are no text; each is replaced by a character of three
    bytes.

    No row is lost for it: reference samples are scored, and evaluation compares every prompt.
    """
    young, training = tmp_path / "young", replace(FEW, learning_rate=1e-30)
    execute(replace(chain.sft, out=young, training=training, validation=None))
    options = {"data": chain.data, "reference": young, "limits": LIMITS}
    assert execute(Score(out=tmp_path / "scored", **options))["rows"] == 40
    options |= {"policies": (young,), "rewards": chain.folder / "rewards"}
    findings = execute(Evaluate(out=tmp_path / "a", **options))
    assert np.isfinite(findings["policies"][0]["advantage"])


def test_a_long_reference_sample_is_scored_and_not_dropped(chain, tmp_path):
    """As many letters that are no part of a learned word, so 60 tokens at least, where a response
    may have 12."""
    texts = ["q" * 60 * (i == 3) + "beta" for i in range(40)]
    rows = [row | {"ref_sample": text} for row, text in zip(chain.rows, texts, strict=True)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    reference = chain.folder / "sft"
    execute(Score(out=tmp_path / "a", data=data, reference=reference, limits=LIMITS))
    logps = [row["ref_sample_logps"] for row in read(tmp_path / "a/rows.parquet")]
    assert len(logps) == 40 and logps.index(min(logps)) == 3


def test_limits_are_kept_whether_or_not_a_method_has_a_kl(chain, tmp_path):
    """The room for re-read samples is not room for longer chosen responses than `--limits`
    allows."""
    rows = read(chain.scored)
    long = [row | {"chosen": "q x z w " * 2 + row["chosen"]} for row in rows[:5]]
    data = rewritten(tmp_path, [*long, *rows[5:]])
    pairs = [
        execute(chain.align(m, out=tmp_path / m, data=data))["pairs"] for m in ("dpo", "p-dpo")
    ]
    assert pairs == [35, 35]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": replace(FEW, steps=0)}, "--training.steps: must be at least 1, not 0"),
        (
            {"training": replace(FEW, learning_rate=float("nan"))},
            "--training.learning-rate: must be above 0, not nan",
        ),
        (
            {"training": replace(FEW, seed=-1)},
            "--training.seed: must be within 0 and 4294967295, not -1",
        ),
        (
            {"training": replace(FEW, seed=2**32)},
            "--training.seed: must be within 0 and 4294967295, not 4294967296",
        ),
        (
            {"training": replace(FEW, batch_size=0)},
            "--training.batch-size: must be at least 1, not 0",
        ),
        ({"limits": Limits(0, 12)}, "--limits.prompt: must be at least 1, not 0"),
        ({"beta": 0.0}, "--beta: must be above 0, not 0"),
        ({"gamma": (0.1, -1.0)}, "--gamma: must be at least 0, not -1"),
    ],
)
def test_numbers_out_of_bounds_name_their_option(chain, tmp_path, change, message):
    stage = replace(chain.align("e-dpo"), out=tmp_path / "new", **change)
    with pytest.raises(InputError, match=message):
        execute(stage)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"rope_base": 0.0}, "--model.rope-base: must be above 0, not 0"),
        ({"norm_eps": -1.0}, "--model.norm-eps: must be at least 0, not -1"),
        ({"head_dim": 7}, "--model.head-dim 7: must be even"),
        ({"num_heads": 3, "num_kv_heads": 2}, "--model.num-kv-heads 2: does not divide 3 heads"),
    ],
)
def test_bounds_of_a_shape(tmp_path, shape, message):
    data = jsonl(tmp_path / "rows.jsonl", made_rows(4))
    stage = Sft(out=tmp_path / "o", data=data, model=replace(MODEL, **shape), limits=LIMITS)
    refused(stage, message)
    assert not (tmp_path / "o").exists()


def test_bounds_of_shares():
    stage = Bias(out=Path("o"), data=Path("d"), tokenizer=Path("t"), rho=1.5)
    assert list(out_of_bounds(stage)) == ["--rho: must be within 0 and 1, not 1.5"]


def test_a_stage_that_failed_before_it_did_anything_leaves_its_folder_free(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p"}')
    stage = Corpus(out=tmp_path / "o", data=rows)
    with pytest.raises(InputError, match="missing"):
        execute(stage)
    jsonl(rows, [{"prompt": f"p{i}", "completion": "c"} for i in range(200)])
    assert sum(execute(stage).values()) == 200


@pytest.mark.parametrize(
    ("name", "stays"), [("stage.json", False), ("tokens/reference/samples-0/tokens.npy", True)]
)
def test_what_a_failed_stage_computed_stays(tmp_path, name, stays):
    """For instance the samples of an evaluation whose judge then did not answer."""
    (tmp_path / "a" / name).parent.mkdir(parents=True)
    (tmp_path / "a" / name).touch()
    write_json(tmp_path / "a/stage.json", {})
    discard_unstarted(tmp_path / "a")
    assert (tmp_path / "a" / name).exists() == (tmp_path / "a").exists() == stays


def test_a_folder_that_another_command_writes_is_refused_and_left_alone(chain, tmp_path):
    stage = replace(chain.score, out=tmp_path / "a")
    with alone(stage.out):
        refused(stage, rf"--out .*a: another command writes it( \(process {os.getpid()}\))?$")
        assert list(stage.out.iterdir()) == []
    execute(stage)


def test_what_only_saves_memory_may_change_between_two_calls(chain, tmp_path):
    stage = chain.align("dpo", out=tmp_path / "a")
    parts = replace(stage, training=replace(FEW, accumulation=2))
    assert describe(stage) == describe(parts)
    assert "steps" in describe(stage)["options"]["training"]


def test_an_input_belongs_to_its_option(chain, tmp_path):
    """The same folders, but another one is pi_ref."""
    a, b = chain.folder / "sft", chain.folder / "rewards"
    stage = Evaluate(out=tmp_path, data=chain.data, policies=(a,), reference=b, baseline=a)
    other = replace(stage, policies=(a, b), reference=a, baseline=None)
    assert [contents for _, contents in describe(stage)["inputs"]] == [
        contents for _, contents in describe(other)["inputs"]
    ]
    assert describe(stage)["inputs"] != describe(other)["inputs"]


@pytest.mark.parametrize("name", ["checkpoints/mine", "tokens/mine", "config.json"])
def test_a_folder_that_no_stage_began_is_left_as_it_is(tmp_path, name):
    """The user's own files, which a stage would overwrite or remove with its scratch folders."""
    data = jsonl(tmp_path / "rows.jsonl", made_rows(1))
    (tmp_path / "o" / name).parent.mkdir(parents=True)
    (tmp_path / "o" / name).write_text("mine")
    refused(Corpus(out=tmp_path / "o", data=data), "o: is not empty, and no stage began it")
    assert [path.read_text() for path in (tmp_path / "o").rglob("*") if path.is_file()] == ["mine"]


@pytest.mark.parametrize(
    ("text", "named"),
    [("mine", r"o/stage\.json: cannot be read"), ("{}", r"o/stage\.json: 'options' is")],
)
def test_a_stage_file_of_another_program_is_refused(tmp_path, text, named):
    data = jsonl(tmp_path / "rows.jsonl", made_rows(1))
    (tmp_path / "o").mkdir()
    (tmp_path / "o/stage.json").write_text(text)
    refused(Corpus(out=tmp_path / "o", data=data), named)


def test_too_few_rows_for_a_part_are_an_error(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match="1 rows are too few for a"):
        execute(Corpus(out=tmp_path / "o", data=rows))


def test_weights_that_are_not_finite_are_refused(chain, tmp_path):
    policy = model_folder.load_policy(chain.folder / "sft")
    broken = eqx.tree_at(lambda m: m.norm, policy.model, policy.model.norm * np.nan)
    model_folder.save(replace(policy, path=tmp_path / "p", model=broken))
    with pytest.raises(InputError, match="a weight is not finite"):
        model_folder.load_policy(tmp_path / "p")


def test_a_part_of_a_split_corpus_can_be_split_again(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(300)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    execute(Corpus(out=tmp_path / "c", data=data, validation=0.3, test=0.3))
    for part in ("train", "validation", "test"):
        stage = Reward(out=tmp_path / "r", data=tmp_path / f"c/{part}.parquet", init=tmp_path)
        train, held_out = stage.parts()
        assert 2 <= len(held_out) <= 30 and len(train) > 3 * len(held_out)
