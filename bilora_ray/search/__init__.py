"""From a space file to finished trials: Optuna proposes and remembers, Ray Tune runs."""
