"""Each pooling against its formula, written plainly: one bag at a time, loops, no mask."""

import math

import pytest
import torch
from mil_cases import CELL_SIZE, make_batch, make_pooler
from torch import Tensor
from torch.testing import assert_close

from lymph_hf.pooling import build_pooler
from lymph_hf.pooling_layers import AttentionBlock, MultiHeadAttention, landmark_attention, pseudo_inverse

SIZES = (6, 1, 9)
LABELS = torch.tensor([2, 0, 1])


def softmax(scores: list[Tensor]) -> Tensor:
    powers = torch.stack([score.exp() for score in scores])
    return powers / powers.sum()


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return logits.exp().sum().log() - logits[label]


def attention_scores(scores, h: Tensor) -> Tensor:
    """Attention before the softmax, one column per branch, cell by cell."""
    weight, bias, out = scores.hidden.weight, scores.hidden.bias, scores.score.weight
    rows = []
    for cell in h:
        z = weight @ cell + bias
        if scores.gated:
            size = len(z) // 2
            z = torch.tanh(z[:size]) * torch.sigmoid(z[size:])
        else:
            z = torch.tanh(z)
        rows.append(out @ z)
    return torch.stack(rows)


def check(case: str, reference, **options) -> None:
    """Compare with `reference(pooler, x (n, D), label)` -> embedding, weights, loss, bag by bag."""
    pooler = make_pooler(case, **options)
    x, mask = make_batch(SIZES, extra=1)
    embedding, weights, loss = pooler.pool(x, mask, LABELS)
    losses = []
    for bag, size in enumerate(SIZES):
        expected, expected_weights, expected_loss = reference(pooler, x[bag, :size], int(LABELS[bag]))
        assert_close(embedding[bag], expected)
        assert_close(weights[bag, :size], expected_weights)
        losses.append(expected_loss)
    if loss is None:
        assert losses == [None] * len(SIZES)
    else:
        assert_close(loss, sum(losses) / len(losses))


# --- simple


def test_mean_and_sum():
    check("mean", lambda p, x, label: (sum(x) / len(x), torch.full((len(x),), 1 / len(x)).double(), None))
    check("sum", lambda p, x, label: (sum(x), torch.ones(len(x)).double(), None))


def test_max():
    def reference(pooler, x, label):
        won = [
            sum(x[i, d] >= x[j, d] for j in range(len(x))) == len(x) for i in range(len(x)) for d in range(CELL_SIZE)
        ]
        share = torch.tensor(won).double().view(len(x), CELL_SIZE).sum(dim=1) / CELL_SIZE
        return torch.tensor([max(x[:, d]) for d in range(CELL_SIZE)]).double(), share, None

    check("max", reference)


def test_max_shares_ties():
    x = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    _, weights = build_pooler("max", 2)(x, torch.ones(1, 2, dtype=torch.bool))
    assert_close(weights, torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
def test_log_sum_exp(sharpness):
    def reference(pooler, x, label):
        embedding = ((x * sharpness).exp().sum(dim=0) / len(x)).log() / sharpness
        leaf = x.clone().requires_grad_()
        (((leaf * sharpness).exp().sum(dim=0) / len(x)).log() / sharpness).sum().backward()
        return embedding, leaf.grad.mean(dim=1), None  # the weights are the derivative

    check("log_sum_exp", reference, sharpness=sharpness)


def test_log_sum_exp_lies_between_mean_and_max():
    x, mask = make_batch((7,))
    near_mean, near_max = (make_pooler("log_sum_exp", sharpness=r)(x, mask)[0] for r in (1e-4, 1e4))
    assert_close(near_mean, x.mean(dim=1), atol=1e-3, rtol=0)
    assert_close(near_max, x.amax(dim=1), atol=1e-3, rtol=0)


def test_top_k():
    def reference(pooler, x, label):
        scores = attention_scores(pooler.scores, x)[:, 0]
        kept = sorted(range(len(x)), key=lambda i: -scores[i])[: pooler.k]
        weights = torch.zeros(len(x), dtype=x.dtype)
        weights[kept] = softmax([scores[i] for i in kept])
        return weights @ x, weights, None

    check("top_k", reference)


AGGREGATIONS = {
    "mean": lambda logits: logits.mean(dim=0),
    "sum": lambda logits: logits.sum(dim=0),
    "max": lambda logits: logits.max(dim=0).values,
    "log_sum_exp": lambda logits: logits.exp().mean(dim=0).log(),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_instance_logits(aggregation):
    def reference(pooler, x, label):
        logits = torch.stack([pooler.classifier(cell) for cell in x])
        bag = AGGREGATIONS[aggregation](logits)
        winner = int(bag.argmax())
        weights = torch.stack([softmax(list(row))[winner] for row in logits])
        return bag, weights, cross_entropy(bag, label)

    check("instance_logits", reference, aggregation=aggregation)


# --- attention


@pytest.mark.parametrize("case", ["attention", "gated_attention"])
def test_abmil(case):
    def reference(pooler, x, label):
        weights = softmax(list(attention_scores(pooler.scores, x)[:, 0]))
        return sum(w * cell for w, cell in zip(weights, x, strict=True)), weights, None

    check(case, reference)


def clam_instance_loss(pooler, h: Tensor, scores: Tensor, label: int, *, svm: bool) -> Tensor:
    """Groups of min(k, half the bag); a two-way classifier per label; mean over the cells that take part."""

    def cell_loss(cell, target, c):
        logits = (pooler.instance_classifiers(cell)).view(-1, 2)[c]
        if not svm:
            return cross_entropy(logits, target)
        return sum(torch.exp((j != target) + logits[j] - logits[target]) for j in range(2)).log()

    losses = []
    for c in range(pooler.num_labels):
        order = sorted(range(len(h)), key=lambda i: -scores[i, c if scores.shape[1] > 1 else 0])
        top = order[: min(pooler.k, math.ceil(len(h) / 2))]
        bottom = order[::-1][: min(pooler.k, len(h) // 2)]
        assert not set(top) & set(bottom)
        if c == label:
            losses += [cell_loss(h[i], 1, c) for i in top] + [cell_loss(h[i], 0, c) for i in bottom]
        elif pooler.out_of_class:
            losses += [cell_loss(h[i], 0, c) for i in top]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("case", ["clam_sb", "clam_mb"])
@pytest.mark.parametrize("instance_loss", ["cross_entropy", "smooth_svm"])
@pytest.mark.parametrize("out_of_class", [False, True])
def test_clam(case, instance_loss, out_of_class):
    def reference(pooler, x, label):
        h = torch.relu(pooler.embed[0](x))
        scores = attention_scores(pooler.scores, h)
        weights = torch.stack([softmax(list(branch)) for branch in scores.T])
        loss = clam_instance_loss(pooler, h, scores, label, svm=instance_loss == "smooth_svm")
        return torch.cat([w @ h for w in weights]), weights.mean(dim=0), 0.3 * loss

    check(case, reference, instance_loss=instance_loss, out_of_class=out_of_class)


def test_clam_branches():
    x, mask = make_batch(SIZES)
    assert make_pooler("clam_sb")(x, mask)[0].shape[1] == 16
    assert make_pooler("clam_mb")(x, mask)[0].shape[1] == 3 * 16


def test_dsmil():
    def reference(pooler, x, label):
        logits = torch.stack([pooler.classifier(cell) for cell in x])
        q = torch.stack([pooler.query(cell) for cell in x])
        v = torch.stack([pooler.value(cell) for cell in x])
        embedding, weights = [], []
        for c in range(pooler.num_labels):
            critical = int(logits[:, c].argmax())
            weights.append(softmax([q_i @ q[critical] / math.sqrt(len(q_i)) for q_i in q]))
            embedding.append(weights[-1] @ v)
        loss = cross_entropy(logits.max(dim=0).values, label)
        return torch.cat(embedding), sum(weights) / len(weights), loss

    check("dsmil", reference)


def test_dtfd():
    def reference(pooler, x, label):
        h = torch.relu(pooler.embed[0](x))
        scores = attention_scores(pooler.scores, h)[:, 0]
        order = sorted(range(len(x)), key=lambda i: scores[i])
        bags = [order[m :: pooler.pseudo_bags] for m in range(min(pooler.pseudo_bags, len(x)))]
        within = [softmax([scores[i] for i in bag]) for bag in bags]
        features = torch.stack([w @ h[bag] for w, bag in zip(within, bags, strict=True)])
        among = softmax(list(attention_scores(pooler.bag_scores, features)[:, 0]))
        weights = torch.zeros(len(x), dtype=x.dtype)
        for share, w, bag in zip(among, within, bags, strict=True):
            weights[bag] = share * w
        losses = [cross_entropy(pooler.classifier(f), label) for f in features]
        return among @ features, weights, sum(losses) / len(losses)

    check("dtfd", reference)


def test_dtfd_with_one_pseudo_bag_is_gated_attention():
    def reference(pooler, x, label):
        h = torch.relu(pooler.embed[0](x))
        weights = softmax(list(attention_scores(pooler.scores, h)[:, 0]))
        return weights @ h, weights, cross_entropy(pooler.classifier(weights @ h), label)

    check("dtfd", reference, pseudo_bags=1)


# --- transformers


def multi_head(layer: MultiHeadAttention, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Attention head by head for one bag: `(Q, W)`, mean weights `(Q, N)`."""
    size = queries.shape[1] // layer.num_heads
    w_key, w_value = layer.key_value.weight.chunk(2)
    q, k, v = layer.query(queries), context @ w_key.T, context @ w_value.T
    heads, weights = [], []
    for h in range(layer.num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights.append(torch.stack([softmax(list(row)) for row in scores]))
        heads.append(weights[-1] @ v[:, part])
    return layer.out(torch.cat(heads, dim=1)), sum(weights) / len(weights)


def mab(block: AttentionBlock, queries: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    normed = block.norm(queries)
    context = normed if context is None else block.norm_context(context)
    attended, weights = multi_head(block.attention, normed, context)
    queries = queries + attended
    return queries + block.mlp(block.norm_mlp(queries)), weights


@pytest.mark.parametrize("aggregation", ["attention", "mean"])
def test_self_attention(aggregation):
    def reference(pooler, x, label):
        h = pooler.embed(x)
        for block in pooler.blocks:
            h, _ = mab(block, h)
        h = pooler.norm(h)
        if aggregation == "mean":
            return h.mean(dim=0), torch.full((len(x),), 1 / len(x)).double(), None
        weights = softmax(list(attention_scores(pooler.scores, h)[:, 0]))
        return weights @ h, weights, None

    check("self_attention", reference, aggregation=aggregation)


def transmil(pooler, x, label):
    h = torch.cat([pooler.token.tokens[0], torch.relu(pooler.embed(x))])
    for block in pooler.blocks:
        h, _ = mab(block, h)
    token, weights = mab(pooler.reader, h[:1], h[1:])
    return pooler.norm(token)[0], weights[0], None


def test_transmil():
    check("transmil", transmil, landmarks=None, num_layers=3)


def test_transmil_is_exact_in_bags_of_at_most_as_many_cells_as_landmarks():
    """Bags of 6, 1 and 9 cells padded to 10: more columns than landmarks, so the landmark path runs."""
    check("transmil", transmil, landmarks=9, num_layers=3)


def test_set_transformer():
    def reference(pooler, x, label):
        h = pooler.embed(x)
        for points, gather, spread in zip(pooler.inducing, pooler.gather, pooler.spread, strict=True):
            summary, _ = mab(gather, points.tokens[0], h)
            h, _ = mab(spread, h, summary)
        seeds, weights = mab(pooler.reader, pooler.seeds.tokens[0], h)
        return pooler.norm(seeds).flatten(), weights.mean(dim=0), None

    check("set_transformer", reference)


def test_perceiver():
    def reference(pooler, x, label):
        latents, weights = mab(pooler.reader, pooler.latents.tokens[0], pooler.embed(x))
        for block in pooler.blocks:
            latents, _ = mab(block, latents)
        return pooler.norm(latents).mean(dim=0), weights.mean(dim=0), None

    check("perceiver", reference)


# --- landmarks


def queries_keys_values(cells: int, size: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, cells + 1, size, dtype=torch.float64, generator=generator) for _ in range(3)]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


def test_nystrom_formula_with_every_cell_a_landmark_is_exact():
    """The approximation softmax(QK~) pinv(softmax(Q~K~)) softmax(Q~K) V itself, for Q~ = Q and K~ = K."""
    q, k, v = queries_keys_values(11)
    kernel = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    assert_close(kernel @ pseudo_inverse(kernel, iterations=40) @ kernel @ v, exact_attention(q, k, v))


@pytest.mark.parametrize("landmarks", [12, 20])
def test_landmark_attention_is_exact_in_small_bags(landmarks):
    q, k, v = queries_keys_values(12)
    mask = torch.ones(2, 13, dtype=torch.bool)
    assert_close(landmark_attention(q, k, v, mask, landmarks), exact_attention(q, k, v))


def test_landmark_attention_formula_in_large_bags():
    q, k, v = queries_keys_values(10)
    output = landmark_attention(q, k, v, torch.ones(2, 11, dtype=torch.bool), 4)
    for bag in range(2):
        ranking = sum(k[bag, h, 1:] @ q[bag, h, 0] for h in range(3))
        order = sorted(range(10), key=lambda i: ranking[i])
        runs = [[0]] + [[1 + order[r] for r in range(10) if r * 4 // 10 == m] for m in range(4)]
        assert [len(run) for run in runs] == [1, 3, 2, 3, 2]
        for h in range(3):
            q_marks = torch.stack([q[bag, h, run].mean(dim=0) for run in runs])
            k_marks = torch.stack([k[bag, h, run].mean(dim=0) for run in runs])
            kernel = torch.softmax(q_marks @ k_marks.T / math.sqrt(8), dim=-1)
            read = exact_attention(q_marks, k[bag, h], v[bag, h])
            expected = exact_attention(q[bag, h], k_marks, pseudo_inverse(kernel) @ read)
            assert_close(output[bag, h], expected)


def test_more_landmarks_come_closer():
    q, k, v = queries_keys_values(60)
    k, q = 0.7 * k, 0.7 * q
    mask = torch.ones(2, 61, dtype=torch.bool)
    errors = [(landmark_attention(q, k, v, mask, m) - exact_attention(q, k, v)).norm().item() for m in (4, 59, 60)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_pseudo_inverse():
    matrix = torch.softmax(torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), -1)
    assert_close(pseudo_inverse(matrix, iterations=20), torch.linalg.pinv(matrix), atol=1e-8, rtol=1e-6)
