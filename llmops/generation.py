"""Batched inference that computes what prompts share once: choosing among answers, their likelihoods, generation.

Prompts that begin alike are grouped; the beginning goes through the model once and its keys and values are kept in one
copy for all rows (`Prefix`). Groups that begin alike share that too: few-shot examples, then a passage, then its
questions; a batch holds rows of several groups. Attention over a prefix and a row's own keys is exact.

A model whose attention cannot be replaced gets whole prompts, left padded: the plain way, which `reuse_prefix=False`
also takes.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from transformers.cache_utils import Cache

from llmops import shared_prefix
from llmops.checkpoints import fixed_attention
from llmops.choice_search import Choice, Search, Tree
from llmops.console import RunStopped, log
from llmops.shared_prefix import MIN_SHARED, NOTHING, Prefix, empty_cache, group_by_prefix, segments_of

T = TypeVar("T")
WORTH_A_PASS = 512  # tokens of padding that cost less than a pass more
MOST_TOKENS = 8192  # tokens in one pass: more are no faster, only need more memory
FEW_ALONE = 8  # rows that share nothing, but may go with others that do
MOST_ROWS = 128  # prompts at once where memory does not set the limit
MOST_PLAIN_ROWS = 16  # prompts at once when each goes through anew for every token


@dataclass
class Generated:
    """A greedy answer without its end token, and the probability of its tokens together."""

    ids: list[int]
    probability: float


@dataclass
class State:
    """A batch after its prompts: the logits that predict the next token, and what is needed to go on.

    `logits` [B, V]; `prompts` the ids after the prefix; `prefixes` one per row; `cache` per layer two tensors
    [B, kv_heads, S, d], None when the model goes the plain way; `valid` bool [B, S] which columns are tokens.
    """

    logits: torch.Tensor
    prompts: list[Sequence[int]]
    prefixes: list[Prefix]
    cache: Cache | None
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
            base.set_attn_implementation(shared_prefix.NAME)
        self.one_logit = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.device = next(model.parameters()).device

    def fit(self, length: int) -> None:
        """Answer as many prompts of `length` tokens at once as half of the free memory holds, at most MOST_ROWS.

        A prompt takes 2 x layers x key/value heads x head width per token; the plain way keeps nothing.
        """
        if self.plain_because is not None:
            self.batch_size = MOST_PLAIN_ROWS
            return
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        element = next(self.model.parameters()).element_size()
        row = 2 * config.num_hidden_layers * kv_heads * width * element * length
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else psutil.virtual_memory().available
        self.batch_size = max(1, min(MOST_ROWS, free // 2 // row))

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
        """Batches of rows, each with its prefix, neighbours with the same one, longest first within a group.

        Rows that share nothing come last, in batches of their own unless they are few.
        """
        rows: list[int] = []
        prefixes: list[Prefix] = []
        last = NOTHING
        for group, shared in group_by_prefix(prompts) if self.plain_because is None else [(range(len(prompts)), 0)]:
            if not shared and rows and len(group) > FEW_ALONE:
                yield rows, prefixes
                rows, prefixes = [], []
            last = self._prefix(prompts[group[0]][:shared], last) if shared else NOTHING
            for i in sorted(group, key=lambda i: -len(prompts[i])):
                rows.append(i)
                prefixes.append(last)
                if len(rows) >= self.batch_size:
                    yield rows, prefixes
                    rows, prefixes = [], []
        if rows:
            yield rows, prefixes

    def _prefix(self, ids: Sequence[int], last: Prefix) -> Prefix:
        """The prefix of these tokens; what it shares with the last one is taken from there."""
        both = zip(ids, last.ids, strict=False)
        common = next((i for i, (a, b) in enumerate(both) if a != b), min(len(ids), last.length))
        known = last.cut(common) if common >= MIN_SHARED else NOTHING
        if known.length == len(ids):
            return known
        try:
            state = self._read([ids], [known])
        except torch.OutOfMemoryError as error:
            raise too_long(ids) from error
        own = [(layer.keys[0], layer.values[0]) for layer in state.cache.layers] if state.cache else []
        if known.length:
            own = [
                (torch.cat([key, more_key], dim=1), torch.cat([value, more_value], dim=1))
                for (key, value), (more_key, more_value) in zip(known.layers, own, strict=True)
            ]
        return Prefix(list(ids), own)

    def _read(self, prompts: list[Sequence[int]], prefixes: list[Prefix]) -> State:
        """Put whole prompts through the model, except what their prefixes hold already.

        Rows of about one length go through together; their keys and values are put side by side afterwards.
        """
        if self.plain_because is not None:
            return State(self._plain(prompts), prompts, prefixes, None, torch.empty(0))
        own = [prompt[prefix.length :] for prompt, prefix in zip(prompts, prefixes, strict=True)]
        parts, states = [], []
        for sharing in (True, False):
            candidates = [k for k, prefix in enumerate(prefixes) if bool(prefix.length) == sharing]
            parts += [[candidates[k] for k in part] for part in similar_lengths([len(own[k]) for k in candidates])]
        for rows in parts:
            empty = torch.zeros(len(rows), 0, dtype=torch.bool, device=self.device)
            state = State(torch.empty(0), [own[k] for k in rows], [prefixes[k] for k in rows], empty_cache(), empty)
            state.logits = self._step(state, state.prompts)
            states.append(state)
        if any(prefix.length for prefix in prefixes):  # whole prompts beside short ends of others
            states = [state if state.prefixes[0].length else own_prefixes(state) for state in states]
        return states[0] if len(parts) == 1 else self._join(states, parts)

    def _join(self, states: list[State], parts: list[list[int]]) -> State:
        """One state of several; `parts[i]` are the rows that those of `states[i]` become."""
        order = [row for rows in parts for row in rows]
        prompts = in_order([prompt for state in states for prompt in state.prompts], order)
        prefixes = in_order([prefix for state in states for prefix in state.prefixes], order)
        cache = empty_cache()
        for number, layers in enumerate(zip(*(state.cache.layers for state in states if state.cache), strict=True)):
            keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
            cache.update(side_by_side(keys, order, 2), side_by_side(values, order, 2), number)
        logits = side_by_side([state.logits for state in states], order)
        return State(logits, prompts, prefixes, cache, side_by_side([state.valid for state in states], order, 1))

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
        cache = empty_cache()
        for number, layer in enumerate(state.cache.layers if state.cache else []):
            cache.update(layer.keys[index], layer.values[index], number)
        prompts, prefixes = [state.prompts[k] for k in rows], [state.prefixes[k] for k in rows]
        return State(state.logits, prompts, prefixes, cache, state.valid[index])

    def _step(self, state: State, new: Sequence[Sequence[int]], keep: int = 0) -> torch.Tensor:
        """Append tokens to every row of a state with a cache; the logits after them, as `_ask`."""
        ids, own = self._left_padded(new)
        ahead = torch.tensor([[prefix.length] for prefix in state.prefixes], device=self.device)
        positions = (ahead + state.valid.sum(1, keepdim=True) + own.cumsum(1) - 1).clamp(min=0)
        state.valid = torch.cat([state.valid, own], dim=1)
        extra: dict[str, Any] = {"attention_mask": state.valid.long()}
        if any(prefix.length for prefix in state.prefixes):
            order = torch.arange(state.valid.shape[1], device=self.device)
            causal = order[None, :] <= order[-ids.shape[1] :, None]
            mask = causal[None] & state.valid[:, None, :]
            extra = {"segments": segments_of(state.prefixes), "own_mask": mask}
        return self._forward(ids, keep, position_ids=positions, past_key_values=state.cache, use_cache=True, **extra)

    def _plain(self, prompts: Sequence[Sequence[int]], keep: int = 0) -> torch.Tensor:
        parts, logits = similar_lengths(list(map(len, prompts))), []
        for rows in parts:
            ids, valid = self._left_padded([prompts[k] for k in rows])
            logits.append(self._forward(ids, keep, attention_mask=valid.long(), use_cache=False))
        return side_by_side(logits, [row for rows in parts for row in rows], 1 if keep else None)

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


def too_long(ids: Sequence[int]) -> RunStopped:
    """The error of a prompt that does not even fit by itself."""
    return RunStopped(
        f"the device's memory does not suffice for one prompt of {len(ids)} tokens; "
        "allow fewer tokens, or use a smaller model or a larger GPU"
    )


def own_prefixes(state: State) -> State:
    """The same state, with what each row has in its cache as a prefix of its own."""
    layers = state.cache.layers if state.cache else []
    found, cache = [], empty_cache()
    for k, prompt in enumerate(state.prompts):
        own = [(layer.keys[k, :, -len(prompt) :], layer.values[k, :, -len(prompt) :]) for layer in layers]
        found.append(Prefix(list(prompt), own))
    for number, layer in enumerate(layers):
        cache.update(layer.keys[:, :, :0], layer.values[:, :, :0], number)
    return State(state.logits, [() for _ in found], found, cache, state.valid[:, :0])


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Rows parted, in their order, so that no part is mostly padding or has more than MOST_TOKENS."""
    parts: list[list[int]] = []
    longest = total = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        count = len(parts[-1]) + 1 if parts else 1
        padding = longest * count - total - lengths[row]
        if not parts or padding > max(WORTH_A_PASS, (total + lengths[row]) / 2) or longest * count > MOST_TOKENS:
            parts.append([])
            longest, total = lengths[row], 0
        parts[-1].append(row)
        total += lengths[row]
    return [sorted(part) for part in parts]


def in_order(items: Sequence[T], order: Sequence[int]) -> list[T]:
    """Item i at place `order[i]`."""
    return [item for _, item in sorted(zip(order, items, strict=False), key=lambda pair: pair[0])]


def side_by_side(pieces: list[torch.Tensor], order: list[int], columns: int | None = None) -> torch.Tensor:
    """The rows of all pieces as one tensor, row i at place `order[i]`; dimension `columns` is padded on the left."""
    if columns is not None:
        width = max(piece.shape[columns] for piece in pieces)
        ahead = [0, 0] * (pieces[0].dim() - 1 - columns)
        pieces = [torch.nn.functional.pad(piece, [*ahead, width - piece.shape[columns], 0]) for piece in pieces]
    whole = torch.cat(pieces)
    return whole if order == sorted(order) else whole[torch.tensor(order, device=whole.device).argsort()]
