"""How texts are written for an evaluation: greedily, in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.paths import model_file
from bilora_ray.training.data.chat import Template

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# A transformers model or a PEFT model around one.
Model = Any
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
