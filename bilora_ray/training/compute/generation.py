"""How texts are written for an evaluation: greedily, in batches."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.paths import model_file
from bilora_ray.training.data.batches import eval_batches
from bilora_ray.training.data.chat import Template
from bilora_ray.training.metrics import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from bilora_ray.training.distributed.workers import Workers

# A transformers model or a PEFT model around one.
Model = Any
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


def likeliest(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> list[list[int]]:
    """Of each row of a batch the likeliest token at each of its targets, `counts` of them, in order.

    Args:
        logits: (..., vocabulary).
        targets: (...), IGNORED where there is nothing to predict; rows follow each other.
        counts: targets of each row.
    """
    tokens = logits.argmax(-1)[targets != IGNORED].cpu()
    return [part.tolist() for part in tokens.split(list(counts))]


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
    """
    from bilora_ray.training.compute.memory import current_room, in_parts

    texts = [list(beginning) for beginning in beginnings]
    unfinished = [row for row, text in enumerate(texts) if not is_whole(text, generation)]

    def generate(rows: Sequence[int]) -> list[list[int]]:
        least, longest = min(len(texts[row]) for row in rows), max(len(prompts[row]) for row in rows)
        # All are written for as long as the shortest needs: none may get past where the longest prompt's text ends.
        known = [texts[row][: least + longest - len(prompts[row])] for row in rows]
        inputs = collate([prompts[row] + array("i", text) for row, text in zip(rows, known, strict=True)])
        rest = copy(generation)
        rest.max_new_tokens = generation.max_new_tokens - least
        # Every forward pass gathers the weights, so whose texts are done goes on with those whose aren't.
        synced = workers.sharded and workers.world_size > 1
        output = model.generate(**inputs, generation_config=rest, synced_gpus=synced)
        # Before what it writes stands the prompt, or what a decoder starts with.
        written = output[:, inputs["input_ids"].shape[1] if continues else 1 :].tolist()
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
    heads, hidden, layers = (
        getattr(shape, key, None) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    if not (heads and hidden and layers):
        return 0
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
