"""What a device keeps of a micro-batch for the backward pass of PyTorch, and what its logits take.

Of a layer PyTorch keeps, in numbers of a token, each in the dtype of the arithmetic unless float32 is said:

    none        of norms 4 D + 2 float32, and their outputs, 2 D; queries, keys, values, output, and that in rows,
                3 Q + 2 K, and H float32; 4 F of a gated feed-forward part, 2 F of another; of norms of heads
                2 (Q + K) + H + G float32 (2 for H + G if over all heads); what norms keep twice if they stand on both
                sides; with experts 4 F of each, their inputs, k D, and float32 of rows that are
                weighed, of the router's input, logits and scores, and of assignments: (k + 1) D + 2 E + 8 k;
                with a gated shared expert its output, D, and float32 of the gate
    selective   D, and what matrix products and attention give: Q + 2 K, Q + H float32, D; 2 F + D of each feed-forward
                part, F + D of one that isn't gated; with experts E float32
    narrow      of the same those products of a device that have no more outputs than inputs, and what attention gives
    full        D, the layer's input

D model dim, H heads and G key/value heads, Q and K their widths, F hidden width, k of E experts for a token. tp divides
all but D and E, and of these what norms keep and a layer's input (`stream_parts`); cp divides the tokens, but "none"
keeps the keys and values of all. Ranks along ep that gather tokens have room for all of them (`expert_rows`), whatever
their number of rows. (Korthikanti et al. 2022, arXiv:2205.05198, count another architecture in this way.) The norms are
RMSNorm. Compiled blocks keep less than "none".
"""

from __future__ import annotations

from shared_config.contract.capacity import capacity, capacity_share
from shared_config.contract.counts import BFLOAT16, FLOAT32
from shared_config.contract.labels import rows_of_logits
from shared_config.contract.sharding import Layout
from shared_config.schema.job import JobConfig

WIDENED = 2**24
"""Logits that the loss widens at a time where the vocabulary is whole."""
ROUTE = 5
"""Float32 numbers of an assignment that is gathered: its weight, its row, that row's assignment; with a capacity also
the row that stands for it, 2 more.
"""
GATHERED_MORE = 2**30
"""Bytes by which a layer of experts may send more where no host waits: what NVLink moves in 3 ms, at 350 GB/s. With the
waits a layer of `moe_small` took 10 ms more on four H200.
"""


def compute_bytes(job: JobConfig) -> int:
    """Bytes of a number in the dtype of the arithmetic."""
    return BFLOAT16 if job.train.casts else FLOAT32


def tokens_of_device(job: JobConfig, layout: Layout) -> int:
    """Tokens of a micro-batch that one device computes."""
    return job.train.batch_size * job.train.seq_len // layout.cp


def gathers_tokens(job: JobConfig, layout: Layout) -> bool:
    """How tokens get to the experts of other ranks along ep, and what comes of them back, in PyTorch, if its products
    skip rows of no expert there.

    True: all tokens are gathered, and float32 sums of what each rank makes of them scattered; backward likewise the
    gradients of results, and the summands of those of tokens, in their own dtype: (N - 1) T D (3 b + 4) bytes leave a
    rank. False: rows of other ranks' experts are exchanged: 4 k T D b (N - 1) / N bytes, but the host waits for their
    numbers, and then the device for the host.
    N ranks, T tokens of each, D model dim, k experts of a token, b bytes of a number.
    """
    number, numbers = compute_bytes(job), tokens_of_device(job, layout) * job.model.dim * (layout.ep - 1)
    gathered, exchanged = 3 * number + FLOAT32, 4 * job.model.moe_top_k * number / layout.ep
    return numbers * (gathered - exchanged) <= GATHERED_MORE


def expert_rows(job: JobConfig, layout: Layout) -> int:
    """Rows of experts that a device has room for: those of its own tokens, or of all that it gathers, of which a
    capacity leaves fewer.
    """
    model, tokens = job.model, tokens_of_device(job, layout)
    own = tokens * model.moe_top_k
    if layout.ep == 1 or not gathers_tokens(job, layout):
        return own
    limit = capacity(tokens, model.moe_top_k, model.num_experts, capacity_share(model.moe_capacity_factor))
    return min(own * layout.ep, model.num_experts * (own if limit is None else limit))


def stream_parts(job: JobConfig, layout: Layout) -> int:
    """Into how many parts tp divides the positions of a text model between products, in PyTorch."""
    return layout.tp if job.train.seq_len // layout.cp % layout.tp == 0 else 1


def kept_bytes(job: JobConfig, layout: Layout, *, is_moe: bool, mode: str | None = None) -> int:
    """Bytes that a layer keeps of a micro-batch on one device, as the module's table says.

    Args:
        is_moe: whether it is a layer with experts.
        mode: of recomputation; that of the job.
    """
    mode = job.train.activation_checkpointing if mode is None else mode
    model, number = job.model, compute_bytes(job)
    heads, kv_heads = model.n_heads // layout.tp, model.kv_heads // layout.tp
    queries, keys = heads * model.head_size, kv_heads * model.head_size
    hidden, stream, rows = _hidden_numbers(job, layout, is_moe), stream_parts(job, layout), 0
    if mode == "full":
        narrow, wide = model.dim // stream, 0
    elif mode in ("narrow", "selective"):
        products = _products(job, layout, is_moe)
        keeps_all = mode == "selective"
        kept = sum(outputs for inputs, outputs in products if keeps_all or outputs <= inputs)
        narrow = model.dim // stream + kept + queries
        if is_moe:
            own = sum(outputs for inputs, outputs in _expert(job, layout) if keeps_all or outputs <= inputs)
            rows = number * own * expert_rows(job, layout)
        routes = model.num_experts if is_moe and (mode == "selective" or model.num_experts <= model.dim) else 0
        wide = heads + routes
    else:
        narrow = 2 * model.dim + 3 * queries + 2 * keys * layout.cp + 2 * hidden
        norms = 2 if model.norm_placement == "both" else 1
        wide = -(-norms * (4 * model.dim + 2) // stream) + heads
        if model.qk_norm:
            wide += 2 * (queries + keys) + (heads + kv_heads if model.qk_norm_over == "head" else 2)
        if is_moe:
            gated, ranks = int(model.moe_shared_expert_gate), layout.ep if gathers_tokens(job, layout) else 1
            narrow += gated * model.dim
            wide += gated
            own_input = int(number != FLOAT32)
            wide += (ranks * model.moe_top_k + own_input) * model.dim + 2 * model.num_experts + 8 * model.moe_top_k
            wide += (ROUTE + 2 * (model.moe_capacity_factor > 0)) * model.moe_top_k * ranks * (ranks > 1)
            outputs = sum(outputs for inputs, outputs in _expert(job, layout) if inputs == model.dim)
            rows = number * (model.dim + 2 * outputs) * expert_rows(job, layout)
    return (number * narrow + FLOAT32 * wide) * tokens_of_device(job, layout) + rows


def widening_flops(job: JobConfig, layout: Layout, *, is_moe: bool) -> int:
    """Of a token's products in a layer on one device, those that have more outputs than inputs."""
    products = _products(job, layout, is_moe) + job.model.moe_top_k * _expert(job, layout) * is_moe
    return sum(2 * inputs * outputs for inputs, outputs in products if outputs > inputs)


def logits_rows(job: JobConfig, layout: Layout) -> int:
    """Tokens of which a device has logits at a time."""
    vocabulary = -(-job.model.vocab_size // layout.tp)
    return rows_of_logits(tokens_of_device(job, layout), job.model.dim, vocabulary, compute_bytes(job))


def logits_bytes(job: JobConfig, layout: Layout) -> int:
    """Bytes of the logits that exist at a time, their gradient, and what the loss widens of them to float32: a number
    of rows at a time, twice; where tp splits the vocabulary all of them, three times.
    """
    logits = logits_rows(job, layout) * -(-job.model.vocab_size // layout.tp)
    wide = 3 * logits if layout.tp > 1 else 2 * min(logits, WIDENED)
    return 2 * compute_bytes(job) * logits + FLOAT32 * wide


def buffer_bytes(job: JobConfig, layout: Layout) -> int:
    """Bytes of residual streams that PyTorch's engine holds throughout, on the pipeline stage that holds most.

    For each micro-batch of a step it has what comes from the stage before, and the gradient from the stage after; for
    each batch of an evaluation, in the groups of ``pp`` that pass together, what came and what went.
    """
    if layout.pp == 1:
        return 0
    groups = {min(layout.pp, job.eval.steps), job.eval.steps % layout.pp}
    rows = job.train.grad_accum_steps * job.train.batch_size
    rows += sum(groups) * (job.eval.batch_size or job.train.batch_size)
    neighbours = min(layout.pp - 1, 2)
    return neighbours * rows * (job.train.seq_len // layout.cp) * job.model.dim * compute_bytes(job)


def _expert(job: JobConfig, layout: Layout) -> list[tuple[int, int]]:
    """Inputs and outputs on one device of each product of a row with the weights of its expert."""
    model, width = job.model, job.model.computed_expert_ffn_hidden_dim // layout.tp
    return [*(2 if model.is_gated else 1) * [(model.dim, width)], (width, model.dim)]


def _products(job: JobConfig, layout: Layout, is_moe: bool) -> list[tuple[int, int]]:
    """Inputs and outputs on one device of each product of a token with a layer's weights, but those of a router and of
    experts that it chooses.
    """
    model, gates = job.model, 2 if job.model.is_gated else 1
    queries, keys = (heads // layout.tp * model.head_size for heads in (model.n_heads, model.kv_heads))
    attention = [(model.dim, queries), *2 * [(model.dim, keys)], (queries, model.dim)]
    if not is_moe:
        widths = [model.computed_ffn_hidden_dim // layout.tp]
    else:
        width, shared = model.computed_expert_ffn_hidden_dim // layout.tp, model.moe_shared_experts
        widths = [width * shared] * (shared > 0)
    gates_of_shared = [(model.dim, 1)] * (is_moe and model.moe_shared_expert_gate)
    return (
        attention
        + gates_of_shared
        + [pair for width in widths for pair in (*gates * [(model.dim, width)], (width, model.dim))]
    )


def _hidden_numbers(job: JobConfig, layout: Layout, is_moe: bool) -> int:
    """Numbers of hidden width that matrix products give a token, those of experts that a router chooses left out."""
    model = job.model
    width = model.computed_ffn_hidden_dim
    if is_moe:
        width = model.moe_shared_experts * model.computed_expert_ffn_hidden_dim
    return (2 if model.is_gated else 1) * width // layout.tp
