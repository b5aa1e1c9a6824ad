"""Tiny models with tokenizers, and data they can learn, all decided by seeds and made in about a second.

Heavy libraries are imported inside the functions, so that tests which need none of this stay light.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.measures import TASK_FACTS, Task
from bilora_ray.training.folder import TrialFolder

if TYPE_CHECKING:
    from bilora_ray.search.study.study import SearchStudy

COLOURS = ("red", "green", "blue", "black", "white", "brown")
TASKS: tuple[Task, ...] = tuple(TASK_FACTS)
# The models and the data of tasks, where they are not those of most.
MODELS: dict[Task, str] = {"causal-lm": "llama", "seq2seq-lm": "t5", "image-classification": "vit"}
KINDS: dict[Task, str] = {
    "sequence-classification": "labels",
    "multi-label-classification": "sets",
    "regression": "numbers",
    "token-classification": "words",
    "image-classification": "images",
}
# The tasks that put a head on the model -> of so many outputs.
HEADS: dict[Task, int] = {
    "sequence-classification": 2,
    "multi-label-classification": 3,
    "regression": 1,
    "token-classification": 3,
    "image-classification": 2,
}
METHODS = ("lora", "bilora")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CLOCKED = frozenset({"gpu_memory_gib", "tokens_per_second", "train_runtime"})


@dataclass(frozen=True)
class Tiny:
    """The folder with the models (`llama`, `t5`, `bert`, `vit`) and the data files."""

    folder: Path

    def model(self, task: Task) -> Path:
        """The base model of `task`."""
        return self.folder / MODELS.get(task, "bert")

    def config(self, task: Task, **settings: Any) -> TrialConfig:
        """Settings of a trial of some seconds, with `settings` on top."""
        kind = KINDS.get(task, "texts")
        defaults: dict[str, Any] = {
            "model_name_or_path": str(self.model(task)),
            "task": task,
            "train_data": str(self.folder / f"{kind}-train.jsonl"),
            "validation_data": str(self.folder / f"{kind}-validation.jsonl"),
            "max_length": 64,
            "learning_rate": 1e-2,
            "max_steps": 8,
            "eval_steps": 2,
        }
        return TrialConfig(**defaults | settings)


def build(folder: Path) -> Tiny:
    """Make the models and the data in `folder`."""
    _models(folder)
    for split, count in (("train", 44), ("validation", 18)):
        random = Random(split)
        write_rows(folder / f"texts-{split}.jsonl", [_text(random) for _ in range(count)])
        write_rows(folder / f"labels-{split}.jsonl", [_label(random) for _ in range(count)])
        write_rows(folder / f"chats-{split}.jsonl", [_chat(random) for _ in range(count)])
        write_rows(folder / f"colours-{split}.jsonl", [_colour(random) for _ in range(count)])
        write_rows(folder / f"sets-{split}.jsonl", [_set(random) for _ in range(count)])
        write_rows(folder / f"numbers-{split}.jsonl", [_number(random) for _ in range(count)])
        write_rows(folder / f"words-{split}.jsonl", [_words(Random(f"{split} {row}")) for row in range(count)])
        write_rows(folder / f"images-{split}.jsonl", _images(write_images(folder / f"images-{split}", count)))
    return Tiny(folder)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_images(folder: Path, count: int) -> Path:
    """Make a folder of images, bad ones with a dark half and good ones with a bright one, of several sizes."""
    from PIL import Image

    random = Random(str(count))
    for number in range(count):
        label = random.choice(("bad", "good"))
        width, height = random.randrange(12, 40), random.randrange(12, 40)
        image = Image.new("RGB", (width, height), tuple(random.choices(range(96, 160), k=3)))
        half = (random.choice((0, width // 2)), 0)
        image.paste({"bad": (20, 20, 40), "good": (250, 240, 230)}[label], (*half, half[0] + width // 2, height))
        (folder / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / label / f"{number:02}.png")
    return folder


def run_fit(config: TrialConfig, path: Path) -> tuple[list[dict[str, float]], Any]:
    """What `fit` reports, and what it returns."""
    from bilora_ray.training.loop import fit

    reports: list[dict[str, float]] = []

    def report(metrics: dict[str, float]) -> bool:
        reports.append(metrics)
        return True

    return reports, fit(config, TrialFolder(path), report)


def next_trial(study: SearchStudy) -> int | None:
    """The number of the one trial that a study hands out next; None when all are given."""
    numbers = study.next_trials()
    assert len(numbers) < 2
    return numbers[0] if numbers else None


def evaluate_adapter(adapter: Path | None, config: TrialConfig) -> dict[str, float]:
    """The metrics of an exported adapter, or of the base model alone, as `bilora-ray evaluate` measures them."""
    from bilora_ray.training.evaluate import evaluate, load_adapted

    model, data, _ = load_adapted(adapter, config)
    config = config.model_copy(update={"label_names": data.label_names})
    return evaluate(model, data.validation, config, data.tokenizer)


def fit_in_process(settings: dict[str, Any], path: str) -> None:
    """`fit` as the target of a process that a test kills."""
    run_fit(TrialConfig(**settings), Path(path))


def reproducible(reports: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """`reports` without the metrics that the machine decides."""
    return [{key: value for key, value in report.items() if key not in CLOCKED} for report in reports]


def _text(random: Random) -> dict[str, Any]:
    """Repeat a colour: prompts and completions of very different lengths."""
    colour, count = random.choice(COLOURS), random.choice((1, 1, 2, 7))
    noise = " ".join(random.choices(("so", "very", "well"), k=random.randrange(4)))
    return {"prompt": f"{noise} say {colour} {count} times:", "completion": " ".join([colour] * count)}


def _colour(random: Random) -> dict[str, Any]:
    """A task with a small answer inside a longer text."""
    colour = random.choice(COLOURS[:3])
    return {"prompt": f"what is {colour}?", "completion": f"it is # {colour}", "colour": colour}


def _label(random: Random) -> dict[str, Any]:
    label = random.choice(("bad", "good"))
    words = [*random.choices(COLOURS, k=random.randrange(1, 6)), {"bad": "awful", "good": "lovely"}[label]]
    random.shuffle(words)
    return {"text": " ".join(words), "label": label}


def _set(random: Random) -> dict[str, Any]:
    """Which of three colours are in a text."""
    words = random.choices(COLOURS, k=random.randrange(1, 6))
    return {"text": " ".join(words), "label": [colour for colour in COLOURS[:3] if colour in words]}


def _number(random: Random) -> dict[str, Any]:
    """How much praise is in a text."""
    praise = random.choice(("awful", "so", "lovely"))
    words = [*random.choices(COLOURS, k=random.randrange(1, 6)), praise]
    random.shuffle(words)
    return {"text": " ".join(words), "label": {"awful": -1.5, "so": 0.5, "lovely": 2}[praise]}


def _words(random: Random) -> dict[str, Any]:
    """Colours, which may have an adverb before them, amid other words."""
    pairs = [("say", "O"), *_phrase(random), ("times", "O"), *(_phrase(random) if random.random() < 0.7 else [])]
    return {"text": [word for word, _ in pairs], "label": [tag for _, tag in pairs]}


def _phrase(random: Random) -> list[tuple[str, str]]:
    colour = random.choice(COLOURS)
    return [("very", "B-COLOUR"), (colour, "I-COLOUR")] if random.random() < 0.5 else [(colour, "B-COLOUR")]


def _images(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    return [{"image": f"{folder.name}/{file.parent.name}/{file.name}", "label": file.parent.name} for file in files]


def _chat(random: Random) -> dict[str, Any]:
    row = _text(random)
    contents = ("hello", "hi", row["prompt"], row["completion"])
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]}


def _models(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    _vision_model(folder / "vit")

    # Frozen random weights have to be large for a low-rank change to turn them into a model of anything.
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    made: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
        "llama": (LlamaConfig, LlamaForCausalLM, llama | {"initializer_range": 0.3}),
        "t5": (T5Config, T5ForConditionalGeneration, t5),
        "bert": (BertConfig, BertModel, llama | {"max_position_embeddings": 64, "initializer_range": 0.2}),
    }
    state = torch.get_rng_state()
    for name, (config, model, settings) in made.items():
        tokenizer = _tokenizer(name)
        ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        torch.manual_seed(0)
        model(config(vocab_size=len(tokenizer), **ids, **settings)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.set_rng_state(state)


def _vision_model(folder: Path) -> None:
    """A ViT without a head, as published for other labels, and its image processor."""
    import torch
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = ViTConfig(image_size=16, patch_size=8, num_attention_heads=4, initializer_range=0.2, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


def _tokenizer(name: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    random = Random(0)
    texts = [" ".join([*_text(random).values(), _label(random)["text"]]) for _ in range(100)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    single = {"llama": f"{BOS} $A", "t5": f"$A {EOS}", "bert": f"{BOS} $A {EOS}"}[name]
    special = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    if name == "llama":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
