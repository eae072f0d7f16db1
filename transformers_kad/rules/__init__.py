"""Rules: the next-token distributions of base and proxy in, the distribution to sample from out.

A rule looks at one position of a text at a time. With V the size of the vocabulary, these symbols stand for

    p   the base model's next-token distribution, `(..., V)`
    q   the proxy's next-token distribution, `(..., V)`
    q0  the proxy's distribution before it was aligned, the reference, `(..., V)`; few rules need it
    r   the target: the distribution that the next token is drawn from, `(..., V)`
    d   the deferral mask: d_v is 1 where token v is deferred to the proxy and else 0, `(..., V)`
    D   the deferral mass, the share of p that is deferred: D = sum_v d_v p_v, `(...)`

A rule with a mask chooses d, and the target is r_v = (1 - d_v) p_v + D q_v. Read as sampling: draw v from p; if d_v is
1, discard v and draw from q instead. A rule without a mask computes r directly, and D is undefined.

Rules take any leading dimensions, and every position along them is a problem of its own. They compute in float32
whatever the dtype of the input, and in float64 where a sum decides a mask, so that masks do not depend on the device.
Ties are broken by token id, lower id first.

A new rule belongs in `deferral.py` if it has a mask, else in `mixtures.py`, and its name in `registry.py`.
"""
