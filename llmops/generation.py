"""Batched inference that computes what prompts share once: choosing among answers, their likelihoods, generation.

Prompts that begin alike are grouped; the beginning goes through the model once and its keys and values are kept in one
copy for all rows (`Prefix`). Groups that begin alike share that too: few-shot examples, then a passage, then its
questions; a batch holds rows of several groups. Attention over a prefix and a row's own keys is exact.

A model whose attention cannot be replaced gets whole prompts, left padded: the plain way, which `reuse_prefix=False`
also takes.
"""

import heapq
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmops.checkpoints import fixed_attention
from llmops.console import TrainingStopped, log

T = TypeVar("T")
NAME = "cached_prefix"
WORTH_A_BATCH = 512  # tokens of padding that cost less than a batch more
MIN_SHARED = 16  # a shorter common beginning is not worth a pass of its own


@dataclass
class Prefix:
    """Keys and values of a prompt beginning `ids`: per layer two tensors [key/value heads, length, d]."""

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.ids)

    def cut(self, length: int) -> "Prefix":
        """Its first tokens: what comes later never reaches back."""
        return Prefix(self.ids[:length], [(key[:, :length], value[:, :length]) for key, value in self.layers])


Segment = tuple[int, int, Prefix]  # rows from, rows up to, the prefix they share


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Sequence[Segment] | None = None,
    own_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of rows over the prefix of their segment and each row's own keys.

    Shapes: query [B, heads, T, d], key and value [B, kv_heads, S, d] of the rows' own tokens, own_mask bool [B, T, S].
    Returns [B, T, heads, d]. Without segments it is transformers' SDPA.
    """
    if segments is None or own_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = [
        attend(query[a:b] * scale, key[a:b], value[a:b], own_mask[a:b], *prefix.layers[module.layer_idx])
        for a, b, prefix in segments
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own_mask: torch.Tensor, shared_key: torch.Tensor,
    shared_value: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The rows of one segment; the query is scaled, shared keys and values are [kv_heads, P, d]. As `attention`."""
    batch, heads, length, d = query.shape
    kv_heads, rows = shared_key.shape[0], heads // shared_key.shape[0] * length
    grouped = query.reshape(batch, kv_heads, rows, d)
    flat = grouped.transpose(0, 1).reshape(kv_heads, batch * rows, d)
    shared = (flat @ shared_key.transpose(1, 2)).view(kv_heads, batch, rows, -1).transpose(0, 1)
    own = grouped @ key.transpose(2, 3)
    mask = own_mask[:, None, None].expand(-1, 1, rows // length, -1, -1).reshape(batch, 1, rows, -1)
    own = own.masked_fill(~mask, float("-inf"))
    weights = torch.cat([shared, own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights_shared, weights_own = weights.split([shared.shape[-1], own.shape[-1]], dim=-1)
    flat = weights_shared.transpose(0, 1).reshape(kv_heads, batch * rows, -1)
    out = (flat @ shared_value).view(kv_heads, batch, rows, d).transpose(0, 1) + weights_own @ value
    return out.reshape(batch, heads, length, d).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Tree:
    """Candidate answers as a prefix tree over their tokens; each leaf is one candidate.

    Raises ValueError when a candidate is the beginning of another: candidates end with an end token.
    """

    def __init__(self, candidates: Sequence[Sequence[int]]) -> None:
        self.candidates = [tuple(ids) for ids in candidates]
        self.children: dict[tuple[int, ...], list[int]] = {}
        for ids in dict.fromkeys(self.candidates):
            for i, token in enumerate(ids):
                known = self.children.setdefault(ids[:i], [])
                if token not in known:
                    known.append(token)
        self.index = {ids: i for i, ids in enumerate(self.candidates)}
        if any(ids in self.children for ids in self.candidates):
            raise ValueError("a candidate is the beginning of another one; end each with an end token")

    def down(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Follow tokens that have no alternative: to the next choice, or to a leaf."""
        while len(self.children.get(path, ())) == 1:
            path = (*path, self.children[path][0])
        return path


@dataclass
class Choice:
    """The best candidates of one prompt as (index, probability), most probable first."""

    ranked: list[tuple[int, float]]


@dataclass
class Search:
    """Best-first search through one prompt's tree: exact, because probabilities only fall on the way down."""

    tree: Tree
    wanted: int
    heap: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    found: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wanted = min(self.wanted, len(self.tree.index))
        self.heap = [(0.0, self.tree.down(()))]
        self.settle()

    def settle(self) -> None:
        """Take complete candidates off the top; what is then on top is the next choice to look at."""
        while self.heap and len(self.found) < self.wanted and self.heap[0][1] in self.tree.index:
            cost, path = heapq.heappop(self.heap)
            self.found.append((self.tree.index[path], math.exp(-cost)))

    @property
    def next_path(self) -> tuple[int, ...] | None:
        """The tokens after which the model is asked next; None when all wanted candidates are found."""
        return self.heap[0][1] if len(self.found) < self.wanted and self.heap else None

    def advance(self, logits: torch.Tensor) -> None:
        """Continue with the model's logits [vocabulary] after `next_path`, renormalised over the allowed tokens."""
        cost, path = heapq.heappop(self.heap)
        tokens = self.tree.children[path]
        for token, logp in zip(tokens, logits[tokens].float().log_softmax(-1).tolist(), strict=True):
            heapq.heappush(self.heap, (cost - logp, self.tree.down((*path, token))))
        self.settle()


@dataclass
class Generated:
    """A greedy answer without its end token, and the probability of its tokens together."""

    ids: list[int]
    probability: float


@dataclass
class State:
    """A batch after its prompts: the logits that predict the next token, and what is needed to go on.

    `logits` [B, V]; `prompts` the ids after the prefix; `prefixes` one per row, or none at all; `cache` per layer two
    tensors [B, kv_heads, S, d], None when the model goes the plain way; `valid` bool [B, S] which columns are tokens.
    """

    logits: torch.Tensor
    prompts: list[Sequence[int]]
    prefixes: list[Prefix]
    cache: DynamicCache | None
    valid: torch.Tensor


class Generator:
    """A model ready to answer. Results do not depend on `batch_size`, the number of prompts per pass.

    When the GPU's memory does not suffice, `batch_size` is halved for the rest of the run and the batch done again.
    """

    def __init__(self, model: torch.nn.Module, pad_id: int, batch_size: int = 32, reuse_prefix: bool = True) -> None:
        self.model = model.eval()
        self.pad_id = pad_id
        self.batch_size = batch_size
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.plain_because = fixed_attention(base) if reuse_prefix else "that was asked for"
        if self.plain_because is None:
            base.set_attn_implementation(NAME)
        self.one_logit = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.device = next(model.parameters()).device

    def choose(
        self, prompts: Sequence[Sequence[int]], trees: Sequence[Tree], best: int = 2
    ) -> Iterator[tuple[int, Choice]]:
        """The `best` candidates of each prompt's tree, as (index of the prompt, choice) in the order of computation.

        Constrained decoding: at each step the model's distribution is renormalised over the tokens that continue a
        candidate, so the probabilities of all candidates add up to 1.
        """
        roots = [tree.down(()) for tree in trees]
        whole = [[*prompt, *root] for prompt, root in zip(prompts, roots, strict=True)]

        def search(rows: list[int], prefixes: list[Prefix]) -> list[Choice]:
            searches = [Search(trees[i], best) for i in rows]
            state = self._read([whole[i] for i in rows], prefixes)
            asked = [k for k, search in enumerate(searches) if search.next_path is not None]
            logits = state.logits[asked]
            while asked:
                for k, row_logits in zip(asked, logits.float().cpu(), strict=True):
                    searches[k].advance(row_logits)
                asked = [k for k, search in enumerate(searches) if search.next_path is not None]
                if asked:
                    paths = [(searches[k].next_path or ())[len(roots[rows[k]]) :] for k in asked]
                    logits = self._ask(state, asked, paths)
            return [Choice(search.found) for search in searches]

        return self._run(whole, search)

    def loglikelihoods(
        self, contexts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> Iterator[tuple[int, list[float]]]:
        """The log-likelihood of each context's candidates, as (index of the context, one sum per candidate).

        One pass per context gives every candidate of one token; longer ones need one more pass, over the candidates
        only. Logarithms are taken in float32 and summed in double precision. No candidate may be empty.
        """

        def score(rows: list[int], prefixes: list[Prefix]) -> list[list[float]]:
            state = self._read([contexts[i] for i in rows], prefixes)
            first = state.logits.float().log_softmax(-1)
            found = [[first[k, ids[0]].item() for ids in candidates[i]] for k, i in enumerate(rows)]
            longer = [(k, c) for k, i in enumerate(rows) for c, ids in enumerate(candidates[i]) if len(ids) > 1]
            for start in range(0, len(longer), self.batch_size):
                part = longer[start : start + self.batch_size]
                paths = [list(candidates[rows[k]][c]) for k, c in part]
                keep = max(map(len, paths)) - 1
                logits = self._ask(state, [k for k, _ in part], [tuple(ids[:-1]) for ids in paths], keep)
                for (k, c), ids, row in zip(part, paths, logits, strict=True):
                    own = row[keep - len(ids) + 1 :].float().log_softmax(-1)
                    rest = own.gather(1, torch.tensor(ids[1:], device=own.device)[:, None])
                    found[k][c] += rest.double().sum().item()
            return found

        return self._run(contexts, score)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, Generated]]:
        """The greedy answer to each prompt up to one of `stop_ids` or `max_new_tokens`, as (index, answer).

        `max_new_tokens` is one limit for all prompts or one for each.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens

        def answer(rows: list[int], prefixes: list[Prefix]) -> list[Generated]:
            return self._greedy([prompts[i] for i in rows], prefixes, [limits[i] for i in rows], set(stop_ids))

        return self._run(prompts, answer)

    @torch.inference_mode()
    def _run(
        self, prompts: Sequence[Sequence[int]], work: Callable[[list[int], list[Prefix]], list[T]]
    ) -> Iterator[tuple[int, T]]:
        """`work` for every batch; a batch that does not fit into the GPU's memory is done again in halves."""
        for batch in self._batches(prompts):
            waiting = [batch]
            while waiting:
                part, prefixes = waiting.pop(0)
                results = None
                try:
                    results = work(part, prefixes)
                except torch.OutOfMemoryError as error:
                    if len(part) == 1:
                        raise too_long(prompts[part[0]]) from error
                if results is not None:
                    yield from zip(part, results, strict=True)
                    continue
                half = len(part) // 2  # after the except block, where the error no longer holds the tensors
                self.batch_size = min(self.batch_size, max(1, half))
                log(f"out of memory with {len(part)} prompts at once; going on with {self.batch_size}")
                waiting[:0] = [(part[:half], prefixes[:half]), (part[half:], prefixes[half:])]
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _greedy(
        self, prompts: list[Sequence[int]], prefixes: list[Prefix], limits: list[int], stop_ids: set[int]
    ) -> list[Generated]:
        state = self._read(prompts, prefixes)
        logits, alive = state.logits, list(range(len(prompts)))
        answers: list[list[int]] = [[] for _ in prompts]
        costs = [0.0] * len(prompts)
        while True:
            top = logits.float().log_softmax(-1).max(-1)
            going = []
            for k, (i, logp, token) in enumerate(zip(alive, top.values.tolist(), top.indices.tolist(), strict=True)):
                costs[i] -= logp
                if token not in stop_ids:
                    answers[i].append(token)
                    if len(answers[i]) < limits[i]:
                        going.append(k)
            if not going:
                break
            alive = [alive[k] for k in going]
            if state.cache is None:
                logits = self._ask(state, alive, [tuple(answers[i]) for i in alive])
            else:
                if len(going) < len(state.valid):
                    state = self._select(state, going)
                logits = self._step(state, [answers[i][-1:] for i in alive])
        return [Generated(ids, math.exp(-cost)) for ids, cost in zip(answers, costs, strict=True)]

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[Prefix]]]:
        """Batches of rows, each with its prefix (or all without), longest first within a group.

        Rows without a prefix come longest first altogether, so that memory runs out at once or never. A row whose
        length would make most of a batch padding begins a new one.
        """
        if not prompts:
            return
        rows: list[int] = []
        prefixes: list[Prefix] = []
        last: Prefix | None = None
        shared_of: dict[int, int] = {}
        for group, shared in group_by_prefix(prompts) if self.plain_because is None else [(range(len(prompts)), 0)]:
            if not shared and rows:  # they come last, and without prefixes
                yield rows, prefixes
                rows, prefixes = [], []
            last = self._prefix(prompts[group[0]][:shared], last) if shared else None
            for i in sorted(group, key=lambda i: -len(prompts[i])):
                own = [len(prompts[k]) - shared_of[k] for k in rows]
                shared_of[i] = shared
                if rows and (len(rows) >= self.batch_size or wasteful([*own, len(prompts[i]) - shared])):
                    yield rows, prefixes
                    rows, prefixes = [], []
                rows.append(i)
                prefixes += [last] if last else []
        if rows:
            yield rows, prefixes

    def _prefix(self, ids: Sequence[int], last: Prefix | None) -> Prefix:
        """The prefix of these tokens; what it shares with the last one is taken from there."""
        common = next((i for i, (a, b) in enumerate(zip(ids, last.ids, strict=False)) if a != b), None) if last else 0
        if last and common is None:
            common = min(len(ids), last.length)
        known = last.cut(common) if last and common and common >= MIN_SHARED else None
        if known and known.length == len(ids):
            return known
        try:
            state = self._read([ids], [known] if known else [])
        except torch.OutOfMemoryError as error:
            raise too_long(ids) from error
        own = [(layer.keys[0], layer.values[0]) for layer in state.cache.layers] if state.cache else []
        if known:
            own = [
                (torch.cat([key, more_key], dim=1), torch.cat([value, more_value], dim=1))
                for (key, value), (more_key, more_value) in zip(known.layers, own, strict=True)
            ]
        return Prefix(list(ids), own)

    def _read(self, prompts: list[Sequence[int]], prefixes: list[Prefix]) -> State:
        """Put whole prompts through the model, except what their prefixes hold already."""
        own = [prompt[p.length :] for prompt, p in zip(prompts, prefixes, strict=True)] if prefixes else prompts
        if self.plain_because is None:
            empty = torch.zeros(len(own), 0, dtype=torch.bool, device=self.device)
            state = State(torch.empty(0), own, prefixes, DynamicCache(), empty)
            state.logits = self._step(state, own)
            return state
        return State(self._plain(own), own, [], None, torch.empty(0))

    def _ask(self, state: State, rows: list[int], paths: Sequence[tuple[int, ...]], keep: int = 0) -> torch.Tensor:
        """Logits [rows, V] after these rows' prompts and paths; the state stays as it was.

        With `keep`, the logits after each of the last `keep` columns [rows, keep, V].
        """
        if state.cache is None:
            return self._plain([[*state.prompts[k], *path] for k, path in zip(rows, paths, strict=True)], keep)
        return self._step(self._select(state, rows), list(paths), keep)

    def _select(self, state: State, rows: list[int]) -> State:
        """The state of some rows, with a cache of their own."""
        index = torch.tensor(rows, device=self.device)
        cache = DynamicCache()
        for number, layer in enumerate(state.cache.layers if state.cache else []):
            cache.update(layer.keys[index], layer.values[index], number)
        prefixes = [state.prefixes[k] for k in rows] if state.prefixes else []
        return State(state.logits, [state.prompts[k] for k in rows], prefixes, cache, state.valid[index])

    def _step(self, state: State, new: Sequence[Sequence[int]], keep: int = 0) -> torch.Tensor:
        """Append tokens to every row of a state with a cache; the logits after them, as `_ask`."""
        ids, own = self._left_padded(new)
        before = state.valid.sum(1, keepdim=True)
        if state.prefixes:
            before = before + torch.tensor([[prefix.length] for prefix in state.prefixes], device=self.device)
        positions = (before + own.cumsum(1) - 1).clamp(min=0)
        state.valid = torch.cat([state.valid, own], dim=1)
        extra: dict[str, Any] = {"attention_mask": state.valid.long()}
        if state.prefixes:
            width, total = own.shape[1], state.valid.shape[1]
            order = torch.arange(total, device=self.device)
            causal = order[None, :] <= order[total - width :, None]
            mask = causal[None] & state.valid[:, None, :]
            extra = {"segments": segments_of(state.prefixes), "own_mask": mask}
        return self._forward(ids, keep, position_ids=positions, past_key_values=state.cache, use_cache=True, **extra)

    def _plain(self, prompts: Sequence[Sequence[int]], keep: int = 0) -> torch.Tensor:
        ids, valid = self._left_padded(prompts)
        return self._forward(ids, keep, attention_mask=valid.long(), use_cache=False)

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [B, T], which of them are tokens, bool [B, T])."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + list(row) for row in rows])
        valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        return ids.to(self.device), valid.to(self.device)

    def _forward(self, ids: torch.Tensor, keep: int = 0, **inputs: Any) -> torch.Tensor:
        """Logits after the last column [B, V], or after the last `keep` columns [B, keep, V]."""
        if self.one_logit:
            inputs["logits_to_keep"] = keep or 1
        logits = self.model(input_ids=ids, **inputs).logits
        return logits[:, -keep:] if keep else logits[:, -1]


def too_long(ids: Sequence[int]) -> TrainingStopped:
    """The error of a prompt that does not even fit by itself."""
    return TrainingStopped(
        f"the device's memory does not suffice for one prompt of {len(ids)} tokens; "
        "allow fewer tokens, or use a smaller model or a larger GPU"
    )


def wasteful(lengths: Sequence[int]) -> bool:
    """Whether rows of these lengths, padded to the longest, are mostly padding."""
    padding = max(lengths) * len(lengths) - sum(lengths)
    return padding > max(WORTH_A_BATCH, sum(lengths) / 2)


def segments_of(prefixes: Sequence[Prefix]) -> list[Segment]:
    """Runs of rows that have the same prefix."""
    found: list[Segment] = []
    for row, prefix in enumerate(prefixes):
        if found and found[-1][2] is prefix:
            found[-1] = (found[-1][0], row + 1, prefix)
        else:
            found.append((row, row + 1, prefix))
    return found


def group_by_prefix(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], int]]:
    """Groups of rows as (rows, length of the beginning they share); rows that share too little come last, with 0.

    Groups come in lexicographic order, so that neighbours share as much as possible: the few-shot examples of all,
    then each passage. Among rows that share a beginning, those that share at least as much again, and at least
    MIN_SHARED tokens, are a group of their own: a smaller batch has to pay for itself.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    common = [common_length(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    alone: list[int] = []
    # runs of order[low:high] that share `shared` tokens, still to be taken apart; the last one is next
    runs = [(0, len(order), 0)]
    while runs:
        low, high, shared = runs.pop()
        enough = max(MIN_SHARED, 2 * shared)
        rest, inside, i = [], [], low
        while i < high:
            end = i + 1
            while end < high and common[end - 1] >= enough:
                end += 1
            if end - i > 1:
                inside.append((i, end, min(common[i : end - 1])))
            else:
                rest.append(order[i])
            i = end
        if shared and rest and (len(rest) > 1 or inside):
            yield rest, shared
        else:
            alone += rest
        runs += reversed(inside)
    if alone:
        yield alone, 0


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two token sequences, one token less than the shorter one at most."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)
