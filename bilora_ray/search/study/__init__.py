"""The study database, which is the truth: trials, proposals, verdicts. Optuna lives in this room and in no other."""
