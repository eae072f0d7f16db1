"""The mathematics of KAD once more, slow and obvious: one position, plain Python floats, no torch.

p, q and q0 are lists of V probabilities: the base's, the proxy's, and those of the proxy before alignment. A mask
d is a list of V booleans, True where the token is handed over to the proxy.

[KAD]      Hammal, Zweigenbaum, Corro, EACL 2026 (arXiv 2510.27017)
[bet]      On the Rejection Criterion for Proxy-based Test-time Alignment, ACL 2026 (arXiv 2604.16146)
[nudging]  Fei et al., ACL 2025
[cascades] Narasimhan et al., ICLR 2025
[tuning]   Liu et al., COLM 2024; Mitchell et al., ICLR 2024
[blend]    arXiv 2606.11201
[specdec]  Leviathan et al., ICML 2023, appendix A.1
[block]    Sun et al., ICLR 2025 (arXiv 2403.10444)
"""

import itertools
import math

SMALLEST_NORMAL = 2.0**-126  # of float32: a reference probability below it counts as this much


# --- The knapsack of one position -----------------------------------------------------------------------------


def token_value(p_v):
    """-p_v log p_v, the expected loss that is avoided by deferring v; 0 log 0 = 0. [KAD]"""
    return -p_v * math.log(p_v) if p_v > 0 else 0.0


def value(p, d):
    """sum_v d_v (-p_v log p_v), what the knapsack maximises. [KAD]"""
    return math.fsum(token_value(p_v) for p_v, deferred in zip(p, d, strict=True) if deferred)


def mass(p, d):
    """D = sum_v d_v p_v, what the knapsack's budget limits. [KAD]"""
    return math.fsum(p_v for p_v, deferred in zip(p, d, strict=True) if deferred)


def density_order(p):
    """Token ids in the order of falling density value / weight = -log p_v: rising p, ties by id. [KAD]"""
    return sorted(range(len(p)), key=lambda v: (p[v], v))


def critical_item(p, d):
    """The first token in the density order that a mask leaves out; None for a full mask."""
    return next((v for v in density_order(p) if not d[v]), None)


def best_subset_value(p, budget):
    """The optimum of the knapsack, by trying all 2^V masks. [KAD]"""
    masks = itertools.product([False, True], repeat=len(p))
    return max(value(p, d) for d in masks if mass(p, d) <= budget)


def relaxed_value(p, budget):
    """The optimum of the linear relaxation, where tokens may be deferred in part. [KAD; Dantzig 1957]"""
    left, total = budget, 0.0
    for v in density_order(p):
        if p[v] > left:
            return total + left / p[v] * token_value(p[v])
        left -= p[v]
        total += token_value(p[v])
    return total


def dual_bound(p, budget, threshold):
    """The Lagrangian bound at lambda = -log threshold: lambda b + sum_v max(0, value_v - lambda p_v). [KAD]

    No mask within the budget has a larger value, whatever the threshold.
    """
    lam = -math.log(threshold)
    return lam * budget + math.fsum(max(0.0, token_value(p_v) - lam * p_v) for p_v in p)


# --- Rules that answer with a mask ----------------------------------------------------------------------------


def dual(p, q, threshold):
    """d_v = 1 where p_v < threshold. [KAD]"""
    return [p_v < threshold for p_v in p]


def primal(p, q, budget):
    """d_v = 1 on the longest prefix, in the order of rising p, with mass <= budget. [KAD]

    A budget of 1 defers everything; a smaller one never the last of that order, the likeliest token.
    """
    if budget == 1:
        return [True] * len(p)
    d, spent = [False] * len(p), 0.0
    for v in density_order(p)[:-1]:
        spent += p[v]
        if spent > budget:
            break
        d[v] = True
    return d


def nudging(p, q, threshold):
    """d_v = 1 for all v if max p < threshold, else for none. [nudging]"""
    return [max(p) < threshold] * len(p)


def confidence_bet(p, q, margin):
    """d_v = 1 where p_v < max q - margin. [bet]"""
    return [p_v < max(q) - margin for p_v in p]


def total_variation(p, q):
    """TV(p, q) = sum_v max(0, p_v - q_v)."""
    return math.fsum(max(0.0, p_v - q_v) for p_v, q_v in zip(p, q, strict=True))


def cascade(p, q, variant, alpha):
    """Speculative cascades with the roles swapped: keep p, fall back to q. [cascades]

    diff:     all v if max p < max q - alpha
    opt:      all v if max p < max q - alpha TV(p, q)
    token_v2: v where q_v < max q - alpha
    token_v3: v where q_v < (1 - alpha) max q
    """
    if variant == "diff":
        return [max(p) < max(q) - alpha] * len(p)
    if variant == "opt":
        return [max(p) < max(q) - alpha * total_variation(p, q)] * len(p)
    if variant == "token_v2":
        return [q_v < max(q) - alpha for q_v in q]
    return [q_v < (1 - alpha) * max(q) for q_v in q]


MASKS = {
    "dual": dual,
    "primal": primal,
    "nudging": nudging,
    "confidence_bet": confidence_bet,
    "cascade": cascade,
}


# --- Targets --------------------------------------------------------------------------------------------------


def mix(p, q, d):
    """r_v = (1 - d_v) p_v + D q_v. [KAD]"""
    deferred_mass = mass(p, d)
    return [(0.0 if deferred else p_v) + deferred_mass * q_v for p_v, q_v, deferred in zip(p, q, d, strict=True)]


def implicit_reward(p, q, q0, beta):
    """r ∝ p (q / q0)^beta; q = 0 gives r = 0. If no token is left, r = p. [tuning]"""
    if beta == 0:
        return list(p)
    logs = [
        math.log(p_v) + beta * (math.log(q_v) - math.log(max(q0_v, SMALLEST_NORMAL)))
        if p_v > 0 and q_v > 0
        else -math.inf
        for p_v, q_v, q0_v in zip(p, q, q0, strict=True)
    ]
    if max(logs) == -math.inf:
        return list(p)
    weights = [math.exp(log_weight - max(logs)) for log_weight in logs]
    return normalised(weights)


def ensemble(p, q, q0, weight):
    """r = w p + (1 - w) q."""
    return [weight * p_v + (1 - weight) * q_v for p_v, q_v in zip(p, q, strict=True)]


def blend_in(p, q, q0, threshold):
    """If max p < threshold, r = a q + (1 - a) p with a = clip(max q / (max p + max q) + 0.1 p[argmax q], 0, 1).

    Else r = p. Of equally likely tokens, argmax is the one with the lowest id. [blend]
    """
    if max(p) >= threshold:
        return list(p)
    share = max(q) / (max(p) + max(q)) + 0.1 * p[q.index(max(q))]
    share = min(max(share, 0.0), 1.0)
    return [share * q_v + (1 - share) * p_v for p_v, q_v in zip(p, q, strict=True)]


TARGETS = {"implicit_reward": implicit_reward, "ensemble": ensemble, "blend_in": blend_in}


def target(name, parameters, p, q, q0=None):
    """r of any rule except `exact`, by name."""
    if name in MASKS:
        return mix(p, q, MASKS[name](p, q, **parameters))
    return TARGETS[name](p, q, q0, **parameters)


def normalised(weights):
    """The weights divided by their sum."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


# --- Speculative sampling -------------------------------------------------------------------------------------


def acceptance_probability(r, q):
    """sum_v min(q_v, r_v): the probability that a token drawn from q is accepted for the target r. [specdec]"""
    return math.fsum(min(r_v, q_v) for r_v, q_v in zip(r, q, strict=True))


def residual(r, q):
    """The normalised (r - q)_+, from which a refused token is replaced; r itself where that is zero. [specdec]"""
    left = [max(0.0, r_v - q_v) for r_v, q_v in zip(r, q, strict=True)]
    return normalised(left) if any(left) else list(r)


def chain_law(table, start, length):
    """The law of `length` tokens of a Markov chain: {tokens: probability}, `table[last]` the next token's law."""
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*tokens, v): prob * prob_v
            for tokens, prob in law.items()
            for v, prob_v in enumerate(table[tokens[-1] if tokens else start])
        }
    return law


def accepted_law(target_table, draft_table, start, drafted):
    """The law of the number of accepted tokens of a chain's draft, [P(0), ..., P(drafted)]. [specdec]

    A token y is drafted and accepted with probability q(y) min(1, r(y) / q(y)) = min(q(y), r(y)).
    """
    size = len(target_table)
    reached = [1.0 if s == start else 0.0 for s in range(size)]  # accepted so far, and the last token is s
    at_least = [1.0]
    for _ in range(drafted):
        reached = [
            math.fsum(reached[s] * min(target_table[s][v], draft_table[s][v]) for s in range(size))
            for v in range(size)
        ]
        at_least.append(math.fsum(reached))
    return [at_least[k] - at_least[k + 1] for k in range(drafted)] + [at_least[drafted]]


def block_accepted_law(target_table, draft_table, start, drafted):
    """The law of the number of accepted tokens of a chain's draft in block verification. [block]

    At least k tokens are accepted with probability E[P_k] over drafts, with P_k = min(1, P_{k-1} r(y_k) / q(y_k)).
    Of every draft, its probability under q and the product of that with P_k are kept.
    """
    reached, at_least = [(start, 1.0, 1.0)], [1.0]
    for _ in range(drafted):
        reached = [
            (v, under_q * q_v, min(under_q * q_v, accepted * r_v))
            for last, under_q, accepted in reached
            for v, (q_v, r_v) in enumerate(zip(draft_table[last], target_table[last], strict=True))
        ]
        at_least.append(math.fsum(accepted for *_, accepted in reached))
    return [at_least[k] - at_least[k + 1] for k in range(drafted)] + [at_least[drafted]]
