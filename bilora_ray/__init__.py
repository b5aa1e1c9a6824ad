"""bilora-ray: fine-tuning of LLMs with sharpness-aware LoRA adapters, and the search for their settings.

Bi-LoRA (arXiv 2508.19564) is sharpness-aware minimization (SAM) for LoRA: it looks for flat minima by an adversarial
weight perturbation that is a second low-rank adapter. Adapters are PEFT's, the hyperparameter search is Ray Tune's and
Optuna's, on a laptop or a cluster, and every run is in MLflow. `bilora_ray.method` is the method alone, for any loop.
"""

__version__ = "0.1.0"
