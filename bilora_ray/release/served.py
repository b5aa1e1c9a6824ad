"""An adapter, or a model, as MLflow loads and serves it: `mlflow.pyfunc.load_model` finds `_load_pyfunc` by its name.

So nothing is pickled, and no code is kept with a model: what loads it is the installed bilora-ray, with which old
adapters open. What is kept is the adapter as it is exported, or the model that was trained whole. The base model's
weights are not copied: one of the Hub is fetched by its name and commit, a built-in one comes with bilora-ray, and a
local one is read where it was in training, or elsewhere:
`load_model(uri, model_config={"model_name_or_path": "/models/llama"})`.

No Ray is imported, and torch only once a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import TASK_FACTS
from bilora_ray.recipe import RECIPE, evaluation_config, read_recipe
from bilora_ray.records import Served

if TYPE_CHECKING:
    import pandas

    from bilora_ray.training.prediction.answers import Asked

# What a model's user may decide anew, by MLflow's `model_config`.
OF_A_BASE = ("model_name_or_path", "model_revision")
DECIDED_ANEW = (*OF_A_BASE, "trust_remote_code", "max_new_tokens")


def served(adapter: Path, origin: Mapping[str, Any]) -> Served:
    """What there is to tell of an adapter, so that MLflow can load and serve it.

    Args:
        adapter: the folder.
        origin: as `export_adapter` takes it.

    Raises:
        UserError: it is none of ours.
    """
    from bilora_ray.release.export import export_adapter
    from bilora_ray.release.licence import licence_of
    from bilora_ray.training.prediction.questions import columns_of

    recipe = read_recipe(adapter)
    config = build(TrialConfig, recipe["settings"], f"{adapter / RECIPE}: settings")
    facts = {
        "base_model": config.model_name_or_path,
        "base_revision": config.model_revision or recipe.get("model_commit"),
        "base_digest": recipe.get("digests", {}).get("model_name_or_path"),
        "task": config.task,
        "method": config.method,
        **licence_of(config),
    }
    anew = {key: getattr(config, key) for key in DECIDED_ANEW if not (config.leaves_model and key in OF_A_BASE)}
    chat = config.chat_column
    inputs = columns_of(config) if chat is None else (chat,)
    return Served(
        loader=__name__,
        inputs=inputs,
        texts=chat is None and TASK_FACTS[config.task].generates,
        # A stranger's model may not say by itself that its code is to be run.
        config={**anew, "trust_remote_code": False},
        kind="model" if config.leaves_model else "adapter",
        facts={key: str(value) for key, value in facts.items() if value is not None},
        example=_question(config, inputs),
        write=lambda folder: export_adapter(adapter, folder, origin),
    )


def _question(config: TrialConfig, inputs: tuple[str, ...]) -> dict[str, Any] | None:
    """The first row of local data, without its answer; None where the data are gone or elsewhere."""
    from bilora_ray.training.data.sources import first_records

    try:
        found = first_records(config, 1)
    except (UserError, OSError):
        return None
    for setting in ("validation_data", "train_data"):
        for record in found.get(setting, ()):
            if config.chat_column is None and set(inputs) <= record.columns.keys():
                return {key: record.columns[key] for key in inputs}
    return None


class ServedAdapter:
    """What `mlflow.pyfunc.load_model` gives: an adapter on its base model, or a model.

    Args:
        asked: it.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def predict(self, model_input: pandas.DataFrame, params: Mapping[str, Any] | None = None) -> pandas.DataFrame:
        """`prediction` of each row and, of tasks with labels, `probabilities` by label.

        Args:
            model_input: the columns of a question; others are not read.
            params: MLflow hands them on; there are none.

        Raises:
            UserError: a column is missing, or a row says nothing.
        """
        import pandas

        from bilora_ray.training.data.sources import Record
        from bilora_ray.training.prediction.questions import question

        rows = pandas.DataFrame(model_input).to_dict("records")
        questions = [question(Record(row, f"row {n}"), self.asked.config) for n, row in enumerate(rows, start=1)]
        examples, _ = self.asked.examples(questions)
        answers = self.asked.answers(examples)
        table = {"prediction": [answer.prediction for answer in answers]}
        if any(answer.probabilities is not None for answer in answers):
            table["probabilities"] = [answer.probabilities for answer in answers]
        return pandas.DataFrame(table)

    def get_raw_model(self) -> Any:
        """The PEFT model, or transformers' own, as `get_raw_model` of MLflow's model gives it."""
        return self.asked.model


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedAdapter:
    """The adapter in the folder `path`; MLflow calls this. UserError if it or its base model cannot be read."""
    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.training.prediction.answers import Asked
    from bilora_ray.training.prediction.questions import asking

    adapter = Path(path)
    trained = {**read_recipe(adapter)["settings"], "trust_remote_code": False}
    anew = {key: value for key, value in (model_config or {}).items() if value != trained[key]}
    config = asking(evaluation_config(adapter, anew))
    return ServedAdapter(Asked.load(adapter, config))
