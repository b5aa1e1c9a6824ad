"""One trial, from settings to the best adapter, in plain torch: no Ray, no Optuna, no MLflow."""
