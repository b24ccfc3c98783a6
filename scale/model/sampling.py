"""Ancestral sampling with a key/value cache: all samples of a prompt share one encoding of it.

Prompts are encoded end to end, without padding. In the cache each has P tokens, and at most R new
ones:

    index   0 ... length-1 | length ... P-1 | P ... P+R-1
            prompt           padding          response

Heads come before tokens in it, and keys have tokens last, so that a new token attends to it by
products of its parts as they lie there: XLA on a CPU is several times slower with keys as values
lie. A new token is written once for all layers.
"""

import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from minipref.batch import Inputs, attention_mask
from minipref.logps import gather
from scale.model.attention import masked
from scale.model.layers import KeysValues
from scale.model.packed_attention import by_example, moves
from scale.model.transformer import Transformer


class Cache(NamedTuple):
    """Keys and values of S tokens, of every layer or of one."""

    keys: Float[Array, "*layers B G k S"]
    values: Float[Array, "*layers B G S k"]


class Samples(NamedTuple):
    """n samples for each of B prompts.

    Attributes:
        tokens: Token ids [B, n, R]: where `complete`, one of `stops` and then padding.
        logps: Log-probabilities of the samples under the model [B, n], nats.
        complete: Whether a sample ends within R tokens [B, n].
    """

    tokens: Int[Array, "B n R"]
    logps: Float[Array, "B n"]
    complete: Bool[Array, "B n"]


class State(NamedTuple):
    """What the loop over tokens carries: N samples of `length` tokens."""

    length: Int[Array, ""]
    hidden: Float[Array, "N D"]
    cache: Cache
    done: Bool[Array, " N"]
    tokens: Int[Array, "N R"]
    logps: Float[Array, " N"]


@eqx.filter_jit
def sample(
    model: Transformer,
    prompts: Inputs,
    key: PRNGKeyArray,
    *,
    n: int,
    max_new: int,
    stops: tuple[int, ...],
    pad: int,
    temperature: float = 1.0,
) -> Samples:
    """Sample responses.

    Args:
        model: The policy.
        prompts: B packed prompts without responses, of at most P tokens.
        key: The source of randomness.
        n: Samples of each prompt.
        max_new: R, the most tokens of a sample.
        stops: The tokens that end a sample.
        pad: The token that fills up samples.
        temperature: 1 samples from the model itself, 0 is greedy.

    Returns:
        The samples. Their log-probabilities are at temperature 1, whatever `temperature` is.
    """
    lengths = (prompts.segment_ids >= 0).sum(1)
    hidden, cache = prefill(model, prompts, lengths, max_new)
    keys, (rows, width) = jax.random.split(key, max_new), prompts.segment_ids.shape
    hidden, lengths = jnp.repeat(hidden, n, 0), jnp.repeat(lengths, n, 0)
    start = State(
        length=jnp.zeros((), jnp.int32),
        hidden=hidden,
        cache=jax.tree.map(lambda a: jnp.repeat(a, n, 1), cache),
        done=jnp.zeros(lengths.shape, bool),
        tokens=jnp.full((len(lengths), max_new), pad, prompts.tokens.dtype),
        logps=jnp.zeros(lengths.shape),
    )

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.length < max_new) & ~state.done.all()

    def step(state: State) -> State:
        token, logp = draw_tokens(
            state.hidden @ model.unembedding.T, keys[state.length], temperature
        )
        token, logp = jnp.where(state.done, pad, token), jnp.where(state.done, 0.0, logp)
        done = state.done | jnp.isin(token, jnp.array(stops))
        hidden, cache = extended(model, token, lengths, width, state)
        tokens = state.tokens.at[:, state.length].set(token)
        return State(state.length + 1, hidden, cache, done, tokens, state.logps + logp)

    end = jax.lax.while_loop(unfinished, step, start)
    columns = end.tokens, end.logps, end.done
    return Samples(*(column.reshape(rows, n, *column.shape[1:]) for column in columns))


def extended(
    model: Transformer,
    token: Int[Array, " N"],
    lengths: Int[Array, " N"],
    width: int,
    state: State,
) -> tuple[Float[Array, "N D"], Cache]:
    """The hidden states of the next token of each sample, and the cache with it."""
    index, room = state.length, state.tokens.shape[1]
    attend = partial(attend_cached, mask=visible(lengths, width, room, index))
    position = (lengths + index)[:, None]
    hidden, new = model.hidden(token[:, None], position, attend, state.cache, return_keys=True)
    return hidden[:, 0], written(state.cache, as_cache(new), width + index)


def prefill(
    model: Transformer, prompts: Inputs, lengths: Int[Array, " B"], room: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Encode prompts.

    Args:
        model: The policy.
        prompts: B packed prompts without responses, of at most P tokens.
        lengths: Tokens of each prompt [B].
        room: R, the new tokens that the cache has room for.

    Returns:
        The hidden state of each prompt's last token [B, D], and a cache of P + R tokens.
    """
    attend = by_example(masked(attention_mask(prompts.segment_ids)), prompts)
    hidden, new = model.hidden(prompts.tokens, prompts.positions, attend, return_keys=True)
    to_rows, _ = moves(prompts)
    keys, values = as_cache(jax.lax.map(partial(jax.tree.map, to_rows), new))  # layer by layer
    before = ((0, 0),) * 3
    cache = Cache(
        jnp.pad(keys, (*before, (0, 0), (0, room))), jnp.pad(values, (*before, (0, room), (0, 0)))
    )
    last = jnp.cumsum(lengths.reshape(len(hidden), -1), axis=1) - 1
    return gather(hidden, last).reshape(len(lengths), -1), cache


def as_cache(new: KeysValues) -> Cache:
    """Keys and values of tokens, of every layer, as the cache has them."""
    return Cache(jnp.moveaxis(new.keys, 2, 4), jnp.moveaxis(new.values, 2, 3))


def written(cache: Cache, new: Cache, index: Int[Array, ""]) -> Cache:
    """The cache with new tokens from an index on."""
    write = jax.lax.dynamic_update_slice_in_dim
    return Cache(
        write(cache.keys, new.keys, index, axis=4), write(cache.values, new.values, index, axis=3)
    )


def attend_cached(
    q: Float[Array, "B 1 H k"],
    k: Float[Array, "B 1 G k"],
    v: Float[Array, "B 1 G k"],
    mask: Bool[Array, "B S"],
    cache: Cache,
) -> Float[Array, "B 1 H k"]:
    """Attention of one token to itself and to the cached tokens that the mask shows it."""
    (b, _, heads, size), groups = q.shape, k.shape[2]
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    queries = q.reshape(b, groups, heads // groups, size)
    earlier = product("bghk,bgks->bghs", queries, cache.keys)
    earlier = jnp.where(mask[:, None, None], earlier, jnp.finfo(jnp.float32).min)
    own = product("bghk,bgk->bgh", queries, k[:, 0])[..., None]
    weights = jax.nn.softmax(jnp.concatenate([earlier, own], -1) / jnp.sqrt(size)).astype(v.dtype)
    outputs = product("bghs,bgsk->bghk", weights[..., :-1], cache.values)
    outputs += weights[..., -1:] * v[:, 0, :, None]
    return outputs.astype(v.dtype).reshape(q.shape)


def visible(
    lengths: Int[Array, " B"], width: int, room: int, index: Int[Array, ""]
) -> Bool[Array, "B S"]:
    """The part of the cache that a response token attends to: prompt, and response before it.

    Args:
        lengths: Tokens of each prompt [B].
        width: P, the length to which prompts are padded.
        room: R, the most tokens of a response.
        index: Which token of the response, counted from 0.

    Returns:
        A mask over the cache [B, P + R].
    """
    cached = jnp.arange(width + room)
    return (cached < lengths[:, None]) | ((cached >= width) & (cached < width + index))


def draw_tokens(
    logits: Float[Array, "B V"], key: PRNGKeyArray, temperature: float
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw a token from each row of logits.

    Args:
        logits: Logits of the next token [B, V].
        key: The source of randomness.
        temperature: Divides the log-probabilities; 0 takes the most probable token.

    Returns:
        The tokens [B] and their log-probabilities at temperature 1 [B], nats.
    """
    logps = jax.nn.log_softmax(logits.astype(jnp.float32))
    if temperature:
        token = invert_cdf(jax.nn.softmax(logps / temperature), key)
    else:
        token = logps.argmax(-1)
    return token, jnp.take_along_axis(logps, token[:, None], 1)[:, 0]


def invert_cdf(probabilities: Float[Array, "B V"], key: PRNGKeyArray) -> Int[Array, " B"]:
    """Draw an index from each row: the first whose cumulative probability exceeds a uniform number.

    The block that holds the index comes first, then the index within it: XLA on a CPU takes as long
    for cumulative sums of whole rows as for many products with weights. `jax.random.categorical`
    draws V random numbers for a row.
    """
    rows, vocab = probabilities.shape
    width = 2 ** math.ceil(math.log2(vocab) / 2)
    blocks = jnp.pad(probabilities, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    sums = blocks.sum(-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    uniform = jax.random.uniform(key, (rows, 1)) * cumulative[:, -1:]
    block = jnp.argmax(cumulative > uniform, axis=-1)[:, None]
    before = jnp.take_along_axis(cumulative - sums, block, axis=1)
    within = jnp.cumsum(jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0], axis=-1)
    # sums of a block in two orders: without the minimum, none may exceed the rest
    rest = jnp.minimum(uniform - before, jnp.nextafter(within[:, -1:], 0.0))
    return block[:, 0] * width + jnp.argmax(within > rest, axis=-1)
