"""Adapters: what they compute, their gradients by the chain rule, the stages that train them."""

import json
import re
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minipref.batch import Batch, Targets, attention_mask
from minipref.methods import METHODS
from minipref.reward_models import RewardModel, ensemble_rewards, stack
from minipref.training import Hyperparameters
from scale.console import console
from scale.data.dataset import Dataset, Limits
from scale.data.layout import smallest_shape
from scale.data.packing import tokenized_rows
from scale.data.rows import read
from scale.data.tokenizer import train_tokenizer
from scale.errors import InputError
from scale.files import read_json
from scale.io.model_folder import ModelFolder, load_policy, load_rewards, load_trunk, save
from scale.io.peft import export_adapters
from scale.model import inference
from scale.model.adapters import (
    PRODUCTS,
    AdapterConfig,
    adapted,
    adapter_config,
    adapters_of,
    combine,
    merged,
    partition,
)
from scale.model.attention import masked
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.mesh import Runtime, RuntimeConfig
from scale.stages.align import Align
from scale.stages.export import Export
from scale.stages.reward import Reward
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.stages.stage import execute
from scale.train.loop import TrainingConfig
from scale.train.steps import language_model_loss, policy_loss
from tests.scale.test_stages import jsonl, made_rows

HERE = Runtime()
TOKENIZER = train_tokenizer(["alpha beta gamma delta 0 1 2 3 4 5 6 7 8 9"], 280)
CONFIG = ModelConfig(
    280, 2, 16, 4, 4, 24, num_kv_heads=2, block="sequential", norm="rms", tie_embeddings=False,
    scaled_logits=False,
)  # fmt: skip
ADAPTER = AdapterConfig(rank=3, scale=0.5)
LIMITS = Limits(24, 12)
FEW = TrainingConfig(4, 4, 1e-2, 1)
BETA = Hyperparameters(jnp.asarray(0.1), jnp.asarray((0.5, 0.5)))
ROWS = [([5, 6, 7], [[8, 9, 1], [10, 1], [11]]), ([15, 16], [[17], [18, 19, 1], [12, 1]])]


def random_model(config: ModelConfig = CONFIG) -> Transformer:
    rng = np.random.default_rng(0)
    like = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, jnp.float32), like)


def trained_adapters(config: AdapterConfig = ADAPTER, seed: int = 1) -> Transformer:
    """A random model, whose adapters are random too: new ones add nothing."""
    model = adapted(random_model(), config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return eqx.tree_at(
        lambda m: [a.up for a in adapters_of(m)],
        model,
        replace_fn=lambda up: jnp.asarray(rng.normal(size=up.shape) * 0.3, jnp.float32),
    )


def dataset(num_reward_models: int = 3) -> Dataset:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(2, 2, num_reward_models)).astype(np.float32)
    ref_logps = rng.normal(size=(2, 3)).astype(np.float32) - 9
    return Dataset(tokenized_rows(ROWS), Targets(ref_logps, rewards), np.arange(2))


def batch(num_reward_models: int = 3) -> Batch:
    """The two rows in one packed sequence."""
    rows = dataset(num_reward_models)
    shape = smallest_shape(rows.tokens.lengths, 1)
    return jax.tree.map(jnp.asarray, rows.batch(np.arange(2), shape))


def by_hand(model: Transformer) -> Transformer:
    """Each product's weights with scale * down @ up added, as sums over their own axes."""
    patterns = {
        "query": "ldr,lrhk->ldhk",
        "key_value": "ldr,lrcgk->ldcgk",
        "attention_out": "lhkr,lrd->lhkd",
        "gate_up": "ldr,lrcf->ldcf",
        "mlp_out": "lfr,lrd->lfd",
    }
    for name in PRODUCTS:
        node = getattr(model.blocks, name)
        added = np.einsum(patterns[name], *(np.asarray(a, float) for a in (node.down, node.up)))
        weights = jnp.asarray(np.asarray(node.weights) + node.scale * added, jnp.float32)
        model = eqx.tree_at(lambda m, name=name: getattr(m.blocks, name), model, weights)
    return model


def logits(model: Transformer) -> np.ndarray:
    return np.asarray(model(batch().inputs) @ model.unembedding.T)


def test_an_adapter_adds_its_product_to_the_weights():
    model = trained_adapters()
    np.testing.assert_allclose(logits(model), logits(by_hand(model)), rtol=2e-4, atol=2e-5)
    assert np.abs(logits(model) - logits(random_model())).max() > 0.5


def test_merged_weights_are_the_sums():
    model = trained_adapters()
    for ours, theirs in zip(*map(jax.tree.leaves, (merged(model), by_hand(model))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_new_adapters_change_nothing():
    model = random_model()
    fresh = adapted(model, ADAPTER, jax.random.key(0))
    np.testing.assert_array_equal(logits(fresh), logits(model))
    assert all(np.abs(a.down).max() > 0.1 for a in adapters_of(fresh))


def test_what_is_trained_by_its_number_of_parameters():
    """Rank x (inputs + results) for each product of each layer, keys and values as one."""
    inputs_and_results = {
        "query": 16 + 16, "key_value": 16 + 16, "attention_out": 16 + 16, "gate_up": 16 + 48,
        "mlp_out": 24 + 16,
    }  # fmt: skip
    for products in (PRODUCTS, ("query", "mlp_out")):
        config = replace(ADAPTER, products=products)
        model = adapted(random_model(), config, jax.random.key(0))
        trained, frozen = partition(model)
        assert parameter_count(trained) == 2 * 3 * sum(map(inputs_and_results.get, products))
        assert parameter_count(frozen) == parameter_count(random_model())
        assert jax.tree.structure(combine(trained, frozen)) == jax.tree.structure(model)
        assert adapter_config(model) == config
    assert adapter_config(random_model()) is None


def test_of_a_reward_model_the_head_is_trained_too():
    trained, _ = partition(RewardModel(trained_adapters(), 16, jax.random.key(0)))
    assert trained.head.shape == (16,) and trained.trunk.norm is None


LOSSES = {name: partial(policy_loss, name, 0.0) for name in METHODS}
LOSSES["sft"] = partial(language_model_loss, 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_weights_by_the_chain_rule(name):
    """W' = W + s A B, so that dL/dA = s dL/dW' B^T and dL/dB = s A^T dL/dW'. Full training of the
    weights in this subspace is therefore the same."""
    model = trained_adapters()
    data = batch(1 if name in METHODS and METHODS[name].rewards == "single" else 3)
    trained, frozen = partition(model)

    def loss(part, rest):
        return LOSSES[name](combine(part, rest), data, BETA, jnp.asarray(0.5))[0]

    low = eqx.filter_jit(eqx.filter_grad(loss))(trained, frozen)
    full = eqx.filter_jit(eqx.filter_grad(loss))(by_hand(model), None)
    for product in PRODUCTS:
        node, ours = getattr(model.blocks, product), getattr(low.blocks, product)
        weights = np.asarray(getattr(full.blocks, product), float)
        down, up = np.asarray(node.down, float), np.asarray(node.up, float)
        rank, layers = up.shape[1], len(up)
        flat_down, flat_up = down.reshape(layers, -1, rank), up.reshape(layers, rank, -1)
        flat = weights.reshape(layers, flat_down.shape[1], -1)
        for gradient, expected in (
            (ours.down, node.scale * flat @ flat_up.transpose(0, 2, 1)),
            (ours.up, node.scale * flat_down.transpose(0, 2, 1) @ flat),
        ):
            expected = expected.reshape(gradient.shape)
            np.testing.assert_allclose(
                gradient, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max()
            )
        assert np.abs(ours.up).max() > 0 and ours.weights is None


def test_of_full_rank_the_first_step_is_that_of_full_training():
    """With A the unit matrix, B = 0 and s = 1, a step of gradient descent on B moves the weights by
    the rate times their own gradient."""
    data, start = batch(), random_model()
    config = AdapterConfig(rank=16, scale=1.0, products=("query", "gate_up"))
    model = eqx.tree_at(
        lambda m: [a.down for a in adapters_of(m)],
        adapted(start, config, jax.random.key(0)),
        replace_fn=lambda down: jnp.broadcast_to(jnp.eye(16), down.shape),
    )
    trained, frozen = partition(model)
    dpo = partial(LOSSES["dpo"], batch=data, hyperparameters=BETA, progress=jnp.asarray(0.5))
    ups = eqx.filter_jit(eqx.filter_grad(lambda part: dpo(combine(part, frozen))[0]))(trained)
    moved = merged(
        eqx.tree_at(
            lambda m: [a.up for a in adapters_of(m)],
            model,
            [-0.1 * a.up for a in adapters_of(ups)],
        )
    )
    full = eqx.filter_jit(eqx.filter_grad(lambda model: dpo(model)[0]))(start)
    expected = optax.apply_updates(start, jax.tree.map(lambda g: -0.1 * g, full))
    for product in config.products:
        before = getattr(start.blocks, product)
        step = getattr(moved.blocks, product) - before
        assert float(jnp.abs(step).max()) > 1e-4
        np.testing.assert_allclose(
            step, getattr(expected.blocks, product) - before, rtol=2e-3, atol=3e-7
        )


def test_an_ensemble_with_one_trunk_has_the_rewards_of_separate_models():
    data = batch().inputs
    models = [
        RewardModel(trained_adapters(seed=k), 16, jax.random.key(k)) for k in range(3)
    ]
    parts, (frozen, *_) = zip(*map(partition, models), strict=True)
    ensemble = combine(stack(list(parts)), frozen)
    ours = inference.jitted_rewards(ensemble, data)
    plain = stack([eqx.tree_at(lambda m: m.trunk, m, by_hand(m.trunk)) for m in models])
    np.testing.assert_allclose(ours, ensemble_rewards(plain, data), rtol=2e-4, atol=2e-5)
    assert ensemble.trunk.embedding.shape == (280, 16)


# ---- folders and stages


@pytest.fixture(scope="module", autouse=True)
def silent():
    console.quiet = True
    yield
    console.quiet = False


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A policy, reward models with adapters on it, their columns, a policy with adapters."""
    folder = tmp_path_factory.mktemp("chain")
    data = jsonl(folder / "rows.jsonl", made_rows())
    save(ModelFolder(folder / "trunk", random_model(), CONFIG, TOKENIZER))
    options = {"training": FEW, "limits": LIMITS, "adapter": ADAPTER}
    execute(
        Reward(
            out=folder / "rewards", data=data, init=folder / "trunk", num_reward_models=3,
            validation=data, **options,
        )
    )  # fmt: skip
    execute(
        Score(
            out=folder / "scored", data=data, rewards=folder / "rewards",
            reference=folder / "trunk", limits=LIMITS,
        )
    )  # fmt: skip
    execute(
        Align(
            out=folder / "policy", data=folder / "scored/rows.parquet", policy=folder / "trunk",
            validation=folder / "scored/rows.parquet", snapshots=1, **options,
        )
    )  # fmt: skip
    return folder


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def test_a_folder_holds_what_was_trained_and_names_the_rest(chain):
    record = read_json(chain / "policy/config.json")
    assert record["trunk"]["path"] == "../trunk"
    assert record["adapter"] == {"rank": 3, "scale": 0.5, "products": list(PRODUCTS)}
    policy = load_policy(chain / "policy")
    trained, frozen = partition(policy.model)
    trunk = load_policy(chain / "trunk")
    matrices = [a.weights for a in adapters_of(policy.model)]
    originals = [getattr(trunk.model.blocks, name) for name in PRODUCTS]
    by_size = {m.shape: m for m in originals}
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, by_size[matrix.shape])
    assert len(leaves(frozen)) == len(leaves(trunk.model))
    assert all(np.abs(a.up).max() > 1e-3 for a in adapters_of(policy.model))
    size = (chain / "policy/weights.safetensors").stat().st_size
    assert 0 < size - 4 * parameter_count(trained) < 4000
    assert (chain / "policy/step-1/weights.safetensors").exists()
    logps = inference.sequence_logps(policy.model, dataset())
    merged_logps = inference.sequence_logps(merged(policy.model), dataset())
    np.testing.assert_allclose(logps, merged_logps, rtol=1e-4)


def test_reward_models_share_their_trunk_and_have_adapters_of_their_own(chain):
    models = load_rewards(chain / "rewards").model
    first = adapters_of(models)[0]
    assert first.weights.ndim == 4 and first.down.shape == (3, 2, 16, 3)
    assert np.abs(first.down[0] - first.down[1]).max() > 0.1
    scores = [row["score_chosen"] for row in read(chain / "scored/rows.parquet")]
    assert np.asarray(scores).shape == (40, 3) and np.std(scores, axis=1).min() > 0


def test_a_policy_with_adapters_is_a_start_and_a_trunk(chain, tmp_path):
    """Its adapters are added to its weights; the new ones lie over them."""
    scored = Score(
        out=tmp_path / "scored", data=chain / "rows.jsonl", reference=chain / "policy",
        rewards=chain / "rewards", limits=LIMITS,
    )  # fmt: skip
    execute(scored)
    for rank in (0, 2):
        command = Align(
            out=tmp_path / str(rank), data=tmp_path / "scored/rows.parquet", limits=LIMITS,
            policy=chain / "policy", adapter=AdapterConfig(rank), training=FEW,
        )  # fmt: skip
        execute(command)
        loaded = load_policy(command.out)
        assert adapter_config(loaded.model) == (AdapterConfig(rank) if rank else None)
    start = load_trunk(chain / "policy", HERE, AdapterConfig(), 0).model
    frozen = [a.weights for a in adapters_of(loaded.model)]
    np.testing.assert_array_equal(frozen[0], start.blocks.query)
    np.testing.assert_allclose(
        start.blocks.query, by_hand(load_policy(chain / "policy").model).blocks.query, atol=1e-6
    )


def test_models_with_adapters_have_one_trunk_in_memory(chain):
    """That of `score` and `evaluate`, which read pi_ref, reward models and policies together."""
    reference, policy = load_policy(chain / "trunk"), load_policy(chain / "policy")
    models = load_rewards(chain / "rewards")
    for other in (policy.model, models.model.trunk):
        assert other.embedding is reference.model.embedding
        assert other.blocks.query.weights is reference.model.blocks.query
    start = load_trunk(chain / "policy", HERE, AdapterConfig(), 0).model  # full training
    assert start.embedding is not reference.model.embedding


def test_a_trunk_that_has_changed_or_gone_is_refused_by_name(chain, tmp_path):
    for name in ("trunk", "policy"):
        (tmp_path / name).mkdir()
        for file in (chain / name).glob("*.*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    assert load_policy(tmp_path / "policy").config == CONFIG
    other = random_model(CONFIG)
    other = eqx.tree_at(lambda m: m.norm, other, other.norm + 1)
    save(ModelFolder(tmp_path / "trunk", other, CONFIG, TOKENIZER))
    with pytest.raises(InputError, match=r"trunk: has changed since the adapters of .*policy"):
        load_policy(tmp_path / "policy")
    (tmp_path / "trunk").rename(tmp_path / "moved")
    gone = f"{tmp_path}/policy: the model below its adapters is not at {tmp_path}/trunk"
    with pytest.raises(InputError, match=f"^{re.escape(gone)}$"):
        load_policy(tmp_path / "policy")


def test_below_adapters_matrices_have_the_dtype_of_activations(chain):
    runtime = Runtime(dtype="bfloat16")
    model = load_trunk(chain / "trunk", runtime, ADAPTER, 0).model
    assert {a.weights.dtype for a in adapters_of(model)} == {jnp.dtype("bfloat16")}
    assert model.embedding.dtype == jnp.bfloat16 and model.norm.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(partition(model)[0])} == {jnp.dtype("float32")}
    full = load_trunk(chain / "trunk", runtime, AdapterConfig(), 0).model
    assert {leaf.dtype for leaf in jax.tree.leaves(full)} == {jnp.dtype("float32")}
    rounded = inference.sequence_logps(full, dataset())
    np.testing.assert_array_equal(inference.sequence_logps(model, dataset()), rounded)


def test_adapters_need_a_model_below_them(chain, tmp_path):
    with pytest.raises(InputError, match=r"--adapter\.rank: adapters need a model below them"):
        execute(Sft(out=tmp_path / "a", data=chain / "rows.jsonl", adapter=ADAPTER, limits=LIMITS))


def test_sft_with_adapters_lowers_the_loss(chain, tmp_path):
    losses = []
    for steps in (1, 60):
        stage = Sft(
            out=tmp_path / str(steps), data=chain / "rows.jsonl", init=chain / "trunk",
            validation=chain / "rows.jsonl", adapter=ADAPTER, limits=LIMITS,
            training=TrainingConfig(steps, 8, 1e-2, 1),
        )  # fmt: skip
        losses.append(execute(stage)["validation loss (nats a token)"])
    assert losses[1] < losses[0] - 0.3


# ---- other programs


def test_an_export_has_the_adapters_in_its_weights(chain, tmp_path):
    Export(policy=chain / "policy", out=tmp_path / "hf").run()
    exported, policy = load_policy(tmp_path / "hf"), load_policy(chain / "policy")
    assert adapter_config(exported.model) is None
    np.testing.assert_allclose(logits(exported.model), logits(policy.model), rtol=1e-3, atol=1e-4)


def test_an_export_is_not_rounded_to_the_dtype_of_activations(chain, tmp_path):
    for name, dtype in (("a", "float32"), ("b", "bfloat16")):
        runtime = RuntimeConfig(dtype=dtype)
        Export(policy=chain / "policy", out=tmp_path / name, runtime=runtime).run()
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute of `transformers`
def test_peft_loads_the_adapters(chain, tmp_path):
    torch = pytest.importorskip("torch", reason="extra 'peers' is not installed")
    peft = pytest.importorskip("peft", reason="extra 'peers' is not installed")
    transformers = pytest.importorskip("transformers")
    Export(policy=chain / "trunk", out=tmp_path / "trunk").run()
    Export(policy=chain / "policy", out=tmp_path / "peft", adapters=True).run()
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(chain / "trunk")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trunk")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9, 1]])
    with torch.no_grad():
        theirs = model(tokens).logits[0].numpy()
    ours = own_logits(load_policy(chain / "policy").model, tokens.numpy())
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)
    plain = own_logits(load_policy(chain / "trunk").model, tokens.numpy())
    assert np.abs(theirs - plain).max() > 1e-2


def own_logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.arange(tokens.shape[1])[None]
    attend = masked(attention_mask(jnp.zeros(tokens.shape, jnp.int32)))
    hidden = model.hidden(jnp.asarray(tokens), positions, attend)[0]
    return np.asarray(hidden @ model.unembedding.T)[0]


def test_adapters_of_a_model_that_peft_cannot_load_are_not_exported(tmp_path):
    palm = adapted(random_model(replace(CONFIG, block="parallel")), ADAPTER, jax.random.key(0))
    with pytest.raises(InputError, match=r"block = 'parallel' .* cannot be exported"):
        export_adapters(tmp_path / "peft", palm, "trunk")
    assert not (tmp_path / "peft").exists()


def test_a_policy_without_adapters_has_none_to_export(chain, tmp_path):
    with pytest.raises(InputError, match="--adapters: the policy has none"):
        Export(policy=chain / "trunk", out=tmp_path / "peft", adapters=True).run()
    assert not (tmp_path / "peft").exists()
