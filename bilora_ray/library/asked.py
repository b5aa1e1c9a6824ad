"""How a search, a comparison or a training is to be run, beside what it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bilora_ray.errors import UserError
from bilora_ray.search.cluster.protection import check_mlflow, check_ray
from bilora_ray.search.study.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How it is to be run.

    Attributes:
        layout: where the study database and the trials' folders are.
        resume: go on with what exists.
        extend: go on with it, with so many more: trials than a search was asked for, seeds than a comparison has.
        ray_address: Ray cluster; None: one on this machine, for the time of the search. A training takes none.
        mlflow_uri: MLflow server or database; None: a SQLite file beside the studies.
        insecure: whether another machine's Ray or MLflow may be used without a token or password.
        dry_run: whether nothing is to start.
        num_trials: of a search, trials to finish; None: the space's.
        max_concurrent: of a search, trials at one time; None: what there is room for.
        warm_start: of a search, earlier studies to begin with.
    """

    layout: Layout
    resume: bool = False
    extend: int | None = None
    ray_address: str | None = None
    mlflow_uri: str | None = None
    insecure: bool = False
    dry_run: bool = False
    num_trials: int | None = None
    max_concurrent: int | None = None
    warm_start: Sequence[str] = ()

    @property
    def goes_on(self) -> bool:
        """Whether it is to be there already."""
        return self.resume or self.extend is not None

    def check(self, more: str = "trials") -> None:
        """UserError if nothing is to come of it, or another machine would be used without a secret.

        Args:
            more: what `extend` counts.
        """
        if self.extend is not None and self.extend < 1:
            raise UserError(f"--extend {self.extend}: must be at least 1; it says how many {more} more")
        if not self.insecure:
            check_ray(self.ray_address, "--ray-address")
            check_mlflow(self.mlflow_uri)
