"""How texts are written: in batches, and for an evaluation greedily."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from bilora_ray.config import TrialConfig
from bilora_ray.paths import model_file
from bilora_ray.training.compute.targets import base_of, is_plain, takes
from bilora_ray.training.data.batches import eval_batches
from bilora_ray.training.data.chat import Template
from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

    from bilora_ray.training.distributed.workers import Workers

# A transformers model or a PEFT model around one.
Model = Any
# Rows -> what chooses each next token of their texts, in the place of the likeliest one.
Draw = Callable[[Sequence[int]], "LogitsProcessor"]
# Of each layer of a decoder its keys and its values of one row, (heads, positions, width) each.
States = list[tuple["Tensor", "Tensor"]]
# A step of so many texts takes a GPU hardly longer than that of one: it reads the weights once.
MOST_ROWS = 256
# Bytes that texts may take on a CPU, where more at once are not faster.
CPU_BYTES = 2**28
# Of what is free on a GPU: the rest is for logits, and for a layer's keys and values while they are copied.
SAFE_SHARE = 0.5

# What a `generation_config.json` may hold that decides what is written -> the value with which it does nothing.
GREEDY: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": None,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
}


def preferences(config: TrialConfig) -> str:
    """What the base's files say of generation that would write other texts; nothing where they cannot be read here."""
    for file in ("generation_config.json", "config.json"):  # the latter held it before there was the former
        try:
            path = model_file(config.model_name_or_path, config.model_revision, file)
            found = json.loads(path.read_text(encoding="utf-8")).items()
        except (OSError, ValueError, AttributeError):
            continue
        told = sorted((key, value) for key, value in found if key in GREEDY and value not in (None, GREEDY[key]))
        return ", ".join(key if isinstance(value, list) else f"{key} ({json.dumps(value)})" for key, value in told)
    return ""


def greedy(
    model: Model,
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    most_new_tokens: int,
    beginning: Mapping[str, int],
) -> GenerationConfig:
    """How a text is written for an evaluation: greedily, whatever the base's own file prefers.

    Of that file counts what is the model's form: with what a text ends, and how its keys and values are kept.

    Args:
        model: writes.
        config: the settings.
        tokenizer: the model's own, with a padding token.
        most_new_tokens: how many tokens a text has at the most.
        beginning: what a decoder reads and writes first, in the words of a GenerationConfig.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    return GenerationConfig(
        max_new_tokens=most_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends(model, tokenizer, config),
        use_cache=own.use_cache,
        # Marian's models were trained with padding that they must not write.
        bad_words_ids=[word for word in own.bad_words_ids or () if word == [tokenizer.pad_token_id]] or None,
        **beginning,
    )


class Read(NamedTuple):
    """What a pass over a row's completion says of how it would be written.

    Attributes:
        tokens: the likeliest at each target, in order.
        states: what the text can be written on from; None where that was not kept.
    """

    tokens: list[int]
    states: States | None = None


class Reader:
    """Reads, off passes over completions, how a model would write them.

    Of rows that it would write otherwise the keys and values are kept, so that a text goes on from there, where that is
    exact and spares something: in float32 on a CPU. A GPU reads prompts in no time beside what it writes, and bf16
    would be rounded otherwise. Several workers write other rows than they have read.

    Args:
        model: whose passes they are, of rows that are padded at the right.
        workers: who share them.
        writes_on: whether a text goes on with its prompt as such a pass has read it.
    """

    def __init__(self, model: Model, workers: Workers, writes_on: bool) -> None:
        import torch

        # A model's own products of keys may be rounded by where these lie: torch's attention is not.
        is_exact = base_of(model).config._attn_implementation == "sdpa" and model.dtype == torch.float32
        is_exact = is_exact and model.device.type == "cpu" and workers.planned == 1
        can_keep = writes_on and is_exact and is_plain(model) and takes(model, "use_cache")
        self.model = model
        self.room = CPU_BYTES if can_keep else 0

    @contextmanager
    def reading(self, positions: int) -> Iterator[list[Any]]:
        """Let the model's pass of so many `positions`, in the block, leave what it keeps in the list, if it can."""
        kept: list[Any] = []
        with ExitStack() as hooks:
            if self.room and 0 < _bytes_of_a_row(self.model, 0, positions) <= self.room:
                base = base_of(self.model)
                hooks.callback(base.register_forward_pre_hook(_with_cache, with_kwargs=True).remove)
                hooks.callback(base.register_forward_hook(lambda *call: kept.append(call[-1])).remove)
            yield kept

    def read(self, logits: Tensor, targets: Tensor, counts: Sequence[int], kept: Sequence[Any]) -> list[Read]:
        """What a pass says of each of its rows: the likeliest token at each of its targets, and what is kept of it.

        Args:
            logits: (..., vocabulary).
            targets: (...), IGNORED where there is nothing to predict; rows follow each other.
            counts: targets of each row.
            kept: what `reading` has yielded.
        """
        is_target = targets != IGNORED
        found, wanted = (part[is_target].cpu().split(list(counts)) for part in (logits.argmax(-1), targets))
        reads = [Read(tokens.tolist()) for tokens in found]
        parted = [row for row, (ours, theirs) in enumerate(zip(found, wanted, strict=True)) if not ours.equal(theirs)]
        layers = _layers_of(kept[0].get("past_key_values"), parted) if kept and parted else None
        if layers is not None:
            self.room -= sum(tensor.nbytes for layer in layers for tensor in layer)
            for place, row in enumerate(parted):
                reads[row] = Read(reads[row].tokens, [(keys[place], values[place]) for keys, values in layers])
        return reads


def _with_cache(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return given, {**named, "use_cache": True}


def _layers_of(cache: Any, rows: list[int]) -> States | None:
    """Keys and values of `rows`; None where a `cache` holds something else, or not that of all positions."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache:
        return None
    if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
        return None
    return [(keys[rows], values[rows]) for keys, values, _ in cache]


def _cache(states: Sequence[States], lengths: Sequence[int]) -> DynamicCache:
    """One for all rows, of the first so many positions of each, padded at the left."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import DynamicCache

    def joined(rows: Sequence[Tensor]) -> Tensor:
        parts = [row[:, :length].transpose(0, 1) for row, length in zip(rows, lengths, strict=True)]
        return pad_sequence(parts, batch_first=True, padding_side="left").transpose(1, 2)

    cache = DynamicCache()
    for number, rows in enumerate(zip(*states, strict=True)):
        keys, values = zip(*rows, strict=True)
        cache.update(joined(keys), joined(values), number)
    return cache


def begun(target: Sequence[int], read: Sequence[int], generation: GenerationConfig) -> list[int]:
    """What a model that reads `target`, and found the tokens of `read` likeliest in its places, begins to write.

    That is the target for as long as they agree, and the token with which they part: what would follow that was not
    read. An end ends it.

    Args:
        target: what is to be written.
        read: as many tokens.
        generation: see `greedy`.
    """
    if generation.bad_words_ids:  # then the likeliest token may not be what is written
        return []
    if generation.forced_bos_token_id is not None:
        read = [generation.forced_bos_token_id, *read[1:]]
    written: list[int] = []
    for wanted, token in zip(target, read, strict=True):
        written.append(token)
        if token != wanted or is_whole(written, generation):
            break
    return written


def is_whole(text: Sequence[int], generation: GenerationConfig) -> bool:
    """Whether nothing more is written behind `text`."""
    return len(text) >= generation.max_new_tokens or (len(text) > 0 and text[-1] in generation.eos_token_id)


def write(
    model: Model,
    prompts: Sequence[array[int]],
    beginnings: Sequence[Sequence[int]],
    generation: GenerationConfig,
    collate: Callable[[Sequence[array[int]]], dict[str, Tensor]],
    config: TrialConfig,
    workers: Workers,
    *,
    continues: bool,
    states: Sequence[States | None] | None = None,
    draw: Draw | None = None,
    told: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The tokens that `model` writes after each of `prompts`; behind an end there may be others of no meaning.

    Args:
        model: in evaluation mode.
        prompts: token ids.
        beginnings: of each text as much as is known; one that is whole is not written again. Of others there is none
            unless the model `continues` its prompt.
        generation: see `greedy`.
        collate: prompts -> `input_ids` and `attention_mask` (prompts, length), padded, where `model` computes.
        config: how many at once.
        workers: who share the batches.
        continues: whether a text goes on with its prompt, so that it begins behind the last position.
        states: those of each prompt and its beginning, less the last token. Where they are known, a prompt is not read.
        draw: None: greedily.
        told: is called with how many texts more are written.
    """
    from transformers import LogitsProcessorList

    from bilora_ray.training.compute.memory import current_room, in_parts

    texts = [list(beginning) for beginning in beginnings]
    unfinished = [row for row, text in enumerate(texts) if not is_whole(text, generation)]

    def generate(rows: Sequence[int]) -> list[list[int]]:
        least, longest = min(len(texts[row]) for row in rows), max(len(prompts[row]) for row in rows)
        # All are written for as long as the shortest needs: none may get past where the longest prompt's text ends.
        known = [texts[row][: least + longest - len(prompts[row])] for row in rows]
        inputs: dict[str, Any] = collate(
            [prompts[row] + array("i", text) for row, text in zip(rows, known, strict=True)]
        )
        before = [state for row in rows if states is not None and (state := states[row]) is not None]
        # None, as in the files of many bases, is as True.
        if len(before) == len(rows) and generation.use_cache is not False:
            lengths = [len(prompts[row]) + len(text) - 1 for row, text in zip(rows, known, strict=True)]
            inputs["past_key_values"] = _cache(before, lengths)
        rest = copy(generation)
        rest.max_new_tokens = generation.max_new_tokens - least
        # Every forward pass gathers the weights, so whose texts are done goes on with those whose aren't.
        synced = workers.sharded and workers.world_size > 1
        if draw is not None:
            inputs["logits_processor"] = LogitsProcessorList([draw(rows)])
        output = model.generate(**inputs, generation_config=rest, synced_gpus=synced)
        # Before what it writes stands the prompt, or what a decoder starts with.
        written = output[:, inputs["input_ids"].shape[1] if continues else 1 :].tolist()
        if told is not None:
            told(len(rows))
        return [[*text, *more][: generation.max_new_tokens] for text, more in zip(known, written, strict=True)]

    lengths = [len(prompts[row]) + len(texts[row]) for row in unfinished]
    size = rows_at_once(model, lengths, generation.max_new_tokens, config, workers)
    room = current_room(config, workers)
    size = min(size, room.proven.generation or size)
    batches = [[unfinished[place] for place in batch] for batch in eval_batches(lengths, size)]
    with alone(generation, model):
        parts = workers.map(in_parts(room, "generation", generate, len), batches)
    for rows, written in zip(batches, parts, strict=True):
        for row, text in zip(rows, written, strict=True):
            texts[row] = text
    return texts


def rows_at_once(
    model: Model, lengths: Sequence[int], most_new_tokens: int, config: TrialConfig, workers: Workers
) -> int:
    """How many texts are written at once: what is asked for, or as many as help and have room; the same on each worker.

    A power of two. It is no less than the rows of an
    evaluation pass, and these where the shape of `model` is not told in the usual words.

    Args:
        model: where it computes.
        lengths: tokens of the prompts.
        most_new_tokens: of a text.
        config: the settings.
        workers: who share the work. Each should get a part of it.
    """
    asked, least = config.per_device_generation_batch_size, config.per_device_eval_batch_size
    if asked is not None or not config.writes_several or not lengths:
        return asked or least
    a_row = _bytes_of_a_row(model, max(lengths), most_new_tokens)
    room = min(workers.gather(_room(model)))
    fitting = 2 ** ((room // a_row).bit_length() - 1) if 0 < a_row <= room else least
    return max(least, min(fitting, MOST_ROWS, -(-len(lengths) // workers.planned)))


def _bytes_of_a_row(model: Model, prompt: int, new: int) -> int:
    """Keys and values of a prompt and a text, which a decoder with an encoder keeps too, and what its pass needs.

    That is of one layer, and of the prompt. 0 where a model has no such layers, or calls them by other names.
    """
    shape = model.config.get_text_config(decoder=True)
    sizes: list[Any] = [
        getattr(shape, key, None) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    ]
    if not all(isinstance(size, int) and size for size in sizes):  # an encoder may have one for each of its stages
        return 0
    heads, hidden, layers = sizes
    width = getattr(shape, "head_dim", None) or hidden // heads
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden
    kept = 2 * layers * (getattr(shape, "num_key_value_heads", None) or heads) * width
    return int(model.dtype.itemsize * (kept * (prompt + new) + (4 * hidden + 3 * inner) * prompt))


def _room(model: Model) -> int:
    """Bytes that texts may take where `model` computes: of a GPU's, a share of what its weights leave.

    What else is in use at a moment does not count: other batches round bf16 otherwise, and a trial should measure the
    same each time. Where there is less, fewer texts are written at once.
    """
    import torch

    if model.device.type != "cuda":
        return CPU_BYTES
    total = torch.cuda.get_device_properties(model.device).total_memory
    own = int(total * torch.cuda.get_per_process_memory_fraction(model.device))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return int(SAFE_SHARE * max(own - weights, 0))


@contextmanager
def alone(generation: GenerationConfig, model: Model) -> Iterator[None]:
    """Have `generation` be all that `model` knows of writing: what it leaves open, transformers takes from the own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = generation
    try:
        yield
    finally:
        base.generation_config = own


def ends(model: Model, tokenizer: PreTrainedTokenizerBase, config: TrialConfig) -> list[int]:
    """The tokens that end a text: the tokenizer's, which training appends, and the model's own.

    Of a chat the first that its template writes after a turn too, if none of the others is among those.
    """
    known = {tokenizer.eos_token_id, *_own_ends(model)}
    of_turns = Template.of(tokenizer, config).ends if config.chat_column is not None else ()
    return sorted({*known, *(of_turns[:1] if known.isdisjoint(of_turns) else ())} - {None})


def stops(model: Model, tokenizer: PreTrainedTokenizerBase, config: TrialConfig) -> list[int]:
    """The `ends`, where the model that serves them would not know one: it would go on behind what was learned."""
    found, own = ends(model, tokenizer, config), _own_ends(model)
    return [] if set(found) <= set(own) else found


def _own_ends(model: Model) -> list[int | None]:
    own = model.generation_config.eos_token_id
    return own if isinstance(own, list) else [own]
