"""The split as an ONNX function body: what any runtime computes where our kernels are not present.

A transcription of `freqopt.kernels.reference` without its mid band into plain ONNX operators,
computed in float32. Query tiles are walked by a Scan, so memory holds one tile against all keys:
4 B H 128 (1.02 T + X) bytes.
"""

from __future__ import annotations

import onnx
from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_TILE
from freqopt.exporters.onnx.graph import Nodes, Value
from freqopt.kernels.reference import (
    C_MAX,
    EXACT,
    G_MAX,
    INVERSE_STEPS,
    LEAST_CORRECTION,
    LEAST_MASS,
    LEAST_TERM,
    LEAST_TOLD,
    LOW,
    NEWTON_STEPS,
    RIDGE,
    RIDGE_PROBES,
    UPDATE_MAX,
    UPDATE_SHARE,
)
from onnx import AttributeProto, TensorProto, helper

DOMAIN = "freqopt"
OP_NAME = "SplitAttention"
ORDER_NAME = "TokenOrder"
OP_VERSION = 4
"""Opset version of the domain; raised when inputs, attributes or meaning change."""

INPUTS = (
    *("query", "key", "value", "budget", "key_mask"),
    *("order", "text_before", "query_order", "query_text_before"),
)
ATTRIBUTES = ("scale", "density", "probes", "own")

INFINITY = float("inf")
PER_TILE = QUERY_TILE // SUB_TILE


class _Split:
    """Builds the body; one method per step of `reference.split_tokens`, same shapes."""

    def __init__(self, nodes: Nodes) -> None:
        self.n = nodes
        given = {name: Value(nodes, name) for name in INPUTS}
        query, key, value = (given[name] for name in INPUTS[:3])
        self.query_in, self.mask_in, self.budget = query, given["key_mask"], given["budget"]
        self.scale = nodes.attribute("scale", "float", AttributeProto.FLOAT)
        self.density = nodes.attribute("density", "float", AttributeProto.FLOAT)
        self.probes = nodes.attribute("probes", "int", AttributeProto.INT)
        self.own = nodes.attribute("own", "int", AttributeProto.INT) > 0
        self.batch, self.heads, self.dim = query.size(0), query.size(1), query.size(3)
        self.length, self.key_length = query.size(2), key.size(2)
        self.tokens, self.queries = (given[n].size(-1) for n in ("order", "query_order"))
        self.blocks = (self.tokens + (KEY_BLOCK - 1)) // KEY_BLOCK
        self.tiles = (self.queries + (QUERY_TILE - 1)) // QUERY_TILE
        self.count = self._counts(self.tokens, KEY_BLOCK, self.blocks)
        self.before, self.query_before = given["text_before"], given["query_text_before"]
        self.text_index = self._text_index(self.before, self.tokens, self.key_length)
        query_text = self._text_index(self.query_before, self.queries, self.length)
        order = self._per_head(given["order"], self.tokens)
        self.query_order = self._per_head(given["query_order"], self.queries)
        whole = [self._repeat_heads(x.float()) for x in (key, value)]
        self.key, self.value = (self._by_head(x, order + self.before) for x in whole)
        self.text_key, self.text_value = (x.gather(self.text_index, 2) for x in whole)
        wide = query.float()
        self.query = self._by_head(wide, self.query_order + self.query_before)
        self.text_query = wide.gather(query_text, 2)

    def _text_index(self, before: Value, tokens: Value, length: Value) -> Value:
        """(X,): the tokens of a sequence that are text."""
        return self.n.concat(0, self.n.range(0, before), self.n.range(before + tokens, length))

    def _per_head(self, order: Value, tokens: Value) -> Value:
        """(B, H, T) int64 of an order (T,) for all heads, or one for each (key) head."""
        rows = order.cast(TensorProto.INT64).reshape(-1, tokens)
        group = self.batch * self.heads // rows.size(0)
        wide = rows.unsqueeze(1).expand(1, group, 1)
        return wide.reshape(self.batch, self.heads, tokens)

    def _by_head(self, x: Value, index: Value) -> Value:
        """Tokens (B, H, n, D) of (B, H, N, D) by an index (B, H, n) of each head."""
        return self.n.op("GatherND", x, index.unsqueeze(3), batch_dims=2)

    def _repeat_heads(self, x: Value) -> Value:
        """(B, Hkv, N, D) -> (B, H, N, D)."""
        group = self.heads // x.size(1)
        wide = x.unsqueeze(2).expand(1, 1, group, 1, 1)
        return wide.reshape(self.batch, self.heads, self.key_length, self.dim)

    def _counts(self, tokens: Value, size: int, blocks: Value) -> Value:
        """True tokens of each block, int64; 0 past the end."""
        starts = self.n.range(0, blocks) * size
        return (tokens - starts).minimum(size).maximum(0)

    def _blocks_of(self, x: Value, size: int, blocks: Value) -> Value:
        """(B, H, T, D) -> (B, H, blocks, size, D), zero-padded."""
        pads = self.n.shape(0, 0, 0, 0, 0, 0, blocks * size - x.size(2), 0)
        padded = self.n.op("Pad", x, pads)
        return padded.reshape(self.batch, self.heads, blocks, size, self.dim)

    def _present(self) -> Value:
        """(J, 64, 1): 1 where a block has a token."""
        present = self.n.range(0, KEY_BLOCK) < self.count.unsqueeze(1)
        return present.float().unsqueeze(2)

    def summarise(self) -> tuple[Value, Value, Value, Value]:
        """Key and value mean, key variance (B, H, J, D) of the blocks, and H-bar (B, H, D, D)."""
        divisor, valid = self.count.float().unsqueeze(1), self._present()
        keys = self._blocks_of(self.key, KEY_BLOCK, self.blocks)
        values = self._blocks_of(self.value, KEY_BLOCK, self.blocks)
        key_mean, value_mean = keys.sum(3) / divisor, values.sum(3) / divisor
        offset = (keys - key_mean.unsqueeze(3)) * valid
        key_var = (offset * offset).sum(3) / divisor
        flat = [x.reshape(self.batch, self.heads, -1, self.dim) for x in (values, offset)]
        h_bar = flat[0].transposed(0, 1, 3, 2) @ flat[1] / self.tokens.float()
        return key_mean, value_mean, key_var, h_bar

    def value_spread(self, value_mean: Value) -> Value:
        """(B, H, J): a block's rms distance of values from their mean, relative to the head's."""
        tokens = self.tokens.float()
        values = self._blocks_of(self.value, KEY_BLOCK, self.blocks)
        offset = (values - value_mean.unsqueeze(3)) * self._present()
        block = (offset * offset).sum(3, 4) / self.count.float()
        centred = self.value - self.value.sum(2, keep=True) / tokens
        head = (centred * centred).sum(2, 3) / tokens
        return (block / head.maximum(1e-30).unsqueeze(2)).sqrt()

    def score(
        self, key_mean: Value, key_var: Value, spread: Value, square: Value
    ) -> tuple[Value, Value]:
        """Routing score and second-order mass term, (B, H, I, J) each.

        square: (B, H, I, D), the tiles' mean squared queries.
        """
        subs = self.tiles * PER_TILE
        count = self._counts(self.queries, SUB_TILE, subs)
        queries = self._blocks_of(self.query, SUB_TILE, subs)
        mean = queries.sum(3) / count.maximum(1).float().unsqueeze(1)
        capacity = self.count.float().log()
        dispersion = square @ key_var.transposed(0, 1, 3, 2) * (self.scale * self.scale)
        term = (dispersion * 0.5).minimum(capacity)

        def by_tile(x: Value) -> Value:
            return x.reshape(self.batch, self.heads, self.tiles, PER_TILE, self.blocks)

        logit = mean @ key_mean.transposed(0, 1, 3, 2) * self.scale + capacity
        mass = self.n.op("Softmax", by_tile(logit) + term.unsqueeze(3), axis=-1)
        present = (count > 0).float().reshape(self.tiles, PER_TILE, 1)
        error = (mass * mass * present).sum(3) / present.sum(1) * dispersion
        score = error.sqrt() * spread.unsqueeze(2) * self.blocks.float()
        # What is no number is attended exactly, whatever the threshold.
        return self.n.where(score.equals(score), score, INFINITY), term

    def threshold(self, score: Value, own: Value) -> Value:
        """Threshold (B or 1, H, 1, 1)."""
        flat = self.n.where(own & self.own, INFINITY, score).reshape(self.batch, self.heads, -1)
        pairs = flat.size(2)
        # The attribute is a float32: shaving off its rounding keeps the true product's ceiling.
        share = self.density.cast(TensorProto.DOUBLE) * pairs.cast(TensorProto.DOUBLE)
        shaved = share - share * self.n.constant(1e-7).cast(TensorProto.DOUBLE)
        kept = self.n.op("Ceil", shaved).cast(TensorProto.INT64)
        kept = kept.maximum(1).minimum(pairs)
        largest, _ = self.n.ops("TopK", 2, flat, kept, axis=2)
        by_density = largest.slice(2, kept - 1, kept).unsqueeze(3)
        # Reshape fails where a budget is of other heads, which would be broadcast else.
        budget = self.budget.float().reshape(self.heads).unsqueeze(0, 2, 3)
        return self.n.where(self.density > 0.0, by_density, budget)

    def route(self, score: Value) -> Value:
        """(B, H, I, J) int64: 0 low, 2 exact."""
        block_tile = self.n.range(0, self.blocks) * KEY_BLOCK // QUERY_TILE
        local = block_tile.equals(self.n.range(0, self.tiles).unsqueeze(1))
        best = self.n.op("ArgMax", score, axis=3, keepdims=1)
        best = self.n.range(0, self.blocks).equals(best)
        always = (local & self.own) | (best & self.n.op("Not", self.own))
        low = self.n.where(score < self.threshold(score, local), LOW, EXACT)
        return self.n.where(always, EXACT, low)

    def repeat(self, x: Value) -> Value:
        """Repeat every entry of the last axis, blocks to tokens."""
        wide = x.unsqueeze(4).expand(1, 1, 1, 1, KEY_BLOCK)
        return wide.reshape(0, 0, 0, self.blocks * KEY_BLOCK)

    def build(self) -> dict[str, Value]:
        """The whole split; returns named results, `out` (B, H, N, D) among them."""
        n = self.n
        low_key, low_value, low_var, h_bar = self.summarise()
        tiles = self._blocks_of(self.query, QUERY_TILE, self.tiles)
        tile_count = self._counts(self.queries, QUERY_TILE, self.tiles).float().unsqueeze(1)
        square = (tiles * tiles).sum(3) / tile_count
        score, low_term = self.score(low_key, low_var, self.value_spread(low_value), square)
        route = self.route(score)

        capacity = self.count.float().log()
        columns = self.blocks * KEY_BLOCK
        real = n.range(0, columns) < self.tokens
        self.padded_key, self.padded_value = (
            self._blocks_of(x, KEY_BLOCK, self.blocks).reshape(
                self.batch, self.heads, columns, self.dim
            )
            for x in (self.key, self.value)
        )
        text_bias = self.text_bias()

        def bands(pair: Value) -> tuple[Value, Value]:
            """For pairs (B, H, 1 or Q, J): the low band's bias, and which columns are exact.

            The latter over tokens, (B, H, 1 or Q, 64 J).
            """
            bias = n.where(pair.equals(LOW), capacity, -INFINITY)
            exact = self.repeat(pair.equals(EXACT).cast(TensorProto.INT32))
            return bias, (exact > n.constant(0).cast(TensorProto.INT32)) & real

        means = low_key.transposed(0, 1, 3, 2)
        keys = n.concat(2, self.padded_key, self.text_key).transposed(0, 1, 3, 2)
        values = n.concat(2, self.padded_value, self.text_value)

        def exact_bias(exact: Value) -> Value:
            return n.where(exact, 0.0, -INFINITY)

        # The probe: exact attention of a few queries, and what the bands make of them.
        chosen, tile = self.probe_positions()
        probe_query = self.query.gather(chosen, 2)
        bias, exact = bands(route.gather(tile, 2))
        logits = probe_query @ keys * self.scale
        token_logit = logits.slice(3, 0, columns)
        text_logit = logits.slice(3, columns, columns + self.text_index.size(0)) + text_bias
        full = n.concat(3, n.where(real, token_logit, -INFINITY), text_logit)
        peak = full.max(3, keep=True)
        log_total = (full - peak).exp().sum(3, keep=True).log() + peak
        share = (full - log_total).exp()
        exact_share = n.concat(
            3,
            n.where(exact, share.slice(3, 0, columns), 0.0),
            share.slice(3, columns, columns + self.text_index.size(0)),
        )
        c, g, matrix, error = self.fit_probe(
            relative=probe_query @ means * self.scale + bias - log_total,
            term=low_term.gather(tile, 2),
            low_value=low_value,
            exact_mass=exact_share.sum(3, keep=True),
            exact_out=exact_share @ values,
            target=(share - exact_share).sum(2, 3),
            truth=share @ values,
            query=probe_query * self.scale,
            h_bar=h_bar,
        )
        turn = matrix.transposed(0, 1, 3, 2)

        def attend(query: Value, pair: Value, term: Value) -> Value:
            pair, term = (x.unsqueeze(2) for x in (pair, term))
            _, exact = bands(pair)
            low = query @ means * self.scale + capacity + c * term
            low = n.where(pair.equals(LOW), low, -INFINITY)
            logit = query @ keys * self.scale + n.concat(3, exact_bias(exact), text_bias)
            weight = n.op("Softmax", n.concat(3, low, logit), axis=-1)
            out = weight @ n.concat(2, low_value, values)
            mass = weight.slice(3, 0, self.blocks).sum(3, keep=True)
            turned = mass * (query @ turn * self.scale)
            return out + n.where(mass > 0.0, turned, 0.0)  # not 0 times infinity

        def tile_first(x: Value, rank: int) -> Value:
            return x.transposed(2, 0, 1, *range(3, rank))

        video = n.scan(
            attend,
            [
                (tile_first(tiles, 5), TensorProto.FLOAT),
                (tile_first(route, 4), TensorProto.INT64),
                (tile_first(low_term, 4), TensorProto.FLOAT),
            ],
            rank=4,
        )
        video = video.transposed(1, 2, 0, 3, 4)
        video = video.reshape(self.batch, self.heads, self.tiles * QUERY_TILE, self.dim)
        out = self.assemble(video.slice(2, 0, self.queries), text_bias)
        return {
            "out": n.op("CastLike", out, self.query_in),
            "route": route,
            "coefficients": n.concat(2, c.squeeze(3), g.squeeze(3)),
            "probe_error": error,
        }

    def text_bias(self) -> Value:
        """(B, H, 1, X): 0 where a text key is attended, -inf where it is masked."""
        mask = self.mask_in.cast(TensorProto.INT32).expand(self.batch, self.key_length)
        mask = mask.reshape(self.batch, self.key_length)  # fails where a mask is of more items
        kept = mask.gather(self.text_index, 1).cast(TensorProto.BOOL)
        bias = self.n.where(kept, 0.0, -INFINITY).unsqueeze(1, 2)
        return bias.expand(1, self.heads, 1, 1)

    def probe_positions(self) -> tuple[Value, Value]:
        """Token-order positions (P,) and their tiles; one where there are no probes."""
        positions = self._evenly(self.probes.maximum(1), self.queries)
        return positions, positions // QUERY_TILE

    def _evenly(self, most: Value | int, length: Value) -> Value:
        """`reference.probe_positions`: at most so many places of a length."""
        count = length.minimum(most)
        return (self.n.range(0, count) * 2 + 1) * length // (count * 2)

    def fit_probe(
        self,
        *,
        relative: Value,
        term: Value,
        low_value: Value,
        exact_mass: Value,
        exact_out: Value,
        target: Value,
        truth: Value,
        query: Value,
        h_bar: Value,
    ) -> tuple[Value, Value, Value, Value]:
        """`reference.fit_probe` on tensors relative to the softmax sum.

        query: (B, H, P, D), scaled. Returns c and g (B, H, 1, 1), the first-order matrix
        (B, H, D, D) and the error (B, H).
        """
        n = self.n
        safe_target = target.maximum(1e-30)
        fits = target > self.probes.float() * LEAST_MASS
        c = target * 0.0 + 1.0
        for _ in range(NEWTON_STEPS):
            mass = (relative + c.unsqueeze(2, 3) * term).exp()
            total, slope = mass.sum(2, 3), (mass * term).sum(2, 3)
            step = (total.maximum(1e-30) / safe_target).log() * total
            usable = (slope > 1e-12) & fits
            moved = n.where(usable, c - step / slope.maximum(1e-12), c)
            c = moved.maximum(0.0).minimum(C_MAX)
        mass = (relative + c.unsqueeze(2, 3) * term).exp()
        low = mass.sum(3, keep=True)
        total = (exact_mass + low).maximum(1e-30)
        plain = (exact_out + mass @ low_value) / total
        turned = low / total * query
        correction = turned @ h_bar.transposed(0, 1, 3, 2)
        energy = (correction * correction).sum(2, 3)
        aligned = ((truth - plain) * correction).sum(2, 3)
        whole = (truth * truth).sum(2, 3)
        fits = (energy > whole * LEAST_CORRECTION) & (energy > 1e-30)
        fits = fits & (aligned * 0.0).equals(0.0)  # a number, and finite
        g = n.where(fits, aligned / energy.maximum(1e-30), 1.0)
        g = g.maximum(0.0).minimum(G_MAX)
        left = truth - plain - g.unsqueeze(2, 3) * correction
        update, wrong = self.fit_update(turned, correction, h_bar, left, fits)
        error = (wrong / whole.maximum(1e-30)).sqrt()
        fitted = self.probes > 0
        c, g = (n.where(fitted, x, 1.0).unsqueeze(2, 3) for x in (c, g))
        matrix = g * h_bar + n.where(fitted, update, 0.0)
        return c, g, matrix, n.where(fitted, error, float("nan"))

    def fit_update(
        self, turned: Value, correction: Value, h_bar: Value, left: Value, fits: Value
    ) -> tuple[Value, Value]:
        """`reference.fit_update`: the update, and the energy (B, H) of what it leaves."""
        n = self.n
        probes = left.size(2)
        chosen = self._evenly(RIDGE_PROBES, probes)
        lane = n.range(0, probes.minimum(RIDGE_PROBES))
        f, g, r = (x.gather(chosen, 2) for x in (turned, correction, left))
        of_f, of_g = ((x * x).sum(2, 3).maximum(1e-30).unsqueeze(2, 3) for x in (f, g))
        eye = lane.unsqueeze(1).equals(lane).float()
        kernel = f @ f.transposed(0, 1, 3, 2) / of_f + g @ g.transposed(0, 1, 3, 2) / of_g
        kernel = kernel + eye * RIDGE
        inverse = kernel * 0.0 + eye * (1.0 / (1.0 + RIDGE))
        for _ in range(INVERSE_STEPS):
            inverse = inverse * 2.0 - inverse @ (kernel @ inverse)
        weights = inverse @ r
        told = r - weights / (inverse * eye).sum(3, keep=True)
        aligned, energy, before = ((x * y).sum(2, 3) for x, y in ((r, told), (told, told), (r, r)))
        terms = (g * g).sum(2, 3)
        fits = fits & (terms > before * LEAST_TERM) & (energy > before * LEAST_TOLD)
        fits = fits & (aligned * 0.0).equals(0.0)
        factor = n.where(fits, aligned / energy.maximum(1e-30), 0.0)
        fitted = r - weights * RIDGE  # the update's terms
        most = (terms / (fitted * fitted).sum(2, 3).maximum(1e-30)).sqrt() * UPDATE_MAX
        factor = factor.maximum(0.0).minimum(1.0).minimum(most) * UPDATE_SHARE
        factor = factor.unsqueeze(2, 3)
        z = f / of_f + g @ h_bar / of_g
        update = factor * (weights.transposed(0, 1, 3, 2) @ z)
        update = n.where(factor > 0.0, update, 0.0)  # not 0 times what is no number
        # Probes that it was not fitted to are predicted as they are.
        rest = left - turned @ update.transposed(0, 1, 3, 2)
        others = n.range(0, probes).unsqueeze(1).equals(chosen).float().sum(1).equals(0.0)
        rest = n.where(others.unsqueeze(1), rest, 0.0)
        seen = n.where(factor > 0.0, r - factor * told, r)
        return update, (rest * rest).sum(2, 3) + (seen * seen).sum(2, 3)

    def assemble(self, video: Value, text_bias: Value) -> Value:
        """Video (B, H, T, D) in token order and densely attended text, in the model's order."""
        n = self.n
        keys = n.concat(2, self.key, self.text_key)
        zeros = text_bias.slice(3, 0, 0)
        no_bias = n.op("Pad", zeros, n.shape(0, 0, 0, 0, 0, 0, 0, self.tokens))
        bias = n.concat(3, no_bias, text_bias)
        logit = self.text_query @ keys.transposed(0, 1, 3, 2) * self.scale + bias
        text = n.op("Softmax", logit, axis=-1) @ n.concat(2, self.value, self.text_value)
        places = n.range(0, self.queries).expand(self.batch, self.heads, 1)
        inverse = n.op("ScatterElements", places, self.query_order, places, axis=2)
        end = self.query_before + self.queries
        before = n.range(self.queries, end).expand(self.batch, self.heads, 1)
        after = n.range(end, self.length).expand(self.batch, self.heads, 1)
        index = n.concat(2, before, inverse, after)
        return self._by_head(n.concat(2, video, text), index)


def split_function(opset: int, outputs: tuple[str, ...] = ("out",)) -> onnx.FunctionProto:
    """The body of `freqopt::SplitAttention` at an opset of the default domain (18 or later).

    Inputs: query (B, H, Nq, D), key, value (B, Hkv, Nk, D) of one floating type; budget (H,)
    float32; key_mask bool, broadcast to (B, Nk), True = attend, only its text entries are read;
    order int64, (T,) for all heads or (B, Hkv, T), the keys that stand in a block together, counted
    from the first that is no text; text_before (1,) int64; query_order, (Tq,) or (B, H, Tq), and
    query_text_before, the queries': those of the keys again where they are the same tokens.
    Attributes: scale, density (0: use the budget), probes, own (1: the queries are the keys'
    tokens). Output: (B, H, Nq, D), the query's type.
    `outputs` may name route, coefficients and probe_error as well, for tests.
    """
    nodes = Nodes(opset)
    results = _Split(nodes).build()
    for name in outputs:
        nodes.nodes.append(helper.make_node("Identity", [results[name].name], [name]))
    return helper.make_function(
        DOMAIN,
        OP_NAME,
        list(INPUTS),
        list(outputs),
        nodes.nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(ATTRIBUTES),
    )
