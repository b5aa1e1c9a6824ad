"""Names of other libraries that those do not promise to keep: all that the package uses, and what for.

A new release may move any of them, and `test_private_names.py` then says what has moved, in one line each. The
libraries whose inner works a search or an adapter stands on are HELD to the minor version that the tests pass with: to
go on to the next one, raise it in pyproject.toml and constraints.txt. Of the others a few names are in use that have
been there for long, and a user has reasons of their own for a version, such as the CUDA that a torch was made for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

HELD = ("optuna", "peft", "ray")

# What is used for what -> the names.
NAMES: dict[str, tuple[str, ...]] = {
    "a Ray cluster of our own, to stay on 127.0.0.1 and to have its own token": (
        "ray._private.ray_constants.ENABLE_RAY_CLUSTER",
        "ray._raylet.AuthenticationTokenLoader.instance",
        "ray._raylet.AuthenticationTokenLoader.reset_cache",
        "ray._raylet.Config.initialize",
    ),
    "a Ray cluster, to keep the current folder off the path of its processes": (
        "ray.job_config.JobConfig._runtime_env_has_working_dir",
    ),
    "the upload of a job, to know which files Ray will pack": (
        "ray._private.ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE",
        "ray._private.ray_constants.get_runtime_env_default_excludes",
        "ray._private.runtime_env.packaging._dir_travel",
        "ray._private.runtime_env.packaging._get_excludes",
    ),
    "the client of a cluster's jobs, to wait no longer than a minute": (
        "ray.dashboard.modules.job.pydantic_models.JobDetails",
        "ray.job_submission.JobSubmissionClient._do_request",
        "ray.job_submission.JobSubmissionClient.get_address",
    ),
    "the search, to keep AWS secrets out of Ray's logs": ("ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE",),
    "the search, to run trials in processes that Ray has started already": (
        "ray.tune.execution.class_cache.DEFAULT_ENV_VARS",
    ),
    "a Ray cluster of our own, not to wait for the end of its autoscaler": (
        "ray._private.node.Node.kill_monitor",
        "ray._private.ray_constants.PROCESS_TYPE_MONITOR",
        "ray._private.worker._global_node",
    ),
    "a Ray cluster of our own, to have sessions of its own": ("ray._private.services.ConsolePopen",),
    "a Ray cluster, to leave SIGTERM to the search": (
        "ray._private.ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER",
        "ray._private.utils.set_sigterm_handler",
    ),
    "the end of a study, to free what its runs and models hold, and nothing that others have deleted": (
        "mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore._hard_delete_logged_model",
        "mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore._hard_delete_run",
        "mlflow.tracking._tracking_service.utils._get_store",
    ),
    "the search, to keep Tune silent": ("ray.tune.progress_reporter.ProgressReporter.should_report",),
    "the scheduler, to decide about a trial whose process died and to end a search that cannot go on": (
        "ray.tune.execution.tune_controller.TuneController.request_stop_experiment",
        "ray.tune.experiment.Trial.error_file",
        "ray.tune.experiment.Trial.max_failures",
        "ray.tune.experiment.Trial.num_failures",
        "ray.tune.experiment.Trial.should_recover",
    ),
    "the rendezvous of a trial's workers, to listen on the node's own address only": (
        "ray.train.torch.TorchConfig.backend_cls",
        "ray.train.torch.TorchConfig.timeout_s",
        "ray.train.torch.config._TorchBackend.on_start",
        "ray.train.v2._internal.execution.worker_group.WorkerGroup.execute_single",
        "ray.train.v2._internal.execution.worker_group.WorkerGroup.execute_single_async",
        "ray.train.v2._internal.execution.worker_group.WorkerGroup.get_resources_per_worker",
    ),
    "a trial of several workers, to say why it ended": (
        "ray.train.ControllerError.controller_failure",
        "ray.train.WorkerGroupError.worker_failures",
    ),
    "the check of a cluster's dashboard": ("ray.util.state.exception.RayStateApiException",),
    "the study, to read one trial by its number": (
        "optuna.storages.BaseStorage.get_trial",
        "optuna.storages.BaseStorage.get_trial_id_from_study_id_trial_number",
        "optuna.study.Study._storage",
        "optuna.study.Study._study_id",
    ),
    "the study, to read its trials once for a proposal or a verdict": (
        "optuna.storages._cached_storage._CachedStorage.get_all_trials",
        "optuna.storages._cached_storage._CachedStorage.get_trial",
    ),
    "proposals and early stops, to go on with a trial of another process": (
        "optuna.trial.FrozenTrial.system_attrs",
        "optuna.trial.FrozenTrial._trial_id",
        "optuna.trial.Trial._trial_id",
        "optuna.trial.Trial.storage",
    ),
    "early stops, to compare with the trials of a bracket": (
        "optuna.pruners.HyperbandPruner._get_bracket_id",
        "optuna.pruners.HyperbandPruner._try_initialization",
    ),
    "the digest of a Hub dataset": ("datasets.Dataset._fingerprint",),
    "attention by a kernel, to know which one it is and whose models it is for": (
        "transformers.PreTrainedConfig._attn_implementation",
        "transformers.PreTrainedModel._supports_attention_backend",
        "transformers.PreTrainedModel._supports_flash_attn",
        "transformers.PreTrainedModel._supports_sdpa",
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "transformers.masking_utils.sdpa_mask",
    ),
    "FSDP, to find the blocks of a model": ("transformers.PreTrainedModel._no_split_modules",),
    "quantised weights, to keep them as they are over an evaluation": (
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
    ),
    "compiled blocks, to have few graphs and to know of one that failed": (
        "torch._dynamo",
        "torch._dynamo.config.accumulated_recompile_limit",
        "torch._dynamo.config.optimize_ddp",
        "torch._dynamo.config.recompile_limit",
        "torch._dynamo.config.suppress_errors",
        "torch._dynamo.utils.counters",
        "torch.fx.experimental._config",
        "torch.fx.experimental._config.use_duck_shape",
    ),
    "a kept base, to know whether it was written to": ("torch.Tensor._version",),
    "a base, to know whether it came with an adapter": ("transformers.PreTrainedModel._hf_peft_config_loaded",),
    "the projection, to shrink all factors in one kernel": ("torch._foreach_mul_",),
    "the methods of two passes, to move all factors together and back": (
        "torch._foreach_add_",
        "torch._foreach_copy_",
        "torch._foreach_mul",
        "torch._foreach_sub",
    ),
    "AdamW's update, to do it for many tensors at once": (
        "torch._foreach_norm",
        "torch._utils._flatten_dense_tensors",
        "torch._utils._unflatten_dense_tensors",
    ),
    "FSDP, to share gradients once a step and to free whole weights after an evaluation": (
        "torch.distributed.fsdp.FSDPModule.reshard",
        "torch.distributed.fsdp.FSDPModule.set_requires_gradient_sync",
    ),
    "attaching the auxiliary, to refuse what is no linear layer": (
        "peft.tuners.lora.layer.Conv1d",
        "peft.tuners.lora.layer.Conv2d",
        "peft.tuners.lora.layer.Conv3d",
        "peft.tuners.lora.layer.Embedding",
        "peft.tuners.lora.layer.MultiheadAttention",
        "peft.tuners.lora.layer.ParamWrapper",
        "peft.tuners.lora.tp_layer.LoraParallelLinear",
        "peft.utils.other.TrainableTokensWrapper",
    ),
    "the layers of both methods, to call a base layer that somebody looks at": (
        "torch.nn.Linear._backward_hooks",
        "torch.nn.Linear._backward_pre_hooks",
        "torch.nn.Linear._forward_hooks",
        "torch.nn.Linear._forward_pre_hooks",
    ),
    "the layers of both methods, to compute what PEFT's own would": (
        "peft.tuners.lora.Linear.active_adapters",
        "peft.tuners.lora.Linear.base_layer",
        "peft.tuners.lora.Linear.disable_adapters",
        "peft.tuners.lora.Linear.lora_A",
        "peft.tuners.lora.Linear.lora_B",
        "peft.tuners.lora.Linear.lora_bias",
        "peft.tuners.lora.Linear.lora_dropout",
        "peft.tuners.lora.Linear.lora_variant",
        "peft.tuners.lora.Linear.merged",
        "peft.tuners.lora.Linear.scaling",
        "peft.tuners.lora.Linear.set_requires_grad",
    ),
}
# Words that a module reads: variables of the environment, keys, resources. One that it reads no more does nothing.
WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "the search, to keep Ray and Tune silent": (
        ("ray.tune.experimental.output", "RAY_AIR_NEW_OUTPUT"),
        ("ray.train.constants", "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS"),
        ("ray.tune.utils.callback", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"),
        ("ray.tune.execution.experiment_state", "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"),
    ),
    "the search, to hear of every evaluation at once": (
        ("ray.train.v2._internal.constants", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"),
        ("ray.tune.execution.tune_controller", "TUNE_DISABLE_STRICT_METRIC_CHECKING"),
        ("ray.tune.tune", "TUNE_RESULT_BUFFER_LENGTH"),
    ),
    "the search, to write no snapshots": (("ray.tune.execution.tune_controller", "TUNE_GLOBAL_CHECKPOINT_S"),),
    "the search, to hear of Ctrl-C": (("ray.tune.tune", "TUNE_DISABLE_SIGINT_HANDLER"),),
    "the search, to show no GPU to who asks for none": (
        ("ray._private.accelerators.accelerator", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"),
    ),
    "the search, to ask all GPUs of a node": (
        ("ray._private.accelerators.nvidia_gpu", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"),
    ),
    "a cluster, to run what must be on its head": (("ray._common.constants", "__internal_head__"),),
    "a job, to have the time to end its runs": (
        ("ray.dashboard.modules.job.job_supervisor", "RAY_JOB_STOP_WAIT_TIME_S"),
    ),
    "the client of a cluster's jobs, to ask the address that was given": (
        ("ray._private.ray_constants", "RAY_API_SERVER_ADDRESS"),
    ),
    "early stops, to know which rungs a trial has reached": (
        ("optuna.pruners._successive_halving", "completed_rung_"),
    ),
}
# Parameters that are in no documentation.
PARAMETERS: dict[str, tuple[tuple[str, str], ...]] = {
    "the upload of a job, to know which files Ray will pack": (
        ("ray._private.runtime_env.packaging._dir_travel", "include_gitignore"),
        ("ray._private.runtime_env.packaging._dir_travel", "logger"),
    ),
    "proposals, to go on with a trial of another process": (("optuna.trial.Trial", "trial_id"),),
    "the rendezvous of a trial's workers, to listen on the node's own address only": (
        ("torch.distributed.TCPStore", "master_listen_fd"),
    ),
}


def _study() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study()


def _told_study() -> Any:
    study = _study()
    study.tell(study.ask(), 0.0)
    return study


def _lora_linear() -> Any:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    return get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])).get_submodule(
        "base_model.model.0"
    )


def _made(name: str, *arguments: object, **more: object) -> Callable[[], Any]:
    return lambda: pkgutil.resolve_name(name)(*arguments, **more)


# Classes whose names are attributes of an object only -> one of them.
OBJECTS: dict[str, Callable[[], Any]] = {
    "bitsandbytes.nn.Linear4bit": _made("bitsandbytes.nn.Linear4bit", 2, 2),
    "datasets.Dataset": lambda: importlib.import_module("datasets").Dataset.from_dict({"a": [1]}),
    "optuna.study.Study": _study,
    "optuna.trial.FrozenTrial": lambda: _told_study().trials[0],
    "optuna.trial.Trial": lambda: _study().ask(),
    "peft.tuners.lora.Linear": _lora_linear,
    "ray.train.ControllerError": _made("ray.train.ControllerError", ValueError()),
    "ray.train.WorkerGroupError": _made("ray.train.WorkerGroupError", "", {}),
    "ray.tune.experiment.Trial": _made("ray.tune.experiment.Trial", "none", stub=True),
    "torch.nn.Linear": _made("torch.nn.Linear", 1, 1),
}
