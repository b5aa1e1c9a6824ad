"""bilora-ray: search for sharpness-aware LoRA adapters on whatever cluster you have."""

__version__ = "0.1.0"
